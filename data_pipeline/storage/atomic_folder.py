"""Folders that appear under their name only when complete; one writer at a time.

A writer fills a hidden partial folder beside the target, under an flock, and renames it to the target at the end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import ReadError, UserError
from data_pipeline.storage.durable import make_folder, sync, sync_tree

LOCK = ".lock"
JOURNAL = ".journal"  # state of a resumable writer in its partial folder; removed when the folder is complete


def partial_of(target: Path) -> Path:
    """Path where `target` is written until it is complete: a hidden name beside it, reserved for this purpose."""
    return target.with_name(f".{target.name}.dromos-partial")


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """Yield an empty folder that is synced and renamed to `out` on success, and removed on failure.

    Raises UserError if another process writes `out`, if fewer than `needed` bytes are free, or if a write fails.
    """
    with locked_partial(out) as partial:
        try:
            clear_partial(partial)
            check_space(out, needed)
            yield partial
            sync_tree(partial)
            publish_folder(partial, out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def locked_partial(out: Path) -> Iterator[Path]:
    """Create and lock the partial folder of `out`. Write errors become UserErrors; ReadErrors pass through."""
    partial = partial_of(out)
    try:
        make_folder(partial)
        with open(partial / LOCK, "a") as lock:
            if not _try_lock(lock, partial):
                raise UserError(f"{out}: another process is writing it (it holds {partial / LOCK})")
            yield partial
    except ReadError:  # reading an input failed, not writing the output
        raise
    except OSError as error:
        message = f"{out}: cannot be written: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            message += "; make room and run it again"
        # Not Path.exists, which raises for a name that is too long; os.path.exists returns False.
        if os.path.exists(partial):
            message += f"; the files written so far are kept in {partial}"
        raise UserError(message) from error


def _try_lock(lock: TextIO, partial: Path) -> bool:
    """Take the lock without waiting; False if another process holds it or has replaced the lock file."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(partial / LOCK))
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            raise
        return False


def publish_folder(partial: Path, out: Path) -> None:
    """Rename the partial folder to `out`, then remove its lock and journal.

    They move with the folder and are removed last, so that no other process takes the folder for an abandoned partial
    folder or starts to fill it again.
    """
    os.rename(partial, out)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove the lock and the journal from a complete folder; a kill after the rename leaves them there."""
    for name in (LOCK, JOURNAL):
        with suppress(FileNotFoundError):
            (out / name).unlink()


def clear_partial(partial: Path) -> None:
    """Remove everything in a partial folder except the lock."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def check_space(out: Path, needed: int) -> None:
    """Raise UserError if fewer than `needed` bytes are free on the disk of `out`."""
    free = shutil.disk_usage(partial_of(out)).free
    if needed > free:
        raise UserError(f"{out}: needs {needed:,} bytes more, but only {free:,} are free on that disk")


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` as `target`, or copy it where the file system has no hard links. Atomic."""
    partial = partial_of(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, target)
