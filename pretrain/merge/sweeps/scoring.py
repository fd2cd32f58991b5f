"""Runs a person's command on a checkpoint folder and reads the figures that it prints last."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

SHELL = ("|", "||", "&&", "&", ";", ">", ">>", "<", "2>", "2>&1", "&>")
PLACE = "{}"
SCORE = "score"
TAIL = 1 << 20  # bytes of the output in which its last line is looked for
OBJECT = 2000  # lines that an object at the end may have
FALLING = re.compile(r"(?i)(^|[._-])(nll|ppl|fid|wer|cer)([._-]|$)|loss|perplexity|error")
Figures = dict[str, float | None]
"""name -> number; None where what was printed is not finite"""


@dataclass(frozen=True)
class Command:
    """A command that scores a checkpoint folder, which stands in it as `{}`.

    words:   as a shell would split them; no shell runs.
    flag:    where it was given, for messages.
    seconds: after these it is stopped; None: never.
    wrapped: makes of the words those that are executed (see launch.supervise.guard).
    """

    words: tuple[str, ...]
    flag: str
    seconds: float | None = None
    wrapped: Callable[[list[str]], list[str]] = list

    def on(self, folder: Path) -> list[str]:
        """The words for one folder, whose path stays one argument whatever is in it."""
        return [word.replace(PLACE, str(folder)) for word in self.words]


def parse_command(
    text: str,
    flag: str,
    seconds: float | None = None,
    wrapped: Callable[[list[str]], list[str]] = list,
) -> Command:
    """Raises UserError for a command without `{}`, with open quotes, or whose program is not there."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text}: {error}") from None
    if not any(PLACE in word for word in words):
        raise UserError(f"{flag} {text!r}: write {PLACE} where the checkpoint folder belongs")
    if signs := [word for word in words if word in SHELL]:
        raise UserError(
            f"{flag} {text!r}: no shell runs that knows {signs[0]}; write sh -c '... {PLACE} ...'"
        )
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{flag}: {words[0]}: no such program (no shell runs: write its path, or sh -c '...')"
        )
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"--timeout {seconds:g}: seconds, above 0")
    return Command(tuple(words), flag, seconds, wrapped)


def score(command: Command, folder: Path, log: Path) -> Figures:
    """Run the command on `folder`; the figures of its last line, or of the JSON object that ends its output.

    log: without suffix; standard output goes to LOG.out, standard error to LOG.err, from the start each time.
    Raises UserError naming the log when the command fails, takes too long, or prints no figure.
    """
    out, err = log.with_name(f"{log.name}.out"), log.with_name(f"{log.name}.err")
    log.parent.mkdir(parents=True, exist_ok=True)
    words = command.on(folder)
    code = _run(command, words, out, err)
    shown = shlex.join(words)
    if code is None:
        raise UserError(
            f"{command.flag}: {shown}: not done after {command.seconds:g} s (--timeout); see {err}"
        )
    if code:
        how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        raise UserError(f"{command.flag}: {shown}: {how}; see {err}{_said(err)}")
    try:
        return read_figures(_ending(out))
    except ValueError as error:
        raise UserError(f"{command.flag}: {shown}: {error}; see {out}") from None


def read_figures(line: str) -> Figures:
    """A number, or a JSON object with numbers in it: {"imagenet": {"top1": 0.7}} gives imagenet.top1.

    Raises ValueError in words for anything else. What is not finite becomes None.
    """
    if not line:
        raise ValueError("it printed nothing; its last line is to be a number or a JSON object")
    try:
        value: Any = float(line)
    except ValueError:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, float):
        return {SCORE: _finite(value)}
    figures = dict(_numbers("", value)) if isinstance(value, dict) else {}
    if not figures:
        raise ValueError(f"its last line, {line[:80]!r}, is neither a number nor a JSON object with one")
    return figures


def metric_of(figures: Mapping[str, float | None], wanted: str | None) -> str:
    """The figure that decides: `wanted`, or the first one. Raises UserError for one that is not there."""
    if wanted is not None and wanted not in figures:
        raise UserError(f"--metric {wanted}: the command printed {', '.join(figures)}")
    return wanted or next(iter(figures))


def direction_note(metric: str | None, lower: bool) -> str | None:
    """What to say where more is taken for better, and the figure's name sounds as if less were."""
    if lower or metric is None or not FALLING.search(metric):
        return None
    return f"more {metric} is taken for better; --lower-is-better says otherwise"


def telling(told: Callable[[str], None] | None) -> Callable[[str, str | None, bool], None]:
    """Tells a score; after the first one, while others can be spared, also what direction_note says of its metric."""
    pending = told is not None

    def tell(line: str, metric: str | None, lower: bool) -> None:
        nonlocal pending
        if told is None:
            return
        told(line)
        if pending and (advice := direction_note(metric, lower)):
            told(f"note: {advice}")
        pending = False

    return tell


def _numbers(name: str, value: Any) -> list[tuple[str, float | None]]:
    if isinstance(value, dict):
        return [
            figure for key, inner in value.items() for figure in _numbers(f"{name}.{key}".lstrip("."), inner)
        ]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [(name, _finite(value))] if is_number else []


def _finite(value: float) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _run(command: Command, words: list[str], out: Path, err: Path) -> int | None:
    """Its exit code, None when it was stopped for time. It and whatever it started end with us."""
    with open(out, "wb") as output, open(err, "wb") as errors:
        try:
            process = subprocess.Popen(
                command.wrapped(words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{command.flag}: {words[0]}: {error.strerror or error}") from None
        try:
            return process.wait(command.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ending(path: Path) -> str:
    """The last line, or all lines of an object that is closed by it."""
    lines = _tail(path)
    if not lines or not lines[-1].endswith("}"):
        return lines[-1] if lines else ""
    for start in range(len(lines) - 1, max(-1, len(lines) - OBJECT), -1):
        if lines[start].startswith("{"):
            text = "\n".join(lines[start:])
            with suppress(ValueError, RecursionError):
                json.loads(text)
                return text
    return lines[-1]


def _said(err: Path) -> str:
    """The end of what a failed command said, for the message."""
    return "".join(f"\n  {line[:200]}" for line in _tail(err)[-3:])


def _tail(path: Path) -> list[str]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        text = file.read().decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]
