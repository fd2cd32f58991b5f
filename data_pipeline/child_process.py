"""Child processes that die with their parent (PR_SET_PDEATHSIG), for workers, prefetchers and ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int, signal_number: int = signal.SIGKILL) -> None:
    """Make the kernel send `signal_number` to this process when process `parent` ends. The setting survives exec.

    The kernel watches the thread that started this process, not the whole parent: start such processes from a thread
    that lives as long as its process. Exits at once, with 128 + `signal_number`, if the parent has ended already.
    Outside Linux only that check is made. Raises OSError if the kernel refuses the signal number.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # Checked after prctl: the kernel sends nothing for a parent that ended before.
    if os.getppid() != parent:
        os._exit(128 + int(signal_number))
