"""Weights on the Hugging Face hub or in open_clip's list, fetched by their own libraries into their own caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.companions import COMPANIONS
from pretrain.merge.safetensors_io import short

SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("*.bin", "*.bin.index.json")


def fetch(address: str, name: str) -> str:
    """The local folder of `org/name[@revision]`; safetensors where there are any, else pickles of torch.

    Without a network, what the cache holds. Raises UserError in one line.
    """
    repository, _, revision = name.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{address}: needs huggingface_hub; pip install 'dromos[hf]'") from None

    def download(*patterns: str) -> str:
        return snapshot_download(
            repository, revision=revision or None, allow_patterns=[*patterns, *COMPANIONS, "README.md"]
        )

    try:
        folder = download(*SAFETENSORS)
        if not any(Path(folder).glob("*.safetensors")):
            folder = download(*PICKLES)
    except Exception as error:  # the client lets its HTTP library's own errors through
        raise UserError(f"{address}: {_why(error)}") from None
    return folder


def fetch_open_clip(address: str, name: str) -> str:
    """The file of `arch/tag` of open_clip's pretrained models, from its cache or fetched by it."""
    arch, _, tag = name.partition("/")
    try:
        from open_clip import pretrained
    except ImportError:
        raise UserError(f"{address}: needs open_clip; pip install 'dromos[train]'") from None
    known: dict[str, Any] = pretrained.get_pretrained_cfg(arch, tag)
    if not known:
        tags = pretrained.list_pretrained_tags_by_model(arch)
        what = f"{arch} has the tags {', '.join(tags)}" if tags else f"open_clip has no weights for {arch!r}"
        raise UserError(f"{address}: {what}; write open_clip://ARCH/TAG")
    try:
        return str(pretrained.download_pretrained(known))
    except Exception as error:  # as above
        raise UserError(f"{address}: {_why(error)}") from None


def _why(error: Exception) -> str:
    kind = type(error).__name__
    if kind == "LocalEntryNotFoundError" or "Connect" in kind or "Offline" in kind:
        return "is not in the cache, and the hub does not answer; go online, or copy the folder here and name its path"
    if kind == "RepositoryNotFoundError":
        return "no such repository, or one that needs a login (hf auth login)"
    if kind == "RevisionNotFoundError":
        return "no such revision; correct what stands after @"
    return f"cannot be fetched: {kind}: {short(str(error))}"
