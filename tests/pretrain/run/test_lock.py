"""The folder lock: a second writer waits, then fails with the holder's name; a killed holder frees the lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from pretrain.run.lock import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from pretrain.run.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


LEFT = "pid 4194304 on a-node-with-a-very-long-name.of-an-earlier-job.example.org"  # by an older version


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def test_a_second_writer_fails_with_the_name_of_the_holder(tmp_path: Path) -> None:
    folder = tmp_path / "stage"  # created by the lock
    with held_elsewhere(folder) as holder:
        with pytest.raises(UserError) as refused:
            FolderLock(folder, wait=0.1)
        text = str(refused.value)
        assert str(folder) in text
        assert f"pid {holder.pid} on {socket.gethostname()}" in text
        assert "run.dir" in text

        os.kill(holder.pid, signal.SIGKILL)  # no handler runs: the kernel releases the lock
        holder.wait(timeout=10)
        FolderLock(folder, wait=0.1).release()


def test_only_the_present_holder_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(LEFT)
    lock = FolderLock(tmp_path)
    record = json.loads((tmp_path / ".lock").read_text())
    assert (record["pid"], record["host"]) == (str(os.getpid()), socket.gethostname())
    assert lock.left_by == {"text": LEFT}
    lock.release()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_second_writer_waits_for_a_holder_that_ends_in_time(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    began = time.monotonic()
    threading.Timer(0.5, first.release).start()
    second = FolderLock(tmp_path, wait=20)
    assert 0.4 < time.monotonic() - began < 10
    with pytest.raises(UserError, match=f"pid {os.getpid()} "):
        FolderLock(tmp_path, wait=0)
    second.release()
    second.release()  # twice is allowed
    FolderLock(tmp_path, wait=0).release()


def test_locks_of_different_folders_are_independent(tmp_path: Path) -> None:
    locks = [FolderLock(tmp_path / name, wait=0) for name in ("a", "b")]
    for lock in locks:
        lock.release()
