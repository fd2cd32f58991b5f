"""Merging against mergekit and against the lower bound: a loop that reads both models and writes one.

Models are random Llamas in bf16. Every merge runs in its own process with a warm page cache. Memory is the anonymous
memory of that process (/proc/PID/smaps_rollup, sampled every few milliseconds), without the page cache.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import merge_methods
from benchmarks.merge_models import Llama, write_safetensors, write_zero3
from benchmarks.watched import MEGABYTE, dromos, fresh, timed, warm, watch

PARTS = ("mergekit", "limit", "memory", "sweep", "zero", "methods")
MODEL = Llama()
LARGER = replace(MODEL, width=4096, inner=11264, layers=16)
SHARDED = replace(MODEL, layers=4)
BETAS = 11
RANKS = 8
MERGEKIT = """\
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.4}}}}
  - {{model: {b}, parameters: {{weight: 0.6}}}}
dtype: bfloat16
"""
MERGE = """\
import json, sys, time
from pretrain.merge import merge
a, b, out = sys.argv[1:]
began, cpu = time.perf_counter(), time.process_time()
merge([a, b], out, beta=0.4)
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu]))
"""
LEAST = {
    "times as fast as mergekit-yaml, cold start": 15.0,
    f"{BETAS} betas: times as fast as mergekit": 20.0,
}
MOST = {
    "times the time of the bare loop, without start-up": 2.5,
    "peak anonymous memory (MB)": 400.0,
    "peak of a model four times larger over it": 1.1,
    "ZeRO-3 shards over safetensors, time": 2.0,
}


def run(rounds: int, parts: Sequence[str] = PARTS, folder: Path | None = None) -> dict[str, Any]:
    """Figures of each of `parts`, best of the rounds (mergekit: at most two). `folder`: for about 25 GB of models."""
    rows: dict[str, float] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        if set(parts) & {"mergekit", "limit", "memory", "sweep"}:
            models = write_pair(root / "models", MODEL)
        if "mergekit" in parts:
            notes += mergekit(root, models, rows, rounds)
        if "limit" in parts or "mergekit" in parts:
            limit(root, models, rows, rounds)
        if "memory" in parts:
            memory(root, models, rows)
        if "sweep" in parts:
            sweep(root, models, rows, rounds)
        if "zero" in parts:
            zero(root, rows, rounds)
        if "methods" in parts:
            notes += merge_methods.run(root, SHARDED, rows)
    theirs, cold = rows.get("mergekit-yaml (s)"), rows.get("dromos merge, cold start (s)")
    if theirs and cold:
        rows["times as fast as mergekit-yaml, cold start"] = theirs / cold
    if theirs and (swept := rows.get(f"{BETAS} betas in one pass (s)")):
        rows[f"{BETAS} betas: times as fast as mergekit"] = BETAS * theirs / swept
    what = f"two bf16 Llamas of {MODEL.parameters / 1e9:.2f}B in four files each; seconds, MB and ratios"
    return {"what": what, "unit": "", "rows": rows, "most": MOST, "least": LEAST, "notes": notes}


def write_pair(folder: Path, model: Llama) -> tuple[Path, Path]:
    return write_safetensors(folder / "a", model, 1), write_safetensors(folder / "b", model, 2)


def mergekit(root: Path, models: tuple[Path, Path], rows: dict[str, float], rounds: int) -> list[str]:
    """mergekit with warm packages, the better of two runs; returns a note if it cannot be installed."""
    tool, problem = merge_methods.mergekit_yaml()
    if not tool:
        return [f"mergekit is left out: {problem}"]
    config = root / "mergekit.yml"
    config.write_text(MERGEKIT.format(a=models[0], b=models[1]))
    runs = []
    for _ in range(min(max(rounds, 1), 2)):
        warm(models)
        runs.append(
            fresh(root / "theirs", lambda out: watch([tool, str(config), str(out), "--no-copy-tokenizer"]))
        )
    best = min(runs, key=lambda spent: spent.wall)
    rows["mergekit-yaml (s)"] = best.wall
    rows["mergekit-yaml, CPU (s)"] = best.cpu
    rows["mergekit-yaml, peak anonymous memory (MB)"] = best.peak / MEGABYTE
    return []


def limit(root: Path, models: tuple[Path, Path], rows: dict[str, float], rounds: int) -> None:
    """The loop without arithmetic, the whole command, and the merge without start-up, in turn."""
    loops, commands, merges, cpus = [], [], [], []
    for _ in range(max(rounds, 1)):
        warm(models)
        loops.append(fresh(root / "copy", lambda out: timed(lambda: copy_loop(*models, [out]))))
        commands.append(fresh(root / "out", lambda out: watch(merge_command(models, out)).wall))
        wall, cpu = fresh(root / "out", lambda out: merge_alone(models, out))
        merges.append(wall)
        cpus.append(cpu)
    rows["reading both and writing one (s)"] = min(loops)
    rows["dromos merge, cold start (s)"] = min(commands)
    rows["dromos merge, without start-up (s)"] = min(merges)
    rows["dromos merge, without start-up, CPU (s)"] = min(cpus)
    rows["times the time of the bare loop, without start-up"] = min(merges) / min(loops)


def copy_loop(a: Path, b: Path, outs: Sequence[Path]) -> None:
    """The minimum work of any merge: read both models, write each output."""
    first, second = bytearray(1 << 20), bytearray(1 << 20)
    for path in sorted(a.glob("*.safetensors")):
        with ExitStack() as stack:
            one, other = (stack.enter_context(open(model / path.name, "rb", 0)) for model in (a, b))
            written = []
            for out in outs:
                out.mkdir(parents=True, exist_ok=True)
                written.append(stack.enter_context(open(out / path.name, "wb", 0)))
            while count := one.readinto(first):
                other.readinto(second)
                for file in written:
                    file.write(memoryview(first)[:count])


def memory(root: Path, models: tuple[Path, Path], rows: dict[str, float]) -> None:
    """Peak memory of the command, and for models of four times the size."""
    peak = fresh(root / "out", lambda out: watch(merge_command(models, out)).peak)
    large = write_pair(root / "large", LARGER)
    larger = fresh(root / "out", lambda out: watch(merge_command(large, out)).peak)
    shutil.rmtree(root / "large")
    rows["peak anonymous memory (MB)"] = peak / MEGABYTE
    rows[f"the same, {LARGER.parameters / 1e9:.1f}B (MB)"] = larger / MEGABYTE
    rows["peak of a model four times larger over it"] = larger / peak


def sweep(root: Path, models: tuple[Path, Path], rows: dict[str, float], rounds: int) -> None:
    """A sweep over both ends and nine betas between, in turn with a loop that writes as much without arithmetic.

    Twenty gigabytes pass through the page cache, so this may measure the disk. On a virtual machine it may measure the
    host, which must return reclaimed memory (two to three times slower after a minute without writes).
    """
    command = [*dromos(), "sweep", *map(str, models), "--betas", f"0:1:{1 / (BETAS - 1)}", "--out"]
    outs = [root / "copies" / str(number) for number in range(BETAS)]
    loops, swept = [], []
    for _ in range(max(rounds, 1)):
        warm(models)
        loops.append(fresh(root / "copies", lambda _: timed(lambda: copy_loop(*models, outs))))
        swept.append(fresh(root / "sweep", lambda out: watch([*command, str(out)])))
    best = min(swept, key=lambda spent: spent.wall)
    rows[f"reading both and writing {BETAS} (s)"] = min(loops)
    rows[f"{BETAS} betas in one pass (s)"] = best.wall
    rows[f"{BETAS} betas in one pass, CPU (s)"] = best.cpu
    rows[f"{BETAS} betas, peak anonymous memory (MB)"] = max(spent.peak for spent in swept) / MEGABYTE


def zero(root: Path, rows: dict[str, float], rounds: int) -> None:
    """The same fp32 weights as safetensors and as ZeRO-3 shards of eight ranks, in turn."""
    plain, sharded = [], []
    files = tuple(write_safetensors(root / f"plain-{n}", SHARDED, n, "F32") for n in (1, 2))
    shards = tuple(write_zero3(root / f"zero-{n}", SHARDED, n, RANKS) for n in (1, 2))
    for _ in range(max(rounds, 1)):
        plain.append(fresh(root / "out", lambda out: merge_alone(files, out))[0])
        sharded.append(fresh(root / "out", lambda out: merge_alone(shards, out))[0])
    for folder in (*files, *shards):
        shutil.rmtree(folder)
    rows[f"fp32 safetensors, {SHARDED.parameters / 1e9:.2f}B (s)"] = min(plain)
    rows[f"the same as ZeRO-3 of {RANKS} ranks (s)"] = min(sharded)
    rows["ZeRO-3 shards over safetensors, time"] = min(sharded) / min(plain)


def merge_command(models: Sequence[Path], out: Path) -> list[str]:
    return [*dromos(), "merge", *map(str, models), "--beta", "0.4", "--out", str(out)]


def merge_alone(models: Sequence[Path], out: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of the merge in a new process, without Python imports."""
    spent = watch([sys.executable, "-c", MERGE, *map(str, models), str(out)])
    wall, cpu = spent.printed.strip().strip("[]").split(",")
    return float(wall), float(cpu)
