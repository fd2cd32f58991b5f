"""Removes the files that killed processes and earlier boots left in a cache folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress

from data_pipeline.storage.files import TEMPORARY

UNFINISHED_MAX_AGE = 3600.0  # seconds after which an unfinished file that no process has locked is removed
OFFSETS_MAX_AGE = 30 * 86400.0  # seconds after their last use, after which the offsets of a tar are removed
UNFINISHED_SUFFIX = ".part"
WARMING_PREFIX = "warming-"
RANGES_PREFIX = "ranges-"
OFFSETS_PREFIX = "offsets-"


def remove_leftovers(folder: str, ranges_folder: str) -> None:
    """Remove abandoned files from a cache `folder`; `ranges_folder` holds the ranges of the current boot."""
    for path in subfolders(folder):
        if os.path.basename(path).startswith(RANGES_PREFIX) and path != ranges_folder:
            _remove_unlocked_folder(path)
    now = time.time()
    for parent in [folder, *subfolders(ranges_folder)]:
        with suppress(FileNotFoundError), os.scandir(parent) as entries:
            for entry in entries:
                max_age = _max_age(entry.name)
                if max_age is not None and entry.stat().st_mtime < now - max_age:
                    _remove_unlocked(entry.path)


def subfolders(folder: str) -> list[str]:
    """Paths of the folders directly in `folder`, without symbolic links."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _max_age(name: str) -> float | None:
    """Seconds after its last use when a file is removed; None for a whole range, which only eviction removes."""
    if name.startswith(OFFSETS_PREFIX):
        return OFFSETS_MAX_AGE
    abandoned = name.endswith((UNFINISHED_SUFFIX, TEMPORARY)) or name.startswith(WARMING_PREFIX)
    return UNFINISHED_MAX_AGE if abandoned else None


def _remove_unlocked(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)


def _remove_unlocked_folder(path: str) -> None:
    """Remove the ranges of an earlier boot. A machine that shares the disk keeps a lock on its own folder."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
