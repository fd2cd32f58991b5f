"""Child processes that end with their parent, for workers, prefetchers, ranks and index processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

PR_SET_PDEATHSIG = 1
# Ctrl-C and Slurm's warning signal reach every process of a job; only its main process decides what to do.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def job_signals_blocked() -> Iterator[None]:
    """Block JOB_SIGNALS in this thread. A process started in the block never gets them, not even while it starts.

    In the main thread their handlers run after the block: the system may give a signal to another thread (of numpy's
    pool), and Python would run its handler here, in the middle of a start. The new process would then wait for the rest
    of what it is told, and die of an EOFError.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        with _handlers_postponed():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handlers_postponed() -> Iterator[None]:
    """Run the Python handlers of JOB_SIGNALS that come in the block at its end. No effect outside the main thread."""
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in JOB_SIGNALS}
    try:
        with ExitStack() as stack:  # restores all, even if a handler that is restored first raises
            for number, handler in handlers.items():
                if callable(handler):
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, lambda number, frame: came.append(number))
            yield
    finally:  # also if the process could not be started
        for each in came:
            handler = handlers[signal.Signals(each)]
            if callable(handler):
                handler(each, None)


def start_module(
    module: str,
    descriptors: Sequence[int],
    variables: Mapping[str, str] | None = None,
    folders: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE DESCRIPTORS... PARENT`; PARENT, this process's id, is for `die_with` in the child.

    The child inherits these file descriptors (not those below 0, which mean "none"), reads nothing from stdin, imports
    the same dromos as this process, and gets the environment `variables` in addition. It finds modules in `folders`,
    too, behind all others. JOB_SIGNALS do not reach it.
    """
    import subprocess

    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH"), *folders) if part)
    with job_signals_blocked():
        return subprocess.Popen(
            # -P: a file in the working directory cannot shadow a module.
            [sys.executable, "-P", "-m", module, *map(str, descriptors), str(os.getpid())],
            pass_fds=[descriptor for descriptor in descriptors if descriptor >= 0],
            stdin=subprocess.DEVNULL,
            env=os.environ | dict(variables or {}) | {"PYTHONPATH": path},
        )


def die_with(parent: int, signal_number: int = signal.SIGKILL) -> None:
    """Make the kernel send `signal_number` to this process when process `parent` ends. The setting survives exec.

    PR_SET_PDEATHSIG watches the thread that started this process, not the whole parent: start such processes from a
    thread that lives as long as the parent. Exits at once, with 128 + `signal_number`, if the parent has ended already.
    Outside Linux only that check is made. Raises OSError if the kernel refuses the signal number.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # Checked after prctl: the kernel sends nothing for a parent that ended before.
    if os.getppid() != parent:
        os._exit(128 + int(signal_number))


def exit_with_multiprocessing_parent() -> None:
    """Start a thread that ends this process, a child of multiprocessing, when its parent ends.

    Unlike `die_with` it works when any thread of the parent started the process, as an executor does, and on every
    system.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None:
        return
    join = parent.join

    def wait() -> None:
        join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
