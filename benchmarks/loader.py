"""Photographs from tars to batches: our Stream against peer loaders and the upper bound (bare.py), on the same tars.

Every loader runs in its own process and environment, and they take turns, so that all see the same machine load. Times
are wall clock; the first batches do not count in the rates.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers, photos

ROOT = peers.ROOT
OURS, LIMIT = "dromos", "decode + crop alone"
# The same with our resize instead of Pillow's.
OWN_LIMIT = "decode + our crop alone"
LIMITS = (LIMIT, OWN_LIMIT)
# open_clip's defaults of image size and crop scale.
SIZE, SCALE, BATCH = 224, (0.9, 1.0), 64
WARM, COUNTED = 512, 3072
MEMORY_MARKS = (5_000, 50_000)
BARS = {LIMIT: 0.92, "open_clip": 2.3}
TIMEOUT = 900  # seconds per loader; litdata's first round also converts the data to its own format


def run(
    rounds: int,
    data: Path | None = None,
    workers: Sequence[int] = (1, 2),
    memory: bool = True,
    beside: Sequence[str] = tuple(peers.PEERS),
) -> dict[str, Any]:
    """Samples per second of each loader with each number of workers, and their ratios to ours."""
    pythons, missing = peers.install(beside)
    notes = [f"{peer}: not installed: {problem}" for peer, problem in missing.items()]
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        what = photos.write_tars(folder / "tars", data)
        for _ in range(rounds):
            for count in workers:
                for reader in (*LIMITS, OURS, *pythons):
                    settings = _settings(folder, count)
                    python = pythons.get(reader, Path(sys.executable))
                    figures = _measure(reader, python, settings)
                    if "problem" in figures:
                        notes.append(f"{reader}, {_workers(count)}: {figures['problem']}")
                    else:
                        found[reader, count].append(figures)
        most = _settings(folder, max(workers))
        waited = _measure(OURS, Path(sys.executable), most | {"pause": 3.0, "samples": BATCH})
        if "problem" not in waited:
            seconds = waited["first_batch_seconds"]
            notes.append(f"first batch of {OURS} after {seconds:.2f} s where the workers stand by already")
        if memory:
            settings = most | {"samples": MEMORY_MARKS[-1], "marks": MEMORY_MARKS}
            told = _measure(OURS, Path(sys.executable), settings)
            sizes = {int(at): size for at, size in told.get("megabytes", {}).items()}
            notes.append(
                f"memory of {OURS} with {max(workers)} workers: " + told.get("problem", _sizes(sizes))
            )
    rates = {key: [one["samples_per_second"] for one in many] for key, many in found.items()}
    rows = {f"{reader}, {_workers(count)}": max(many) for (reader, count), many in rates.items()}
    least = {}
    for count in workers:
        for reader, bar in BARS.items():
            if rates.get((OURS, count)) and rates.get((reader, count)):
                row = f"{OURS} / {reader}, {_workers(count)}"
                rows[row], least[row] = max(rates[OURS, count]) / max(rates[reader, count]), bar
    return {
        "what": f"{what}; random crop to {SIZE} px, 77 tokens, batches of {BATCH}",
        "unit": "samples/s",
        "rows": rows,
        "least": least,
        "notes": [line for count in workers for line in _compare(rates, found, count)] + notes,
        "rounds": {f"{reader}, {_workers(count)}": many for (reader, count), many in found.items()},
    }


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


def _settings(folder: Path, workers: int) -> dict[str, Any]:
    return {
        "tars": str(folder / "tars"),
        "folder": str(folder),
        "workers": workers,
        "size": SIZE,
        "scale": SCALE,
        "batch": BATCH,
        "warm": WARM,
        "samples": COUNTED,
    }


def _measure(reader: str, python: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures that a loader's process prints, or `problem`: the last line of its error output."""
    text = json.dumps(settings)
    if reader in LIMITS:
        text = json.dumps(settings | {"kernel": reader == OWN_LIMIT})
        command = [str(python), "-m", "benchmarks.bare", text]
    else:
        command = [str(python), str(ROOT / "benchmarks" / "contenders.py"), reader, text]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if reader == OURS:
        environment["PYTHONPATH"] = str(ROOT)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return figures
    except subprocess.TimeoutExpired:
        return {"problem": f"no figures after {TIMEOUT} seconds"}
    except (IndexError, ValueError):
        return {"problem": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def _compare(
    rates: dict[tuple[str, int], list[float]],
    found: dict[tuple[str, int], list[dict[str, Any]]],
    workers: int,
) -> list[str]:
    """Our rate against each other loader's: the best round, and the median of the per-round ratios."""
    ours, lines = rates.get((OURS, workers)), []
    if not ours:
        return []
    for (reader, count), theirs in rates.items():
        if count == workers and reader != OURS:
            ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
            lines.append(
                f"{_workers(workers)}: {OURS} is {max(ours) / max(theirs):.2f} times {reader} "
                f"(best rounds), {statistics.median(ratios):.2f} (median of rounds)"
            )
    for (reader, count), many in found.items():
        if count == workers:
            processor = statistics.median(one["processor_ms"] for one in many)
            lines.append(f"{_workers(workers)}: {reader} takes {processor:.2f} ms of processor a sample")
        if count == workers and reader not in LIMITS:
            first = [one["first_batch_seconds"] for one in many]
            lines.append(
                f"{_workers(workers)}: first batch of {reader} after {min(first):.2f} s "
                f"(best), {statistics.median(first):.2f} s (median), workers started"
            )
    return lines


def _sizes(sizes: dict[int, float]) -> str:
    return ", ".join(f"{size:,.0f} MB after {at:,} samples" for at, size in sizes.items())
