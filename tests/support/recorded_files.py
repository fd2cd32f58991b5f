"""Records what a block writes, syncs, renames and deletes below a folder, and gives every state a power cut may leave.

The model is the weakest that POSIX allows: what was not synced may be there, missing, or half there, in any order.
- Bytes of a file are safe after an fsync of the file. Before it, the file may have its new bytes, half of them, or
  those of the last fsync (none for a new file).
- A name (create, link, rename, delete) is safe after an fsync of its folder. Before it, any subset of the changes of
  names may have reached the disk. One rename is never half done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

Entry = tuple[int, str]  # id of a folder, name in it
Change = dict[
    Entry, int | None
]  # entry -> id of a file or folder; None: deleted. Reaches the disk as a whole
ALL_SUBSETS = 4  # with more unsynced changes, only some subsets of them are tried
ROOT = 0


@dataclass(frozen=True)
class Outcome:
    """A state of the folder after a power cut.

    after:    the last call before the cut, for messages
    promised: what the block had promised by then, see `Disk.promise`
    kill:     everything has reached the disk, so a kill of the process leaves the same
    files:    path below the folder -> bytes; None for a folder
    """

    after: str
    promised: tuple[str, ...]
    kill: bool
    files: dict[str, bytes | None]

    def write(self, folder: Path) -> None:
        """Bring `folder`, which may hold another state, into this one."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.rglob("*"), reverse=True):
            wanted = self.files.get(str(path.relative_to(folder)), path)
            if wanted is path or (wanted is None) != path.is_dir():
                path.rmdir() if path.is_dir() else path.unlink()
        for name, content in self.files.items():
            path = folder / name
            if content is None:
                path.mkdir(exist_ok=True)
            elif not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


@dataclass(frozen=True)
class _Cut:
    after: str
    promised: tuple[str, ...]
    safe: dict[Entry, int]
    pending: list[Change]
    files: dict[int, tuple[bytes, bytes]]  # id -> (bytes now, bytes that are safe)
    in_place: set[int]


class Disk:
    """The recorded folder. Writes are found by comparing the folder with what it was at the previous call.

    in_place: names of files that the block overwrites without cutting them first; of such a file a cut damages only
              what lies behind the first byte that was changed
    """

    def __init__(self, root: Path, in_place: Collection[str] = ()) -> None:
        self._root = os.path.realpath(root)
        self._ids = {os.stat(root).st_ino: ROOT}
        self._live: dict[Entry, int] = {}
        self._safe: dict[Entry, int] = {}
        self._pending: list[Change] = []
        self._files: dict[int, tuple[bytes, bytes]] = {}
        self._promised: list[str] = []
        self._cuts: list[_Cut] = []
        self._next_id = 1
        self._in_place = in_place
        self._scan()
        self._safe, self._pending = dict(self._live), []
        self._files = {number: (content, content) for number, (content, _) in self._files.items()}

    def promise(self, text: str) -> None:
        """Note that from here on the block has promised something; it is in `Outcome.promised` of later cuts."""
        self._promised.append(text)
        self._cut(f"promise of {text}")

    def outcomes(self) -> Iterator[Outcome]:
        """Every different state after a cut at any point of the block."""
        seen: set[Any] = set()
        for cut in self._cuts:
            for changes in _subsets(cut.pending):
                entries = dict(cut.safe)
                for change in changes:
                    _apply(entries, change)
                for number, contents in enumerate(_contents(cut.files, cut.in_place)):
                    tree = dict(_tree(entries, contents, ROOT, ""))
                    key = (cut.promised, tuple(tree.items()))
                    if key not in seen:
                        seen.add(key)
                        kill = number == 0 and len(changes) == len(cut.pending)
                        yield Outcome(cut.after, cut.promised, kill, tree)

    def _cut(self, after: str) -> None:
        self._scan()
        state = (dict(self._safe), list(self._pending), dict(self._files))
        in_place = {number for (_, name), number in self._live.items() if name in self._in_place}
        self._cuts.append(_Cut(after, tuple(self._promised), *state, in_place))

    def _change(self, change: Change) -> None:
        _apply(self._live, change)
        self._pending.append(change)

    def _scan(self) -> None:
        """Record what changed without a recorded call: new files and folders, and written bytes."""
        found: dict[Entry, int] = {}
        self._scan_folder(self._root, ROOT, found)
        for entry in self._live.keys() - found.keys():
            self._change({entry: None})
        for entry, number in found.items():
            if self._live.get(entry) != number:
                self._change({entry: number})

    def _scan_folder(self, path: str, folder: int, found: dict[Entry, int]) -> None:
        for item in sorted(os.scandir(path), key=lambda item: item.name):
            number = self._ids.get(item.inode())
            if number is None:
                number = self._ids[item.inode()] = self._next_id
                self._next_id += 1
            found[folder, item.name] = number
            if item.is_dir(follow_symlinks=False):
                self._scan_folder(item.path, number, found)
            else:
                content = Path(item.path).read_bytes()
                self._files[number] = (content, self._files.get(number, (b"", b""))[1])

    def _entry(self, path: Any, folder: int | None) -> Entry | None:
        """The entry of a path, relative to the folder with that descriptor; None outside the recorded folder."""
        base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        parent, name = os.path.split(os.path.join(base, os.fspath(path)))
        number = self._ids.get(os.stat(parent).st_ino)
        inside = os.path.realpath(parent).startswith(self._root)
        return (number, name) if number is not None and inside else None

    def _forget(self, number: int | None) -> None:
        """The kernel may give the inode number of a deleted file to a new one."""
        if number is not None and number not in self._live.values():
            self._ids = {inode: known for inode, known in self._ids.items() if known != number}

    def _moving(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """A recorded rename, replace, link, unlink or rmdir."""

        def call(path: Any, target: Any = None, **options: Any) -> Any:
            given = (path,) if target is None else (path, target)
            self._scan()
            source = self._entry(path, options.get("dir_fd", options.get("src_dir_fd")))
            destination = None if target is None else self._entry(target, options.get("dst_dir_fd"))
            if source is None or source not in self._live:
                return real(*given, **options)  # what it changes here is found by the next scan
            text = f"{name}({', '.join(os.path.basename(os.fspath(each)) for each in given)})"
            self._cut(f"before {text}")
            moved = self._live[source]
            lost = moved if destination is None else self._live.get(destination)
            result = real(*given, **options)
            change: Change = {} if name == "link" else {source: None}
            if destination is not None:
                change[destination] = moved
            self._change(change)
            self._forget(lost)
            self._cut(text)
            return result

        return call

    def _syncing(self) -> Callable[[int], None]:
        """A recorded fsync; it does not wait for the real disk."""

        def fsync(descriptor: int) -> None:
            self._scan()
            number = self._ids.get(os.fstat(descriptor).st_ino)
            name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._cut(f"before fsync({name})")
            if number in self._files:
                content = self._files[number][0]
                self._files[number] = (content, content)
            for change in list(self._pending):
                if any(folder == number for folder, _ in change):
                    _apply(self._safe, change)
                    self._pending.remove(change)
            self._cut(f"fsync({name})")

        return fsync


@contextmanager
def recorded(root: Path, in_place: Collection[str] = ()) -> Iterator[Disk]:
    """Record the changes below `root`, an existing folder whose content is safe, made by the block. See `Disk`."""
    disk = Disk(root, in_place)
    with ExitStack() as stack:
        for name in ("rename", "replace", "link", "unlink", "remove", "rmdir"):
            stack.enter_context(mock.patch.object(os, name, disk._moving(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(os, "fsync", disk._syncing()))
        yield disk
    disk._cut("the end")


def _apply(entries: Any, change: Change) -> None:
    for entry, number in change.items():
        if number is None:
            entries.pop(entry, None)
        else:
            entries[entry] = number


def _subsets(pending: list[Change]) -> Iterator[list[Change]]:
    """Subsets of unsynced changes, in order: all of them if they are few; else each beginning, each one missing, each
    one alone.
    """
    count = len(pending)
    if count <= ALL_SUBSETS:
        for size in range(count, -1, -1):
            yield from map(list, combinations(pending, size))
        return
    for number in range(count, -1, -1):
        yield pending[:number]
        yield pending[number:]
        yield pending[:number] + pending[number + 1 :]
        yield pending[number : number + 1]


def _contents(
    files: dict[int, tuple[bytes, bytes]], in_place: Collection[int] = ()
) -> Iterator[dict[int, bytes]]:
    """Bytes of all files: of the unsynced ones all new, all old, all torn, or one of them old or torn."""
    now = {number: content for number, (content, _) in files.items()}
    old = {number: safe for number, (content, safe) in files.items() if content != safe}
    torn = {number: _torn(now[number], safe, number in in_place) for number, safe in old.items()}
    yield now
    for lost in (old, torn):
        yield now | lost
        if len(old) > 1:
            for number, content in lost.items():
                yield now | {number: content}


def _torn(content: bytes, safe: bytes, in_place: bool = False) -> bytes:
    """Half of the new bytes; an append does not touch the safe ones before it."""
    pairs = enumerate(zip(content, safe, strict=False))
    same = next((at for at, (new, old) in pairs if new != old), min(len(content), len(safe)))
    kept = same if in_place or same == len(safe) else 0
    return content[: kept + (len(content) - kept) // 2]


def _tree(
    entries: dict[Entry, int], contents: dict[int, bytes], folder: int, path: str
) -> Iterator[tuple[str, bytes | None]]:
    for (parent, name), number in sorted(entries.items()):
        if parent == folder:
            yield path + name, contents.get(number)
            if number not in contents:
                yield from _tree(entries, contents, number, f"{path}{name}/")
