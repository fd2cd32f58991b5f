"""Runs a command that dies with its launcher: `python -P -m launch.supervise.guard PID SIGNAL -- COMMAND ...`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send signal `number` to this process when process `parent` is gone.

    The setting survives exec. The parent is checked afterwards: had it died before, nothing would come.
    The kernel watches the *thread* that started us, so start guarded processes from a thread that stays.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(128 + int(number))


def guarded(command: list[str], number: int = signal.SIGKILL) -> list[str]:
    """`command` wrapped so that it gets signal `number` when the calling process dies."""
    name = signal.Signals(number).name
    # -P here and wherever a module of ours is run: a launch.py in the user's folder is not ours
    return [sys.executable, "-P", "-m", "launch.supervise.guard", str(os.getpid()), name, "--", *command]


def main(arguments: list[str]) -> None:
    parent, name, dashes, *command = arguments
    if dashes != "--" or not command:
        raise SystemExit("usage: python -P -m launch.supervise.guard PID SIGNAL -- COMMAND ...")
    die_with(int(parent), signal.Signals[name])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
