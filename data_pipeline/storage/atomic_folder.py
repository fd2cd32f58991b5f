"""Folders that appear under their name only when complete; one writer at a time."""

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
from data_pipeline.storage.files import sync

LOCK = ".lock"
JOURNAL = ".journal"  # what a resumable writer keeps in a partial folder; goes when the folder is complete


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is whole: a name beside it that nobody else gives a file."""
    return target.with_name(f".{target.name}.dromos-partial")


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends well, and vanishes when it does not.

    Raises UserError when someone else is writing it, when `needed` bytes are not free, or when the disk refuses.
    """
    with locked_partial(out) as partial:
        try:
            clear_partial(partial)
            check_space(out, needed)
            yield partial
            publish_folder(partial, out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def locked_partial(out: Path) -> Iterator[Path]:
    """The partial folder of `out`, locked. What the disk refuses becomes a UserError."""
    partial = partial_of(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with open(partial / LOCK, "a") as lock:
            if not _locked(lock, partial):
                raise UserError(f"{out}: another process is writing it (it holds {partial / LOCK})")
            yield partial
    except ReadError:  # of an input
        raise
    except OSError as error:
        message = f"{out}: cannot be written: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            message += "; make room and run it again"
        if os.path.exists(partial):  # False, too, of a name that is too long
            message += f"; what is written so far is kept in {partial}"
        raise UserError(message) from error


def _locked(lock: TextIO, partial: Path) -> bool:
    """Whether this process alone writes the folder: it has the lock, and the lock is still the folder's."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(partial / LOCK))
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            raise
        return False


def publish_folder(partial: Path, out: Path) -> None:
    """Lock and journal go last and with the folder: nobody takes it for one that is left over, nor begins it anew."""
    os.rename(partial, out)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a kill at the very end may leave in a complete folder."""
    for name in (LOCK, JOURNAL):
        with suppress(FileNotFoundError):
            (out / name).unlink()


def clear_partial(partial: Path) -> None:
    for left in partial.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink()


def check_space(out: Path, needed: int) -> None:
    """Raises UserError where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(partial_of(out)).free
    if needed > free:
        raise UserError(f"{out}: needs {needed:,} bytes more, {free:,} are free on that disk")


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system cannot. Whole or not at all."""
    partial = partial_of(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, target)
