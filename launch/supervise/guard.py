"""Runs a command and sends it a signal (default SIGKILL) when the launcher ends.

python -P -m launch.supervise.guard PID SIGNAL -- COMMAND ...
"""

from __future__ import annotations

import os
import signal
import sys

from data_pipeline.child_process import die_with


def guarded(command: list[str], signal_number: int = signal.SIGKILL) -> list[str]:
    """`command`, wrapped so that it receives `signal_number` when the calling process ends."""
    name = signal.Signals(signal_number).name
    # -P, as wherever a module of this project is run: a file launch.py in the user's folder must not shadow it.
    return [sys.executable, "-P", "-m", "launch.supervise.guard", str(os.getpid()), name, "--", *command]


def main(arguments: list[str]) -> None:
    parent, name, dashes, *command = arguments
    if dashes != "--" or not command:
        raise SystemExit("usage: python -P -m launch.supervise.guard PID SIGNAL -- COMMAND ...")
    die_with(int(parent), signal.Signals[name])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
