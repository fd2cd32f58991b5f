"""Weights at hf:// and open_clip:// addresses, downloaded by huggingface_hub and open_clip into their own caches."""

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

OTHER_FILES = ("README.md", "merge.json")  # they record the origin of the weights and tied names
OFFLINE_ERRORS = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError", "RequestException")
VERBOSE_VARIABLES = ("HF_HUB_VERBOSITY", "HF_DEBUG")
URL_QUERY = re.compile(r"(?<=\S)\?[^\s'\"]+")  # of a URL; it may hold a signature that grants access


class RepositoryListing(Folder):
    """The top level of a hub repository as a Folder; `fetch` downloads a file and returns its local path."""

    def __init__(self, address: str, names: Sequence[str], fetch: Callable[[str], str]) -> None:
        self.url, self.remote, self._fetch = address, False, fetch
        self.names = sorted(name for name in names if "/" not in name)
        self.folders = sorted({name.partition("/")[0] for name in names if "/" in name})

    def open(self, name: str) -> ByteFile:
        return LocalFile(self._fetch(name))

    def bytes(self, name: str, limit: int = MAX_JSON, follow: bool = False) -> bytes:
        file = self.open(name)
        if file.size > limit:
            raise UserError(f"{self.url}: {name} has {file.size:,} bytes, more than the limit of {limit:,}")
        return file.peek(0, file.size)


def fetch(address: str, name: str) -> str:
    """Download the weights and companions of `org/name[@revision]`; return the local folder.

    If there are several copies of the weights, downloads the one that `weight_files` chooses. Without a network,
    returns the cached snapshot. Raises UserError with a one-line reason.
    """
    repository, _, revision = name.partition("@")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(f"{address}: requires huggingface_hub; pip install 'dromos[hf]'") from None
    where: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    try:
        names = [file.rfilename for file in hub.HfApi().model_info(**where).siblings or ()]
    except Exception as error:  # huggingface_hub also raises errors of its HTTP library
        return _cached(address, hub, where, error)
    listing = RepositoryListing(address, names, lambda file: hub.hf_hub_download(filename=file, **where))
    try:
        with _silenced(hub.utils):
            patterns = [glob.escape(file) for file in files_to_fetch(listing)]
            return str(hub.snapshot_download(allow_patterns=patterns, **where))
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{address}: {_reason(error)}") from None


def files_to_fetch(folder: Folder) -> list[str]:
    """Names of the files a merge reads: one copy of the weights with its index, and the companions."""
    weights, _ = weight_files(folder, folder.url)
    companions = [name for name in folder.matching(*COMPANIONS) if name.endswith(COPIED_SUFFIXES)]
    through_index = any(weights.values())
    indexes = folder.matching(f"*{Path(min(weights)).suffix}.index.json") if through_index else []
    return sorted({*weights, *indexes, *folder.matching(*OTHER_FILES), *companions})


@contextmanager
def _silenced(utils: Any) -> Iterator[None]:
    """Disable the client's log, which holds signed URLs, and its progress bars unless stderr is a terminal."""
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
    """The cached snapshot, if it is complete, after the hub failed with `error`."""
    if _has_type(error, "RevisionNotFoundError", "HFValidationError"):
        raise UserError(f"{address}: {_reason(error)}") from None
    try:
        # "/" matches no file. Without a pattern the client requires every file of the repository.
        folder = str(hub.snapshot_download(local_files_only=True, allow_patterns=["/"], **where))
    except Exception:  # as above; the hub's error is more useful than that of an empty cache
        raise UserError(f"{address}: {_reason(error)}") from None
    try:
        weight_files(Folder(folder), address)
    except UserError as missing:
        raise UserError(f"{address}: {_reason(error)} (the cached copy is incomplete: {missing})") from None
    return folder


def fetch_open_clip(address: str, name: str) -> str:
    """Path of the weight file of open_clip's pretrained model `arch/tag`, downloaded if it is not cached."""
    arch, _, tag = name.partition("/")
    try:
        from open_clip import pretrained
    except ImportError:
        raise UserError(f"{address}: requires open_clip; pip install 'dromos[train]'") from None
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
        return "the repository is gated; request access on its page and log in (hf auth login)"
    if _has_type(error, "RepositoryNotFoundError") or status == 401:
        return "the repository does not exist or needs a login (hf auth login)"
    if _has_type(error, "RevisionNotFoundError"):
        return "the revision does not exist; correct the text after @"
    if _has_type(error, "HFValidationError"):
        return "not a valid repository name; write hf://ORG/NAME[@REVISION]"
    if (
        isinstance(error, ConnectionError | TimeoutError)
        or status >= 500
        or _has_type(error, *OFFLINE_ERRORS)
    ):
        detail = f" (HTTP status {status})" if status else f" ({_describe_error(error)[:200]})"
        detail = "" if _has_type(error, "OfflineModeIsEnabled") else detail
        return (
            f"is not in the cache, and the hub does not answer{detail}; go online, or copy the folder to this "
            "machine and name its path"
        )
    return f"download failed: {_describe_error(error)}"


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {short(URL_QUERY.sub('', str(error)))}"


def _has_type(error: Exception, *names: str) -> bool:
    """Compare class names, so that neither huggingface_hub nor its HTTP library is imported here."""
    return any(kind.__name__ in names for kind in type(error).__mro__)
