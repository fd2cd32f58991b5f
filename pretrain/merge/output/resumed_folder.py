"""Folders that appear under their name only when they are complete, each written by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.errors import ReadError, UserError
from data_pipeline.storage.files import sync
from pretrain.merge.output.journal import NAME, Journal

LOCK = ".lock"


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is whole: a name beside it that nobody else gives a file."""
    return target.with_name(f".{target.name}.dromos-partial")


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends well, and vanishes when it does not.

    Raises UserError when someone else is writing it, when `needed` bytes are not free, or when the disk refuses.
    """
    with _writing(out) as partial:
        try:
            _clear(partial)
            check_space(out, needed)
            yield partial
            _publish(partial, out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def resumed_folder(
    out: Path, head: dict[str, Any], needed: int, durable: bool = False, anew: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """A folder to fill, as `new_folder`, with a journal: what was begun for the same `head` is found again.

    When the block fails, the folder is kept for the next time if anything in it is finished. Raises UserError also for
    what was begun for another head, unless it is to begin `anew`. `durable`: before it appears the disk has the
    weights too, and not only the small files beside them.
    """
    with _writing(out) as partial:
        if not (partial / NAME).exists():
            _clear(partial)
        journal = Journal(partial, head)
        try:
            if journal.begun != head:
                if not anew:
                    raise UserError(_other(out, partial, journal.begun, head))
                journal.close()
                _clear(partial)
                journal = Journal(partial, head)
            check_space(out, needed - _reserved(partial))
            yield partial, journal
            for file in partial.iterdir():
                if durable or file.suffix != ".safetensors":
                    sync(file)
            if durable:
                sync(partial)
            _publish(partial, out)
            if durable:
                sync(out.parent)
        except BaseException:
            if not journal.done and journal.begun == head:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            journal.close()


def _other(out: Path, partial: Path, begun: dict[str, Any], head: dict[str, Any]) -> str:
    before, now = begun.get("inputs", {}), head.get("inputs", {})
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if begun.get("jobs") == head.get("jobs") and changed:
        return (
            f"{out}: an unfinished merge lies in {partial}, and {', '.join(changed)} changed since it began; "
            "put back what was there, or delete that folder to begin anew"
        )
    return (
        f"{out}: an unfinished merge of another plan lies in {partial}; finish it with the command that began it, or "
        "delete that folder to begin anew"
    )


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
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


def _publish(partial: Path, out: Path) -> None:
    """Lock and journal go last and with the folder: nobody takes it for one that is left over, nor begins it anew."""
    os.rename(partial, out)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a kill at the very end may leave in a complete folder."""
    for name in (LOCK, NAME):
        with suppress(FileNotFoundError):
            (out / name).unlink()


def _clear(partial: Path) -> None:
    for left in partial.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink()


def _reserved(partial: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in partial.glob("*.safetensors"))


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
