"""Weights on the Hugging Face hub or in open_clip's list, fetched by their own libraries into their own caches."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile, LocalFile
from pretrain.weights.companions import COMPANIONS, COPIED_SUFFIXES
from pretrain.weights.folder import MAX_JSON, Folder, weight_files
from pretrain.weights.formats.safetensors_file import short

OTHER_FILES = ("README.md", "merge.json")  # they say where weights come from, and what is tied
OFFLINE_ERRORS = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError", "RequestException")
VERBOSE_VARIABLES = ("HF_HUB_VERBOSITY", "HF_DEBUG")
URL_QUERY = re.compile(r"(?<=\S)\?[^\s'\"]+")  # of an address: it may hold a signature that lets anyone read


class RepositoryListing(Folder):
    """What stands at the top of a repository, as a folder: `fetch` gives a file's local path."""

    def __init__(self, address: str, names: Sequence[str], fetch: Callable[[str], str]) -> None:
        self.url, self.remote, self._fetch = address, False, fetch
        self.names = sorted(name for name in names if "/" not in name)
        self.folders = sorted({name.partition("/")[0] for name in names if "/" in name})

    def open(self, name: str) -> ByteFile:
        return LocalFile(self._fetch(name))

    def bytes(self, name: str, limit: int = MAX_JSON, follow: bool = False) -> bytes:
        file = self.open(name)
        if file.size > limit:
            raise UserError(f"{self.url}: {name} has {file.size:,} bytes, more than {limit:,}")
        return file.peek(0, file.size)


def fetch(address: str, name: str) -> str:
    """The local folder of `org/name[@revision]`: the weights that a merge reads, and what stands beside them.

    Of several copies of the weights one is fetched: safetensors before pickles, what an index names before all else.
    Without a network, what the cache holds. Raises UserError in one line.
    """
    repository, _, revision = name.partition("@")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(f"{address}: needs huggingface_hub; pip install 'dromos[hf]'") from None
    where: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    try:
        listed = [one.rfilename for one in hub.HfApi().model_info(**where).siblings or ()]
    except Exception as error:  # the client lets its HTTP library's own errors through
        return _cached(address, hub, where, error)
    there = RepositoryListing(address, listed, lambda file: hub.hf_hub_download(filename=file, **where))
    try:
        with _silenced(hub.utils):
            wanted = [glob.escape(file) for file in files_to_fetch(there)]
            return str(hub.snapshot_download(allow_patterns=wanted, **where))
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{address}: {_reason(error)}") from None


def files_to_fetch(folder: Folder) -> list[str]:
    """What a merge reads of a folder: one copy of the weights with its index, config, tokenizer and the like."""
    weights, _ = weight_files(folder, folder.url)
    beside = [name for name in folder.matching(*COMPANIONS) if name.endswith(COPIED_SUFFIXES)]
    through_index = any(weights.values())
    indexes = folder.matching(f"*{Path(min(weights)).suffix}.index.json") if through_index else []
    return sorted({*weights, *indexes, *folder.matching(*OTHER_FILES), *beside})


@contextmanager
def _silenced(utils: Any) -> Iterator[None]:
    """Without what the client would draw into files, and without its log, which holds signed addresses."""
    logger, bars = utils.logging.get_logger(), sys.stderr.isatty() or utils.are_progress_bars_disabled()
    level = logger.level
    if not any(os.environ.get(name) for name in VERBOSE_VARIABLES):
        logger.setLevel(CRITICAL)
    if not bars:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            utils.enable_progress_bars()


def _cached(address: str, hub: Any, where: dict[str, Any], error: Exception) -> str:
    """What the cache holds, if it is whole, where the hub would not say what there is."""
    if _has_type(error, "RevisionNotFoundError", "HFValidationError"):
        raise UserError(f"{address}: {_reason(error)}") from None
    try:
        # A pattern that nothing matches: the client would ask for all that the repository has.
        folder = str(hub.snapshot_download(local_files_only=True, allow_patterns=["/"], **where))
    except Exception:  # as above; why the hub would not say is what helps, not why the cache is empty
        raise UserError(f"{address}: {_reason(error)}") from None
    try:
        weight_files(Folder(folder), address)
    except UserError as missing:
        raise UserError(f"{address}: {_reason(error)} (in the cache it is not whole: {missing})") from None
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
        raise UserError(f"{address}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if _has_type(error, "GatedRepoError"):
        return "is gated; ask for access on its page, and log in (hf auth login)"
    if _has_type(error, "RepositoryNotFoundError") or status == 401:
        return "no such repository, or one that needs a login (hf auth login)"
    if _has_type(error, "RevisionNotFoundError"):
        return "no such revision; correct what stands after @"
    if _has_type(error, "HFValidationError"):
        return "no name of a repository; write hf://ORG/NAME[@REVISION]"
    if (
        isinstance(error, ConnectionError | TimeoutError)
        or status >= 500
        or _has_type(error, *OFFLINE_ERRORS)
    ):
        said = f" (it says {status})" if status else f" ({_describe_error(error)[:200]})"
        said = "" if _has_type(error, "OfflineModeIsEnabled") else said
        return (
            f"is not in the cache, and the hub does not answer{said}; go online, or copy the folder here and name its "
            "path"
        )
    return f"cannot be fetched: {_describe_error(error)}"


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {short(URL_QUERY.sub('', str(error)))}"


def _has_type(error: Exception, *names: str) -> bool:
    """By name: the client, and the HTTP library that it lets through, are imported where they are used."""
    return any(kind.__name__ in names for kind in type(error).__mro__)
