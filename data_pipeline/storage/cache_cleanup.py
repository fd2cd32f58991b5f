"""What killed processes and earlier boots left in the folder of a cache, and how it is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress

from data_pipeline.storage.files import TEMPORARY

STALE = 3600.0  # seconds after which an unfinished file that nobody holds is removed
UNUSED = 30 * 86400.0  # seconds after which the places of a tar's samples that nobody asked for are removed
UNFINISHED = ".part"
WARMING = "warming-"
RANGES = "ranges-"
LOCATED = "offsets-"


def remove_leftovers(folder: str, ranges: str) -> None:
    """Remove from the `folder` of a cache what nobody will use or finish; the ranges of this boot lie in `ranges`."""
    for path in folders(folder):
        if os.path.basename(path).startswith(RANGES) and path != ranges:
            _remove_unheld_folder(path)
    now = time.time()
    for place in [folder, *folders(ranges)]:
        with suppress(FileNotFoundError), os.scandir(place) as entries:
            for entry in entries:
                kept = _seconds_kept(entry.name)
                if kept is not None and entry.stat().st_mtime < now - kept:
                    _remove_unheld(entry.path)


def folders(folder: str) -> list[str]:
    """Paths of the folders in a folder; links are none."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _seconds_kept(name: str) -> float | None:
    """How long a file lives after its last use; None for what only eviction removes."""
    if name.startswith(LOCATED):
        return UNUSED
    left = name.endswith((UNFINISHED, TEMPORARY)) or name.startswith(WARMING)
    return STALE if left else None


def _remove_unheld(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)


def _remove_unheld_folder(path: str) -> None:
    """Of an earlier boot; that of another machine, which shares the disk, is held."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
