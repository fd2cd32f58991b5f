"""One writer a stage folder: rank 0 holds an advisory lock while it lives; the kernel drops it on any death."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from data_pipeline.errors import UserError

WAIT_SECONDS = 30.0


class FolderLock:
    """Holds `folder/.lock`; waits a little for a previous writer that is still going down.

    where: what names the folder, for the message of the UserError when another process has it.
    """

    def __init__(self, folder: Path, wait: float = WAIT_SECONDS, where: str = "run.dir") -> None:
        folder.mkdir(parents=True, exist_ok=True)
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
                    f"{folder}: its file system does not lock files ({error.strerror}), so a second writer could not "
                    f"be kept out; choose a {where} on one that does"
                ) from None
        self.file.seek(0)
        self.file.truncate()
        self.file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def release(self) -> None:
        if not self.file.closed:
            self.file.close()
