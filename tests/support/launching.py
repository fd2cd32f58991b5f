"""A two-stage recipe for tests of the launchers, and a launcher process whose ranks run standin.py."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from rich.console import Console

from data_pipeline.errors import UserError
from data_pipeline.sources.tar import TarWriter
from tests.support.commands import Command

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests" / "support" / "standin.py"

RECIPE = """
run: {name: small, dir: RUN_DIR, seed: 0}
data:
  pairs:
    sources: {digits: DATA}
    batch: 8
    image: {size: 32}
    text: {length: 8}
model:
  embed: 16
  vision: {width: 16, layers: 1, head_width: 8, patch: 8}
  text: {width: 16, heads: 2, layers: 1}
objective: {kind: contrastive, image_mask: 0.5}
optimizer: {lr: 1.0e-3}
train: {steps: 20}
stages:
  masked: {}
  tuned: {init: masked, train: {steps: 10}}
"""


def measured() -> dict[str, str]:
    """Variables by which the mutation tool sees the lines that a process with a small environment runs."""
    return {name: value for name, value in os.environ.items() if name.startswith(("COVERAGE_", "MUTANTS_"))}


def write_recipe(folder: Path) -> Path:
    """A recipe in `folder` with run folder `folder/run` and a source of eight pictures with captions."""
    (folder / "data").mkdir(exist_ok=True)
    write_tar(folder / "data" / "00000.tar", {"png": picture(), "txt": b"a grey square"})
    path = folder / "small.yaml"
    path.write_text(RECIPE.replace("RUN_DIR", str(folder / "run")).replace("DATA", str(folder / "data")))
    return path


def write_tar(path: Path, members: dict[str, bytes], samples: int = 8) -> None:
    with TarWriter(path) as tar:
        for number in range(samples):
            tar.write(f"{number:05d}", members)


def picture() -> bytes:
    png = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(png, "PNG")
    return png.getvalue()


def standin_command(run_folder: Path) -> Callable[[str], list[str]]:
    def command(stage: str) -> list[str]:
        (run_folder / stage).mkdir(parents=True, exist_ok=True)
        return [sys.executable, str(STANDIN), str(run_folder / stage)]

    return command


def run_standin(path: str, *stages: str, ranks: int = 2) -> int:
    """Main function of the launcher process of a test; returns the exit code."""
    from launch import local
    from launch.run import make_job
    from launch.stage_state import stage_states
    from pretrain.recipe.load import load_recipe

    if os.environ.get("STANDIN_SESSION"):
        os.setsid()  # a process group of its own, as a shell gives every job
    recipe = load_recipe(path)
    job = make_job(recipe, path, stages=stages or None, ranks_per_node=ranks)
    states = stage_states(recipe, job.stages, job.folder)
    if gate := os.environ.get("STANDIN_GATE"):  # the launchers of a test start at the same instant
        Path(gate, str(os.getpid())).touch()
        while not Path(gate, "open").exists():
            time.sleep(0.001)
    try:
        return local.run(job, recipe, states, Console(), standin_command(Path(job.run_dir)))
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr)
        return 2


class Launcher:
    """A launcher in its own process, which a test can signal. conftest.py ends what a failed test leaves."""

    started: ClassVar[list[Command]] = []

    def __init__(self, recipe: Path, *stages: str, **env: str) -> None:
        self.run = recipe.parent / "run"
        steps = {"STANDIN_STEPS": "1000", "STANDIN_SECONDS": "0.05"}
        environment = {**os.environ, **steps, **env}
        self.process = Command(__name__, "run_standin", [str(recipe), *stages], ROOT, environment)
        self.started.append(self.process)

    def rank(self, stage: str, rank: int) -> dict[str, Any]:
        """The report that the stand-in rank wrote at its start; waits for it."""
        path = self.run / stage / f"rank_{rank}.json"
        wait_for(path.exists, "the rank to start")
        wait_for(lambda: path.read_text().endswith("}"), "the rank's report")
        return json.loads(path.read_text())

    def steps(self, stage: str) -> int:
        path = self.run / stage / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def end(self, seconds: float = 90) -> tuple[int, str]:
        output, errors = self.process.communicate(timeout=seconds)
        return self.process.wait(), output + errors


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """True while the process runs; a zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
