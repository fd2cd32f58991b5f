"""Flushes files and the names in folders to disk, so that they outlive a power failure."""

from __future__ import annotations

import os


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder and its missing parents, if it does not exist, and flush their names to disk (fsync).

    Without that, a power failure could remove the folder together with files in it that were synced.
    """
    new: list[str] = []
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        new.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(path, exist_ok=True)
    for folder in reversed(new):
        sync(os.path.dirname(folder))


def sync_tree(path: str | os.PathLike[str]) -> None:
    """Flush all files and folders below a folder, and its own entries, to disk (fsync)."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
