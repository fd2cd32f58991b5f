"""Child processes: signals of the job do not reach them, also while Python starts, and they end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import socketpair

import pytest

from data_pipeline.child_process import JOB_SIGNALS, job_signals_blocked, start_module
from tests.support.launching import alive, wait_for

# A module that says that it runs, and ends with 7 when its channel is closed.
MODULE = """
import os, sys
channel = int(sys.argv[1])
os.write(channel, b"runs")
sys.exit(7 if os.read(channel, 1) == b"" else 8)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "waiting_child.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "waiting_child"


@pytest.mark.parametrize("number", JOB_SIGNALS)
def test_a_signal_at_any_time_does_not_end_or_disturb_a_child(
    module: str, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """At once, before Python has started in it, and while it runs: there is no handler in the child itself."""
    ours, theirs = socketpair()
    with ours:
        with theirs:
            child = start_module(module, [theirs.fileno()])
        child.send_signal(number)
        assert ours.recv(4) == b"runs"
        child.send_signal(number)
    assert child.wait(30) == 7
    assert capfd.readouterr().err == ""


def test_signals_that_were_blocked_before_stay_blocked() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        with job_signals_blocked():
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= {*JOB_SIGNALS, signal.SIGUSR2}
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


DIE = """
import os, sys, time
from data_pipeline.child_process import die_with
os.write(1, b"ready")
sys.stdin.read(1)  # by now the parent may have ended
die_with(int(sys.argv[1]), int(sys.argv[2]))
os.write(1, b"lives")
time.sleep(600)
"""


def test_a_child_whose_parent_has_ended_already_ends_at_once() -> None:
    """The kernel sends no signal for a parent that ended before the child asked for it."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    child = subprocess.Popen(
        [sys.executable, "-c", DIE, str(gone.pid), "15"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out, _ = child.communicate(b"x", timeout=60)
    assert (child.returncode, out) == (128 + 15, b"ready")


def test_a_child_gets_the_signal_it_asked_for_when_its_parent_ends() -> None:
    """A parent that is killed; the grandchild here has SIGTERM as its signal, and a handler for it."""
    grandchild = (
        "import os, signal, time, sys\n"
        "from data_pipeline.child_process import die_with\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'told'), os._exit(0)))\n"
        "die_with(os.getppid(), signal.SIGTERM)\n"
        "os.write(1, b'%d.' % os.getpid())\n"
        "time.sleep(600)\n"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = b""
    while not pid.endswith(b"."):
        pid += os.read(parent.stdout.fileno(), 1)
    parent.kill()
    parent.wait()
    assert os.read(parent.stdout.fileno(), 4) == b"told"
    wait_for(lambda: not alive(int(pid[:-1])), "the grandchild to end")
    parent.stdout.close()


def test_a_signal_that_another_thread_gets_is_handled_after_the_block() -> None:
    """Python runs its handler in the main thread, although that thread blocks the signal."""
    begin, done = threading.Event(), []

    def get_a_signal() -> None:
        begin.wait()
        signal.raise_signal(signal.SIGINT)

    other = threading.Thread(target=get_a_signal)  # started before the block, like numpy's threads
    other.start()
    before = [signal.getsignal(number) for number in JOB_SIGNALS]
    try:
        with job_signals_blocked():
            begin.set()
            other.join()
            done.append("the block")
    except KeyboardInterrupt:
        done.append("the interrupt")
    assert done == ["the block", "the interrupt"]
    assert [signal.getsignal(number) for number in JOB_SIGNALS] == before
