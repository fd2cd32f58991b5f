"""Measures commands from outside: wall time, CPU time and peak anonymous memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
MEGABYTE = 1e6


@dataclass(frozen=True)
class Spent:
    """Figures of a command: seconds, CPU seconds, peak anonymous memory in bytes, and its output."""

    wall: float
    cpu: float
    peak: int
    printed: str


def dromos() -> list[str]:
    return [str(Path(sys.executable).with_name("dromos"))]


def fresh(out: Path, measure: Callable[[Path], Result]) -> Result:
    """`measure(out)` with an `out` that does not exist before and is deleted after; flushes dirty pages first."""
    os.sync()
    try:
        return measure(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def warm(models: Sequence[Path]) -> None:
    """Read every file once, so that the page cache has it for all contenders."""
    buffer = bytearray(1 << 22)
    for path in (file for model in models for file in model.glob("*.safetensors")):
        with open(path, "rb", 0) as file:
            while file.readinto(buffer):
                pass


def watch(command: Sequence[str]) -> Spent:
    """Run a command to its end. Raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=said)
        peak = 0
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        printed.seek(0)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: {said.read().decode()[-2000:]}")
        usage = ended[2]
        return Spent(wall, usage.ru_utime + usage.ru_stime, peak, printed.read().decode())


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes; 0 if it just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:")), 0)
