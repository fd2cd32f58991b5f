"""The path of a source: which addresses are read, patterns, and the files beside the tars that are not read.

A path that exists comes before a pattern: a folder may be called `[v2] x` or `a{b`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import files
from data_pipeline.storage.file_kind import HEAD_BYTES, describe_kind, file_kind
from data_pipeline.storage.files import SHARD_SUFFIX, is_remote, join, local_path
from data_pipeline.storage.listing import listed
from data_pipeline.storage.object_store import with_retries

PATTERN = re.compile(r"[{*?\[]")
COMPRESSED = re.compile(
    r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lz|lzma|z|br)|tgz|tbz2?|txz|tzst|tlz)$", re.IGNORECASE
)
UNFINISHED = re.compile(
    r"\.tar\.(part|partial|tmp|crdownload|download|incomplete|filepart|aria2|\d+)$", re.IGNORECASE
)
# Protocol -> how its data comes to a disk.
FETCH_FIRST = {
    "hf": "download it first, with: hf download ORG/NAME --repo-type dataset --local-dir DIR; then write DIR",
    "http": "download the files first, for example with wget; then write their folder",
    "https": "download the files first, for example with wget; then write their folder",
    "gs": "copy it first, with: gcloud storage cp -r; then write the folder",
}
MAX_SUBFOLDERS = 16  # of a folder that are searched for tars


def normal(path: str) -> str:
    """The path as it is read: without `file://`, and with `s3://` in place of `s3a://`.

    Raises UserError for an address that is not read: another protocol, a command, a chain of files.
    """
    if path.startswith("s3a://"):
        path = "s3://" + path.removeprefix("s3a://")
    path = local_path(path)
    protocol, separator, _ = path.partition("://")
    if separator and protocol != "s3" and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", protocol):
        advice = FETCH_FIRST.get(protocol.lower(), "copy the files to one of them first")
        raise UserError(f"{path}: data is read from a disk or from s3://, not from {protocol}://; {advice}")
    if path.startswith("pipe:"):
        raise UserError(
            f"{path}: a source is a path, never a command; run the command first, or write the s3:// path that it reads"
        )
    if "::" in path and not _exists(path):
        raise UserError(
            f"{path}: :: does not join paths; write a pattern such as {{a,b}}.tar, or one source for each path"
        )
    return path


def is_pattern(path: str) -> bool:
    """True for brace patterns ({00000..00031}) and shell patterns (*, ?, [), except for a path that exists."""
    return PATTERN.search(_split(path)[1]) is not None


def root_of(path: str) -> str:
    """Folder that a source's shard paths are relative to: the folder itself, or the one before the first pattern."""
    path = normal(path)
    folder, rest = _split(path)
    if PATTERN.search(rest):
        return folder
    if path.endswith(SHARD_SUFFIX) and not os.path.isdir(path):
        return path.rpartition("/")[0]
    return path.rstrip("/")


def list_shards(path: str) -> list[str]:
    """URLs of the tars of a source, without `file://`.

    A folder gives the tars directly in it, sorted by name. Subfolders are not searched, because train/ and test/ are
    often beside each other. A brace pattern gives all its expansions in their order, without a check that the files
    exist; `*`, `?` and `[` give the existing files, sorted; `**` stands for folders of any depth. Raises UserError if
    there are none.
    """
    path = normal(path)
    folder, rest = _split(path)
    if PATTERN.search(rest):
        return _expand(path, folder, rest)
    if path.endswith(SHARD_SUFFIX) and not os.path.isdir(path):
        return [path]
    if not is_remote(path) and os.path.isfile(path):
        with open(path, "rb") as opened:
            other = describe_kind(file_kind(opened.read(HEAD_BYTES)), path)
        if other is not None:
            raise UserError(other)
    return files.list_files(path, SHARD_SUFFIX)


def _exists(path: str) -> bool:
    return not is_remote(path) and os.path.exists(local_path(path))


def _split(path: str) -> tuple[str, str]:
    """(folder, pattern below it); without a pattern, the second is the last part of the path.

    A part of the path that exists as it is written belongs to the folder. On a store, only names that are hardly meant
    as a pattern are looked for: with `[`, or with a brace that is not closed.
    """
    path = local_path(path)
    if not PATTERN.search(path):
        return path.rpartition("/")[0], path.rpartition("/")[2]
    start = path.index("://") + 3 if is_remote(path) else 0
    parts = path[start:].split("/")
    for number, part in enumerate(parts):
        here = path[:start] + "/".join(parts[: number + 1])
        if PATTERN.search(part) and not _is_literal(here, part):
            return path[:start] + "/".join(parts[:number]), "/".join(parts[number:])
    return path.rstrip("/").rpartition("/")[0], ""


def _is_literal(path: str, part: str) -> bool:
    """True if the path, whose last part looks like a pattern, exists."""
    if not is_remote(path):
        return os.path.exists(path)
    return ("[" in part or part.count("{") != part.count("}")) and files.exists(path)


def _expand(path: str, folder: str, rest: str) -> list[str]:
    """URLs that a brace or shell pattern gives."""
    import braceexpand

    try:
        expansions = list(braceexpand.braceexpand(rest))
    except ValueError as error:
        raise UserError(
            f"{path} is not a valid brace pattern ({error}); an example is data/{{00000..00031}}.tar"
        ) from None
    shards: list[str] = []
    for pattern in expansions:
        if not re.search(r"[*?\[]", pattern):
            # With an empty folder, an absolute path keeps its slash.
            shards.append(join(folder, pattern) if folder or not path.startswith("/") else f"/{pattern}")
            continue
        if pattern.endswith("**"):
            pattern += f"/*{SHARD_SUFFIX}"
        if any("**" in part and part != "**" for part in pattern.split("/")):
            raise UserError(
                f"{path}: ** stands for folders of any depth, and only as a whole part of a path; write for example "
                f"{join(folder, '**/*.tar')}"
            )
        base = glob.escape(folder) + "/" if folder or path.startswith("/") else ""
        if is_remote(path):
            shards += with_retries(path, partial(_glob_remote, base + pattern, folder))
        else:
            shards += sorted(glob.glob(base + pattern, recursive=True))
    if not shards:
        raise UserError(f"no file matches {path}; correct the pattern or create the data")
    return shards


def _glob_remote(pattern: str, folder: str, store: Any) -> list[str]:
    """Matching objects, sorted; hidden names are left out unless the pattern has a part with a dot, as on a disk."""
    names = sorted(store.unstrip_protocol(name) for name in store.glob(pattern))
    if "/." in pattern:
        return names
    return [name for name in names if "/." not in name[len(folder) :]]


@dataclass
class Unread:
    """Files that a folder of tars holds and that are not read.

    compressed, unfinished, other_case: names in the folder; below: subfolder -> number of its tars
    tars: names of the tars that are read
    """

    compressed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    other_case: list[str] = field(default_factory=list)
    below: dict[str, int] = field(default_factory=dict)
    tars: list[str] = field(default_factory=list)

    def sentences(self, where: str) -> list[tuple[str, bool]]:
        """One sentence per kind: what, where, what to do; with it, True if data is probably missing."""
        beside = f"beside the {len(self.tars):,} .tar files are not read"
        found: list[tuple[str, bool]] = []
        if self.compressed:
            stems = {name.removesuffix(SHARD_SUFFIX) for name in self.tars}
            copies = all(COMPRESSED.sub("", name) in stems for name in self.compressed)
            found.append(
                (
                    f"{where}: {len(self.compressed):,} compressed tars {beside} ({listed(self.compressed)}); unpack "
                    "them to .tar, because ranges of a compressed file cannot be read",
                    not copies,
                )
            )
        if self.other_case:
            found.append(
                (
                    f"{where}: {len(self.other_case):,} files {beside} ({listed(self.other_case)}); rename them "
                    "to .tar",
                    True,
                )
            )
        if self.unfinished:
            found.append(
                (
                    f"{where}: {len(self.unfinished):,} files that a download or a copy left {beside} "
                    f"({listed(self.unfinished)}); finish it, or remove them",
                    True,
                )
            )
        if self.below:
            names = ",".join(list(self.below)[:3])
            pattern = join(where, ("{" + names + "}" if "," in names else names) + "/*.tar")
            found.append(
                (
                    f"{where}: {sum(self.below.values()):,} tars in {len(self.below):,} subfolders {beside} "
                    f"({listed(list(self.below))}); read them with a pattern such as {pattern}",
                    False,
                )
            )
        return found


def unread_files(path: str) -> Unread:
    """What a folder of tars holds beside them; nothing for a pattern or one tar, because they name what is read."""
    unread = Unread()
    path = normal(path)
    if is_pattern(path) or (path.endswith(SHARD_SUFFIX) and not os.path.isdir(path)):
        return unread
    names, folders = _entries(path)
    for name in sorted(names):
        if name.startswith("."):
            continue
        if name.endswith(SHARD_SUFFIX):
            unread.tars.append(name)
        elif COMPRESSED.search(name):
            unread.compressed.append(name)
        elif UNFINISHED.search(name):
            unread.unfinished.append(name)
        elif name.lower().endswith(SHARD_SUFFIX):
            unread.other_case.append(name)
    for folder in [name for name in sorted(folders) if name[0] not in "._"][:MAX_SUBFOLDERS]:
        with suppress(UserError, OSError):
            inside = _entries(join(path, folder))[0]
            number = sum(
                name.endswith(SHARD_SUFFIX) or COMPRESSED.search(name) is not None for name in inside
            )
            if number:
                unread.below[folder] = number
    return unread


def _entries(path: str) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the files and of the folders in a folder."""
    if is_remote(path):
        listing = with_retries(path, partial(_list_remote, path))
        names = [
            (entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in listing
        ]
    else:
        with os.scandir(path or ".") as entries:
            names = [(entry.name, entry.is_dir()) for entry in entries]
    return [name for name, is_folder in names if not is_folder and name], [
        n for n, is_folder in names if is_folder and n
    ]


def _list_remote(path: str, store: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = store.ls(path, detail=True)
    return entries
