"""A small file system for a test, full when the test says so; where mounts are not allowed, a limit on file sizes."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from pathlib import Path

CLONE_NEWNS = 0x00020000
LIMIT_BYTES = 150_000  # below the size of a checkpoint file of tests/support/tiny.py


class SmallDisk:
    """`with SmallDisk(folder, size) as disk`: a tmpfs at `folder` that processes see after `enter`.

    It is in a mount namespace that a sleeping process keeps. `pid` is 0 without `mount`, and where the system allows no
    mounts: then `enter` limits the size of files instead, while `full` exists.
    """

    def __init__(self, folder: Path, size: int, mount: bool = True) -> None:
        folder.mkdir()
        self.folder, self.full = folder, folder.with_name(folder.name + ".full")
        tmpfs = f'mount -t tmpfs -o size={size} tmpfs "$0" && echo ok && exec sleep 1000'
        self.keeper = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", tmpfs if mount else "true", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.keeper.stdout is not None
        self.pid = self.keeper.pid if self.keeper.stdout.readline() == "ok\n" else 0
        # The same files for this process, which does not enter.
        self.seen = Path(f"/proc/{self.pid}/root{folder}") if self.pid else folder

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.keeper.kill()
        self.keeper.communicate()

    def fill(self, free: int) -> None:
        """Leave `free` bytes."""
        self.full.touch()
        if self.pid:
            status = os.statvfs(self.seen)
            (self.seen / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - free))

    def make_room(self) -> None:
        self.full.unlink()
        (self.seen / "filler").unlink(missing_ok=True)


def enter(pid: int, full: str) -> None:
    """See the disk of the namespace of process `pid`. Call it before a thread is started."""
    if pid:
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(namespace)
    elif Path(full).exists():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))
