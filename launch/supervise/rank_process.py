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

from data_pipeline.storage.durable import write_errors
from launch.supervise.guard import guarded
from pretrain.run.failures import LAST_WORDS

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
        self.last_words = ""
        rank.log.parent.mkdir(parents=True, exist_ok=True)
        self.words, words = os.pipe()  # for the rank's last message, if its log cannot be written
        os.set_blocking(self.words, False)
        try:
            self.process = self._start(rank, words)
        except BaseException:
            os.close(self.words)
            raise
        finally:
            os.close(words)

    def _start(self, rank: Rank, words: int) -> subprocess.Popen[bytes]:
        start = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start on {socket.gethostname()}\n"
        with open(rank.log, "ab", buffering=0) as log:
            with write_errors(rank.log):
                log.write(start.encode())
            self.offset = log.tell()
            return subprocess.Popen(
                guarded(list(rank.command)),
                cwd=rank.workdir,
                env={**rank.env, LAST_WORDS: str(words)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[words],
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
        if self.words >= 0:
            with suppress(BlockingIOError):
                self.last_words = os.read(self.words, TAIL_BYTES).decode(errors="replace")
            os.close(self.words)
            self.words = -1

    def tail(self, lines: int = 30) -> str:
        """The last lines of the log since this start, and the rank's last message if the log lacks it.

        Call it after `kill`.
        """
        text = ""
        with suppress(OSError), open(self.log, "rb") as log:
            log.seek(self.offset)
            text = log.read()[-TAIL_BYTES:].decode(errors="replace")
        missing = [line for line in self.last_words.splitlines() if line not in text]
        return "\n".join([*text.rstrip().splitlines()[-lines:], *missing])


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port on which no process listens at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
