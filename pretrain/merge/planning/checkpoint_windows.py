"""Averages over checkpoints of one run: selects the checkpoints and their weights.

With a constant learning rate, averaging checkpoints works like a learning rate decay. LAWA (arXiv 2306.03241) averages
the latest few with equal weights; PMA (2505.12082) compares equal, linearly growing and exponential weights; WSM
(2507.17634) derives the weights from the decay that they replace.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import UserError
from data_pipeline.storage.files import is_remote
from pretrain.run.folder import complete_steps, read_record, tag_of

Schedule = Literal["uniform", "linear", "1-sqrt", "ema"]
SCHEDULES = ("uniform", "linear", "1-sqrt", "ema")
DECAY = 0.8  # default for schedule ema


@dataclass(frozen=True)
class Window:
    """Complete checkpoints of a stage: the `last` N, or those within [first, last] steps, samples or tokens.

    every:    keep only checkpoints whose step is a multiple of it.
    schedule: weights from the oldest to the newest checkpoint (`schedule_weights`).
    decay:    for schedule ema: weight of a checkpoint divided by that of the next newer one (not for the oldest one).
    """

    run: str
    last: int | None = None
    steps: tuple[int, int] | None = None
    samples: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    every: int = 1
    schedule: Schedule = "uniform"
    decay: float | None = None


def schedule_weights(schedule: str, count: int, decay: float = DECAY) -> list[float]:
    """Weights of `count` checkpoints from the oldest (1) to the newest (count); their sum is 1.

    uniform: w_i = 1 / count. LAWA; SMA in PMA; equivalent to a linear learning rate decay in WSM.
    linear:  w_i = i / (1 + 2 + ... + count). WMA in PMA.
    ema:     mean_1 = x_1, mean_i = decay * mean_{i-1} + (1 - decay) * x_i: w_1 = decay^(count-1),
             w_i = (1 - decay) * decay^(count-i). EMA in PMA.
    1-sqrt:  w_i = sqrt(i / count) - sqrt((i-1) / count), the differences of the decay 1 - sqrt(i / count). WSM: the
             merge sum_i w_i x_i equals a training whose updates between checkpoints i and i + 1 are multiplied by
             w_{i+1} + ... + w_count. The oldest checkpoint has the largest weight.
    """
    if schedule == "uniform":
        return [1.0 / count] * count
    if schedule == "linear":
        return [2.0 * i / (count * (count + 1)) for i in range(1, count + 1)]
    if schedule == "ema":
        return [decay ** (count - 1)] + [(1.0 - decay) * decay ** (count - i) for i in range(2, count + 1)]
    if schedule == "1-sqrt":
        return [math.sqrt(i / count) - math.sqrt((i - 1) / count) for i in range(1, count + 1)]
    raise UserError(f"window: schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")


def expand(window: Window) -> tuple[list[str], list[float]]:
    """Addresses RUN/STAGE@STEP from the oldest to the newest, and their weights.

    Raises UserError for contradictory options and for fewer than two complete checkpoints.
    """
    _check(window)
    stage = Path(window.run).expanduser()
    folder = stage / "checkpoints"
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"window: {window.run} has no complete checkpoint; write the stage as RUN/STAGE")
    chosen = [step for step in steps if step % window.every == 0]
    for unit in ("steps", "samples", "tokens"):
        bounds = getattr(window, unit)
        if bounds is not None:
            chosen = [step for step in chosen if bounds[0] <= _measure(stage, step, unit) <= bounds[1]]
    if window.last is not None:
        if len(chosen) < window.last:
            have = f"{len(chosen)} ({', '.join(map(str, chosen))})"
            raise UserError(
                f"window: {window.run} has only {have} of the {window.last} requested checkpoints"
            )
        chosen = chosen[-window.last :]
    if len(chosen) < 2:
        raise UserError(
            f"window: contains {len(chosen)} checkpoints of {window.run}, but needs two or more; complete steps: "
            f"{', '.join(map(str, steps))}"
        )
    weights = schedule_weights(window.schedule, len(chosen), DECAY if window.decay is None else window.decay)
    return [f"{window.run}@{step}" for step in chosen], weights


def notes(addresses: Sequence[str]) -> list[str]:
    """A note if the checkpoints are not equally far apart, because schedules assume equal distances."""
    steps = [int(address.rpartition("@")[2]) for address in addresses]
    gaps = {after - before for before, after in pairwise(steps)}
    if len(gaps) < 2:
        return []
    return [
        f"the window's checkpoints are {min(gaps)} to {max(gaps)} steps apart; its schedule assumes equal gaps"
    ]


def _check(window: Window) -> None:
    if is_remote(window.run):
        raise UserError(
            f"window: {window.run} is remote, but a window needs a local run; write inputs such as {window.run}@STEP"
        )
    given = [unit for unit in ("last", "steps", "samples", "tokens") if getattr(window, unit) is not None]
    if len(given) != 1:
        raise UserError(
            f"window: give one of last, steps, samples, tokens, not {' and '.join(given) or 'none'}"
        )
    if window.last is not None and window.last < 2:
        raise UserError(f"window: last {window.last}: must be 2 or more")
    if window.every < 1:
        raise UserError(f"window: every {window.every}: must be a number of steps, 1 or more")
    if window.decay is not None and window.schedule != "ema":
        raise UserError(f"window: decay is for schedule ema, not {window.schedule}")
    if window.decay is not None and not 0 < window.decay < 1:
        raise UserError(f"window: decay {window.decay:g}: must be between 0 and 1")


def _measure(stage: Path, step: int, unit: str) -> float:
    """Steps, samples or tokens that the run had consumed when it saved a checkpoint."""
    if unit == "steps":
        return step
    path = stage / "checkpoints" / tag_of(step) / "state.json"
    try:
        order: dict[str, Any] = json.loads(path.read_text())["order"]
        consumed = {stream: sum(state["consumed"].values()) for stream, state in order.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"window: {path} does not record consumed samples; give steps") from None
    if unit == "samples":
        return sum(consumed.values())
    lengths = _lengths(stage)
    if not lengths.keys() & consumed.keys():
        raise UserError(f"window: {stage} reads no text and has no tokens; give steps or samples")
    return sum(count * lengths.get(stream, 0) for stream, count in consumed.items())


def _lengths(stage: Path) -> dict[str, int]:
    """Tokens per row, padding included, of each stream with text; read from the stage's resolved.yaml."""
    streams = (read_record(stage, any_schema=True) or {"stage": {}})["stage"].get("data")
    lengths = {}
    for stream, data in (streams if isinstance(streams, dict) else {}).items():
        if not isinstance(data, dict):
            continue
        text: dict[str, Any] = data["text"] if isinstance(data.get("text"), dict) else data
        if isinstance(text.get("length"), int):
            lengths[stream] = text["length"]
    return lengths
