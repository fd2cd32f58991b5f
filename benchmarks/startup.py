"""Start-up of the light commands against a peer's command line: CPU time of the whole process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_pipeline.formats import refinedweb
from data_pipeline.index.build import build_index
from pretrain.merge import merge
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from tests.support.launching import write_recipe
from tests.support.merge_inputs import floats, write
from tests.support.tiny import write_pairs

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "configs/demo/flip.yaml")
BAR_SECONDS = 0.5
PEER = "open_clip_train --help"
# Words in braces are inputs that `write_inputs` writes.
COMMANDS = (
    "--help",
    "--version",
    "run --help",
    "merge --help",
    "sweep --help",
    "soup --help",
    "verify --help",
    "diff --help",
    "diff {model_a} {model_b} --picture {drawn}",
    "verify {merged}",
    "sweep {model_a} {model_b} --dry-run",
    "merge {model_a} {model_b} --beta 0.4 --out {new} --dry-run",
    "run {recipe} --ranks-per-node 1 --dry-run",
    "recipe check {recipe}",
    f"recipe check {DEMO}",
    f"recipe show {DEMO}",
    "list {runs}",
    "status {runs/small}",
    "data show {tars}",
    "data show {tars} --json",
    "data show {indexed}",
    "data show {documents}",
)


def run(rounds: int) -> dict[str, Any]:
    """CPU seconds (user and system) of each command, the best of `rounds` after one run that compiles bytecode.

    CPU time does not depend on the load of other processes. The bar of half a second comes from the design.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        ways = {f"dromos {command}": dromos(command, inputs) for command in COMMANDS}
        ways = {name.replace(str(ROOT) + "/", ""): way for name, way in ways.items()}
        ways[PEER] = [sys.executable, "-m", "open_clip_train.main", "--help"]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "compiled")
        best = {
            name: min(processor_seconds(way, env) for _ in range(rounds + 1)) for name, way in ways.items()
        }
    ours = {name: seconds for name, seconds in best.items() if name != PEER}
    rows = {**best, f"{PEER} over dromos --help": best[PEER] / best["dromos --help"]}
    what = "seconds of processor time from start to exit; a peer's command line beside them"
    return {"what": what, "unit": "s", "rows": rows, "most": dict.fromkeys(ours, BAR_SECONDS)}


def dromos(command: str, inputs: dict[str, str]) -> list[str]:
    """The command line of `dromos COMMAND`."""
    return [sys.executable, "-m", "launch.cli", *arguments(command, inputs)]


def arguments(command: str, inputs: dict[str, str]) -> list[str]:
    """The words of a command with its inputs filled in."""
    return [inputs[word[1:-1]] if word.startswith("{") else word for word in command.split()]


def processor_seconds(command: list[str], env: dict[str, str]) -> float:
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def write_inputs(folder: Path) -> dict[str, str]:
    """Small real inputs below `folder`: name in COMMANDS -> path."""
    for name in ("tars", "indexed"):
        (folder / name).mkdir()
        write_pairs(folder / name)
    build_index(str(folder / "indexed"))
    documents = [refinedweb.Document("text", "url")]
    refinedweb.write_documents(str(folder / "documents" / "0.parquet"), documents)
    stage = folder / "runs" / "small" / "masked"
    (stage / "checkpoints" / "step_00000020").mkdir(parents=True)
    recipe = write_recipe(folder)
    (stage.parent / "recipe.yaml").write_text(dump(load_recipe(recipe)))
    (stage / "metrics.jsonl").write_text('{"step": 20, "loss": 1.5}\n')
    for seed, name in enumerate(("model_a", "model_b")):
        write(folder / name, {"layers.0.w": floats(seed, 8, 8), "layers.1.w": floats(seed + 2, 8, 8)})
    merge([str(folder / "model_a"), str(folder / "model_b")], folder / "merged", beta=0.4)
    written = ("model_a", "model_b", "merged", "tars", "indexed", "documents", "runs", "runs/small")
    return {name: str(folder / name) for name in (*written, "drawn", "new")} | {"recipe": str(recipe)}
