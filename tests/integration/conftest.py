"""Reference for the cluster backends: the FLIP demo's data, and 40 small steps of it run locally."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.demo.data import is_ready

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "demo" / "flip.yaml"
STEPS = 40
# Small batches, so that the tests spend their time on clusters; steps enough to stop a run in the middle.
OVERRIDES = (f"train.steps={STEPS}", "checkpoint.every=20", "data.pairs.batch=32")


class Demo:
    """A working directory that holds the demo's data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, run: str, *flags: str) -> list[str]:
        """`dromos run` of the masked stage into runs/RUN."""
        overrides = (*OVERRIDES, f"run.dir=runs/{run}")
        return [
            sys.executable,
            "-m",
            "launch.cli",
            "run",
            str(RECIPE),
            "--stage",
            "masked",
            *flags,
            *overrides,
        ]

    def start(self, command: Sequence[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        env = {**(env or os.environ), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def run(self, run: str, *flags: str, env: dict[str, str] | None = None) -> tuple[int, str]:
        process = self.start(self.command(run, *flags), env)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def stage(self, run: str) -> Path:
        return self.folder / "runs" / run / "masked"

    def steps(self, run: str) -> int:
        path = self.stage(run) / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def rows(self, run: str) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl without times."""
        lines = (self.stage(run) / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]

    def logs(self, run: str) -> str:
        """Everything that the run and its ranks wrote, for a failing test's message."""
        found = [*self.stage(run).parent.glob("*.log"), *self.stage(run).glob("logs/*.log")]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in found)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    if is_ready(ROOT / "data" / "demo"):
        (folder / "data").symlink_to(ROOT / "data")
    else:
        prepare = [sys.executable, "-m", "launch.cli", "data", "prepare", str(RECIPE)]
        subprocess.run(prepare, cwd=folder, check=True, timeout=600)
    return Demo(folder)


@pytest.fixture(scope="session")
def local(demo: Demo) -> list[dict[str, Any]]:
    """Rows of 40 undisturbed steps on two local ranks."""
    code, output = demo.run("local", "--ranks-per-node", "2")
    assert code == 0, output + demo.logs("local")
    rows = demo.rows("local")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows
