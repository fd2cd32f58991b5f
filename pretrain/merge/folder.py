"""A folder of weights on a disk or in an object store: what is in it, by name, and nothing that lies outside of it."""

from __future__ import annotations

import fnmatch
import json
import os
from pathlib import Path
from typing import Any

from data_pipeline import object_store
from data_pipeline.errors import UserError
from data_pipeline.storage import is_remote, join, local_path
from pretrain.merge.remote_file import Blocks, ByteFile, RemoteFile, open_file

MAX_JSON = 256 << 20
BLOBS = "blobs"  # where the Hugging Face cache keeps the files that its snapshots link to


class Folder:
    """The files directly in a folder.

    url:     path or s3:// URL, without a slash at its end.
    names:   its files, sorted.
    folders: its folders, sorted.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        self.remote = is_remote(self.url)
        self.names: list[str] = []
        self.folders: list[str] = []
        found = _remote_entries(self.url) if self.remote else _local_entries(self.url)
        for name, is_folder in sorted(found.items()):
            (self.folders if is_folder else self.names).append(name)
        self._blocks: Blocks | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def matching(self, *patterns: str) -> list[str]:
        """Files that match one of the shell patterns, sorted."""
        return [n for n in self.names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]

    def path(self, name: str) -> str:
        """The address of a file of this folder. Raises UserError for a link that leads out of it."""
        url = join(self.url, name)
        if not self.remote and os.path.islink(local_path(url)):
            _check_link(Path(local_path(self.url)), Path(local_path(url)))
        return url

    def open(self, name: str) -> ByteFile:
        if self.remote and self._blocks is None:
            self._blocks = Blocks(len(self.matching("*.safetensors", "*.bin", "*.pt", "*.pth")))
        return open_file(self.path(name), self._blocks)

    def below(self, name: str) -> Folder:
        return Folder(join(self.url, name))

    def bytes(self, name: str, limit: int = MAX_JSON) -> bytes:
        """A small file, whole."""
        file = RemoteFile(self.path(name), Blocks(1)) if self.remote else open_file(self.path(name))
        if file.size > limit:
            raise UserError(
                f"{file.name}: {file.size:,} bytes, more than {limit:,}; it is not what its name says"
            )
        return file.peek(0, file.size)

    def json(self, name: str) -> Any:
        return parse_json(self.bytes(name), join(self.url, name))


def parse_json(raw: bytes, where: str) -> Any:
    """JSON, or a UserError that names the file."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{where}: not JSON: {error or type(error).__name__}; fetch or write it again"
        ) from None


def _local_entries(url: str) -> dict[str, bool]:
    path = local_path(url)
    try:
        with os.scandir(path) as entries:
            return {entry.name: entry.is_dir() for entry in entries}
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _remote_entries(url: str) -> dict[str, bool]:
    def call(store: Any) -> list[dict[str, Any]]:
        return store.ls(url, detail=True)

    try:
        entries = object_store.ask(url, call)
    except FileNotFoundError:
        raise UserError(f"{url}: nothing there") from None
    found = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] == "directory" for entry in entries}
    found.pop("", None)
    return found


def _check_link(folder: Path, link: Path) -> None:
    target, home = link.resolve(), folder.resolve()
    cache = home.parent.parent  # models--org--name/snapshots/REVISION
    in_cache = home.parent.name == "snapshots" and target.parent == cache / BLOBS
    if not target.is_relative_to(home) and not in_cache:
        raise UserError(f"{link}: a link to {target}, which is outside of {folder}; put a copy there")
