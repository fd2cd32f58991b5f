"""One writer per stage folder: rank 0 holds an advisory lock, which the kernel releases when the process ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.storage.durable import make_folder

WAIT_SECONDS = 30.0


class FolderLock:
    """Exclusive lock on `folder/.lock`, held from construction to `release`.

    wait:  seconds to wait for a previous writer that is still shutting down.
    where: the setting that names the folder, for the error message.
    Raises UserError if another process holds the lock after `wait`, or if the file system has no locks.
    """

    def __init__(self, folder: Path, wait: float = WAIT_SECONDS, where: str = "run.dir") -> None:
        make_folder(folder)
        self.file = open(folder / ".lock", "a+")  # noqa: SIM115  (held until release)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.file.seek(0)
                    holder = self.file.read().strip() or "an unknown process"
                    self.file.close()
                    raise UserError(
                        f"{folder} is being written by {holder}. Wait for it, stop it, or choose another {where}."
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                self.file.close()
                raise UserError(
                    f"{folder}: the file system does not support file locks ({error.strerror}), so two writers could "
                    f"damage the folder; choose a {where} on a file system that does"
                ) from None
        self.file.seek(0)
        self.file.truncate()
        self.file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def release(self) -> None:
        """Release the lock; safe to call twice."""
        if not self.file.closed:
            self.file.close()
