"""One writer per folder: a process holds an advisory lock, which the kernel releases when the process ends.

Rank 0 locks its stage's folder, a launcher or the job that it submitted locks the run folder. The lock file says who
holds the lock; it is empty after an orderly release.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import UserError
from data_pipeline.storage.durable import make_folder

WAIT_SECONDS = 30.0
LOCK = ".lock"
# A lock that a check holds for an instant, and a holder that has not written its record yet, are waited for.
GRACE_SECONDS = 1.0
Record = dict[str, str]


class FolderLock:
    """Exclusive lock on `folder/.lock`, held from construction to `release`.

    wait:  seconds to wait for a previous writer that is still shutting down.
    where: the setting that names the folder, for the error message.
    about: what the error message of a second writer says: `what` holds the lock, how to `follow` and to `stop` it;
           `job` is the id of a job that a scheduler runs.
    Raises UserError if another process holds the lock after `wait`, or if the file system has no locks.
    """

    def __init__(
        self,
        folder: Path,
        wait: float = WAIT_SECONDS,
        where: str = "run.dir",
        about: Mapping[str, str] | None = None,
    ) -> None:
        self.path = folder / LOCK
        self.created = not self.path.exists()
        self.file = _locked(folder, fcntl.LOCK_EX, wait, where)
        self.left_by = _record(self.file)  # of a writer that was killed; the kernel has released its lock
        try:
            write_record(self.file, about or {})
        except BaseException:
            self.file.close()
            raise

    def keep(self) -> None:
        """Not remove the lock file after an error: another process may have it open."""
        self.created = False

    def release(self, remove: bool = False) -> None:
        """Release the lock; safe to call twice. With `remove`, delete the lock file too."""
        if self.file.closed:
            return
        with suppress(OSError):  # a full disk: the record of this process stays
            if remove:
                self.path.unlink(missing_ok=True)
            self.file.truncate(0)
        with suppress(OSError):
            self.file.close()


def check_unlocked(folder: Path, where: str = "run.dir") -> None:
    """Raise UserError if another process holds the lock of `folder`. Creates nothing."""
    if (folder / LOCK).exists():
        _locked(folder, fcntl.LOCK_SH, GRACE_SECONDS, where).close()


def holder(folder: Path) -> str | None:
    """Who holds the lock of `folder`, in words; None if nobody does, or if this cannot be seen. Creates nothing."""
    try:
        with open(folder / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return describe_record(_record(file))
    except OSError:
        pass
    return None


def write_record(file: TextIO, about: Mapping[str, str]) -> None:
    """Say in an open lock file that this process holds the lock; `about` may name another `pid`."""
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    record = {"pid": str(os.getpid()), "host": socket.gethostname(), "started": started, "boot": boot_id()}
    file.seek(0)
    file.truncate()
    file.write(json.dumps(record | dict(about)))
    file.flush()


def lock_descriptor(descriptor: int, folder: Path, about: Mapping[str, str], wait: float) -> None:
    """Lock a descriptor that this process inherited, for as long as a process has it open. Raises UserError.

    A shell opens `folder/.lock` and has it locked by a child; the lock stays when the child ends.
    """
    with open(descriptor, "r+", closefd=False) as file:
        _wait_for(file, fcntl.LOCK_EX, folder, time.monotonic() + wait, "run.dir")
        write_record(file, about)


def boot_id() -> str:
    """An id that changes when the machine starts again; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _locked(folder: Path, operation: int, wait: float, where: str) -> TextIO:
    """The lock file, opened and locked. LOCK_EX creates it, and its folder."""
    deadline = time.monotonic() + wait
    while True:
        if operation == fcntl.LOCK_EX:
            make_folder(folder)
        # Read only for a check: the folder may belong to another user.
        file = open(folder / LOCK, "a+" if operation == fcntl.LOCK_EX else "r")  # noqa: SIM115
        try:
            _wait_for(file, operation, folder, deadline, where)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        except FileNotFoundError:
            if operation == fcntl.LOCK_SH:
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # another process has deleted this file while it held the lock


def _wait_for(file: TextIO, operation: int, folder: Path, deadline: float, where: str) -> None:
    """Take the lock of an open file; UserError when another process holds it after `deadline`."""
    named_by = max(deadline, time.monotonic() + GRACE_SECONDS)
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            now = time.monotonic()
            record = _record(file)
            if now > deadline and (record or now > named_by):
                raise UserError(f"{folder} is being written by {_holder(record, folder, where)}") from None
            time.sleep(0.05)
        except OSError as error:
            raise UserError(
                f"{folder}: the file system does not support file locks ({error.strerror}), so two writers could "
                f"damage the folder; choose a {where} on a file system that does"
            ) from None


def _record(file: TextIO) -> Record:
    """What the holder wrote into the lock file; empty if it wrote nothing that can be read."""
    try:
        file.seek(0)
        text = file.read()
    except (OSError, ValueError):
        return {}
    try:
        content = json.loads(text)
    except ValueError:
        return {"text": text.strip()} if text.strip() else {}  # of an older version
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def describe_record(record: Record) -> str:
    """`dromos run, pid 12 on node3 since 2026-01-02 03:04:05 UTC`."""
    if "pid" not in record:
        return record.get("text", "an unknown process")
    place = f"pid {record['pid']} on {record.get('host')} since {record.get('started')}"
    return f"{record['what']}, {place}" if record.get("what") else place


def _holder(record: Record, folder: Path, where: str) -> str:
    """The end of the error message: who holds the lock, and what to do."""
    lines = [f"{describe_record(record)}."]
    if stale := _stale(record, folder):
        lines.append(stale)
    if record.get("follow"):
        lines.append(f"Follow it with: {record['follow']}.")
    stop = f"stop it with: {record['stop']}" if record.get("stop") else "stop it"
    lines.append(f"Wait for it, {stop}, or choose another {where}.")
    return " ".join(lines)


def _stale(record: Record, folder: Path) -> str | None:
    """What to do if the process in the record is gone, although the lock is held; None if it runs."""
    if "pid" not in record:
        return f"If no process writes there, delete {folder / LOCK}."
    if record.get("host") != socket.gethostname():
        return f"If that machine is gone for good, delete {folder / LOCK}."
    if record.get("boot") != boot_id():
        return f"That machine has started again since: delete {folder / LOCK}."
    try:
        os.kill(int(record["pid"]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return (
            f"It has ended, but a process that it started holds the lock: fuser -v {folder / LOCK} names it."
        )
    except PermissionError:
        pass
    return None
