"""One rank as a child process that writes a log and dies with the process that started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.supervise.guard import guarded

TAIL_BYTES = 65536


@dataclass(frozen=True)
class Rank:
    """Command and environment of one rank; its output is appended to `log`."""

    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    workdir: str | None = None


class RankProcess:
    """A started rank. It has its own session, so that Ctrl-C in a terminal reaches only the launcher."""

    def __init__(self, rank: Rank) -> None:
        self.log = rank.log
        rank.log.parent.mkdir(parents=True, exist_ok=True)
        with open(rank.log, "ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start on {socket.gethostname()}\n".encode())
            log.flush()
            self.offset = log.tell()
            self.process = subprocess.Popen(
                guarded(list(rank.command)),
                cwd=rank.workdir,
                env=dict(rank.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Exit code, -N where signal N killed the rank; None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """Send a signal, if the rank still runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the rank and every process that it left in its session."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, lines: int = 30) -> str:
        """The last lines of the log since this start."""
        with open(self.log, "rb") as log:
            log.seek(self.offset)
            text = log.read()[-TAIL_BYTES:].decode(errors="replace")
        return "\n".join(text.rstrip().splitlines()[-lines:])


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port on which no process listens at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
