"""The other methods against mergekit, on the same YAML: the whole commands of both, start-up included."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.merge_models import Llama, write_safetensors
from benchmarks.peers import environment
from benchmarks.watched import MEGABYTE, Spent, dromos, fresh, warm, watch

SLERP = """\
merge_method: slerp
base_model: {a}
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{t: 0.4}}
dtype: bfloat16
"""
BASED = """\
merge_method: {method}
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.4{density}}}}}
  - {{model: {b}, parameters: {{weight: 0.6{density}}}}}
dtype: bfloat16
"""
METHODS = {"slerp": SLERP, "task_arithmetic": BASED, "ties": BASED, "dare_ties": BASED}
ROUNDS = 2


def run(root: Path, model: Llama, rows: dict[str, float]) -> list[str]:
    """Each method once by mergekit and twice by us (best counts); returns a note if mergekit cannot be installed."""
    folder = root / "methods"
    models = [write_safetensors(folder / name, model, seed) for seed, name in enumerate(("a", "b", "base"))]
    a, b, base = models
    tool, problem = mergekit_yaml()
    for method, text in METHODS.items():
        config = root / f"{method}.yml"
        density = "" if method == "task_arithmetic" else ", density: 0.5"
        config.write_text(text.format(method=method, a=a, b=b, base=base, density=density))
        warm(models)
        command = [*dromos(), "merge", "--spec", str(config), "--out"]
        ours = min((_spent(root, command) for _ in range(ROUNDS)), key=lambda spent: spent.wall)
        what = f"{method} of {model.parameters / 1e9:.2f}B"
        rows[f"{what} (s)"] = ours.wall
        rows[f"{what}, CPU (s)"] = ours.cpu
        rows[f"{what}, peak anonymous memory (MB)"] = ours.peak / MEGABYTE
        if tool:
            theirs = _spent(root, [tool, str(config)], "--no-copy-tokenizer")
            rows[f"{what}, mergekit-yaml (s)"] = theirs.wall
            rows[f"{what}, mergekit-yaml, peak (MB)"] = theirs.peak / MEGABYTE
            rows[f"{method}: times as fast as mergekit-yaml"] = theirs.wall / ours.wall
    shutil.rmtree(folder)
    return [] if tool else [f"mergekit is left out: {problem}"]


def _spent(root: Path, command: list[str], *options: str) -> Spent:
    return fresh(root / "out", lambda out: watch([*command, str(out), *options]))


def mergekit_yaml() -> tuple[str, str]:
    """The mergekit command, with its packages in the page cache as ours are; or None and the reason it is missing."""
    python, problem = environment("mergekit", "mergekit==0.1.5", "torch")
    if python is None:
        return "", problem
    tool = str(python.with_name("mergekit-yaml"))
    watch([tool, "--help"])
    return tool, ""
