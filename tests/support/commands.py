"""Starts `dromos` commands by forking a server that has imported the command line, the merge and numpy.

In a new process these imports take 0.7 seconds of processor time. The server imports neither torch nor
huggingface_hub, which reads its environment variables when it is imported.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(["tests.support.commands_preload"])


class Command:
    """A forked process with the methods of subprocess.Popen that the tests use; its output goes to files."""

    def __init__(
        self, module: str, function: str, arguments: Sequence[Any], cwd: Path, env: Mapping[str, str]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        for path in (self._out, self._err):
            path.touch()
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_call,
            args=(module, function, tuple(arguments), str(cwd), dict(env), str(self._out), str(self._err)),
            daemon=True,
        )
        # PYTHONPATH is for the server, which the first process starts and which ignores a failed preload.
        with (
            mock.patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process),
            mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)),
        ):
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """The exit code; -N if signal N ended the process. Kills the process and fails after `timeout` seconds."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            out, err = self._out.read_text(), self._err.read_text()
            raise AssertionError(f"still running after {timeout} s:\n{out}\n{err}")
        return code

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; return standard output and standard error."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def start(*words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Command:
    """Start `dromos WORDS`."""
    return Command(
        "tests.support.commands", "dromos", words, cwd or Path.cwd(), os.environ if env is None else env
    )


def run(
    *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `dromos WORDS` to its end."""
    command = start(*words, cwd=cwd, env=env)
    out, err = command.communicate()
    return subprocess.CompletedProcess(words, command.wait(), out, err)


def dromos(*words: str) -> None:
    from launch.cli import main

    sys.argv = ["dromos", *words]
    main()


def _call(
    module: str, function: str, arguments: tuple[Any, ...], cwd: str, env: dict[str, str], out: str, err: str
) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    if "coverage" in sys.modules:
        from tests.mutants.coverage_plugin import enter_context

        enter_context()
    os.chdir(cwd)
    sys.exit(getattr(importlib.import_module(module), function)(*arguments))
