"""Runs a user's scoring command on a checkpoint folder and parses the metrics at the end of its output."""

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

PLACEHOLDER = "{}"  # replaced by the checkpoint folder
SHELL_OPERATORS = ("|", "||", "&&", "&", ";", ">", ">>", "<", "2>", "2>&1", "&>")
SINGLE_METRIC = "score"  # name of the metric of a command that prints a bare number
TAIL_BYTES = 1 << 20  # bytes at the end of the output that are searched for its last line
MAX_OBJECT_LINES = 2000  # lines of a JSON object at the end of the output
# Names of metrics for which a lower value is usually better.
LOWER_IS_BETTER = re.compile(r"(?i)(^|[._-])(nll|ppl|fid|wer|cer)([._-]|$)|loss|perplexity|error")
# name -> value; None if the printed value is not finite.
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Command:
    """A command that scores a checkpoint folder; `{}` in its words is replaced by the folder.

    words:   split as a shell would split them; no shell runs.
    flag:    the command-line flag that gave the command, for error messages.
    seconds: time limit, after which the command is killed; None for no limit.
    wrapped: maps the words to those that are executed (see launch.supervise.guard).
    """

    words: tuple[str, ...]
    flag: str
    seconds: float | None = None
    wrapped: Callable[[list[str]], list[str]] = list

    def words_for(self, folder: Path) -> list[str]:
        """The words for one folder. Its path stays within one argument, whatever characters it has."""
        return [word.replace(PLACEHOLDER, str(folder)) for word in self.words]


def parse_command(
    text: str,
    flag: str,
    seconds: float | None = None,
    wrapped: Callable[[list[str]], list[str]] = list,
) -> Command:
    """The command of a command-line flag.

    Raises UserError for a command without `{}`, with unclosed quotes, with shell operators, or with a program that
    does not exist, and for a time limit that is not a positive number.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text}: {error}") from None
    if not any(PLACEHOLDER in word for word in words):
        raise UserError(f"{flag} {text!r}: write {PLACEHOLDER} in place of the checkpoint folder")
    if operators := [word for word in words if word in SHELL_OPERATORS]:
        raise UserError(
            f"{flag} {text!r}: {operators[0]} needs a shell, and the command runs without one; "
            f"write sh -c '... {PLACEHOLDER} ...'"
        )
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{flag}: {words[0]}: no such program (no shell runs: write its path, or sh -c '...')"
        )
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"--timeout {seconds:g}: must be a number of seconds above 0")
    return Command(tuple(words), flag, seconds, wrapped)


def score(command: Command, folder: Path, log: Path) -> Metrics:
    """Run the command on `folder`; returns the metrics of its last line, or of a JSON object at the end of its output.

    log: path without suffix. Standard output goes to LOG.out, standard error to LOG.err; both are overwritten.
    Raises UserError that names the log when the command fails, exceeds its time limit, or prints no number.
    """
    out, err = log.with_name(f"{log.name}.out"), log.with_name(f"{log.name}.err")
    log.parent.mkdir(parents=True, exist_ok=True)
    words = command.words_for(folder)
    code = _run(command, words, out, err)
    command_line = shlex.join(words)
    if code is None:
        raise UserError(
            f"{command.flag}: {command_line}: killed after {command.seconds:g} s (--timeout); see {err}"
        )
    if code:
        outcome = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        raise UserError(f"{command.flag}: {command_line}: {outcome}; see {err}{_last_errors(err)}")
    try:
        return read_metrics(_last_value(out))
    except ValueError as error:
        raise UserError(f"{command.flag}: {command_line}: {error}; see {out}") from None


def read_metrics(text: str) -> Metrics:
    """Metrics from a number or a JSON object with numbers: {"imagenet": {"top1": 0.7}} gives imagenet.top1.

    A value that is not finite becomes None. Raises ValueError, with a message for the user, for anything else.
    """
    if not text:
        raise ValueError("it printed nothing; its output must end with a number or a JSON object")
    try:
        value: Any = float(text)
    except ValueError:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, float):
        return {SINGLE_METRIC: _finite(value)}
    metrics = dict(_numbers("", value)) if isinstance(value, dict) else {}
    if not metrics:
        raise ValueError(
            f"the end of its output, {text[:80]!r}, is neither a number nor a JSON object with a number"
        )
    return metrics


def choose_metric(metrics: Mapping[str, float | None], name: str | None) -> str:
    """The metric that decides: `name`, or the first one. Raises UserError if there is no metric of that name."""
    if name is not None and name not in metrics:
        raise UserError(f"--metric {name}: the command printed {', '.join(metrics)}")
    return name or next(iter(metrics))


def format_metric(value: float | None, exact: bool = False) -> str:
    """A metric as text: six significant digits, or all of them if `exact`; "nan" if it is not finite."""
    if value is None:
        return "nan"
    return repr(value) if exact else f"{value:.6g}"


def format_metrics(metrics: Metrics) -> str:
    """All metrics of an output: "top1 0.75, loss 1.2"."""
    return ", ".join(f"{name} {format_metric(value)}" for name, value in metrics.items())


def direction_note(metric: str | None, lower: bool) -> str | None:
    """A note if higher values count as better, but the metric's name suggests the opposite; else None."""
    if lower or metric is None or not LOWER_IS_BETTER.search(metric):
        return None
    return f"a higher {metric} counts as better; add --lower-is-better if a lower one is"


def score_reporter(print_line: Callable[[str], None] | None) -> Callable[[str, str | None, bool], None]:
    """A function (line, metric, lower) that prints the line of a score, and once the note of `direction_note`.

    The note is printed after the first score, so that the user can restart with the right flag before hours of scoring.
    """
    first = True

    def report(line: str, metric: str | None, lower: bool) -> None:
        nonlocal first
        if print_line is None:
            return
        print_line(line)
        if first and (note := direction_note(metric, lower)):
            print_line(f"note: {note}")
        first = False

    return report


def _numbers(name: str, value: Any) -> list[tuple[str, float | None]]:
    """(dotted name, number) of every number in nested dicts."""
    if isinstance(value, dict):
        return [
            metric for key, inner in value.items() for metric in _numbers(f"{name}.{key}".lstrip("."), inner)
        ]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [(name, _finite(value))] if is_number else []


def _finite(value: float) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond float64
        return None


def _run(command: Command, words: list[str], out: Path, err: Path) -> int | None:
    """The exit code of the command; None if it was killed at its time limit.

    The command and its child processes do not outlive this call: they form a process group, which is killed.
    """
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


def _last_value(path: Path) -> str:
    """The last line of the output, or all lines of a JSON object that ends there."""
    lines = _tail(path)
    if not lines or not lines[-1].endswith("}"):
        return lines[-1] if lines else ""
    for start in range(len(lines) - 1, max(-1, len(lines) - MAX_OBJECT_LINES), -1):
        if lines[start].startswith("{"):
            text = "\n".join(lines[start:])
            with suppress(ValueError, RecursionError):
                json.loads(text)
                return text
    return lines[-1]


def _last_errors(err: Path) -> str:
    """The last three lines of standard error, for the error message."""
    return "".join(f"\n  {line[:200]}" for line in _tail(err)[-3:])


def _tail(path: Path) -> list[str]:
    """The non-empty lines in the last TAIL_BYTES of a file, stripped."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]
