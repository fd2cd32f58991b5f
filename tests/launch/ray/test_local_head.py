"""The Ray cluster of a local job: up before the ranks, and gone however the launcher ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.launching import Launcher, alive, wait_for, write_recipe

pytest.importorskip("ray")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + "loader: {backend: ray, workers: 2}\n")
    return path


def processes_of(token: str) -> list[int]:
    """Processes with the job's Ray token in their environment: ranks, Ray, its workers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and token.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if alive(pid)]


@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_ray_ends_with_the_job(recipe: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ends of a job are in test_process.py, with a stand-in for Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    launcher = Launcher(recipe, "masked", STANDIN_RAY="1")
    report = launcher.rank("masked", 0)
    token = report["env"]["RAY_AUTH_TOKEN_PATH"]
    assert alive(report["ray_actor"])
    assert report["ray_actor"] in processes_of(token)
    launcher.process.send_signal(signal.SIGTERM if ending == "stopped" else signal.SIGKILL)
    code, output = launcher.end()
    assert code == (75 if ending == "stopped" else -9), output
    seconds = 60 if ending == "killed" else 1
    wait_for(lambda: not processes_of(token) and not alive(report["ray_actor"]), "Ray to end", seconds)
    wait_for(lambda: not Path(token).parent.exists(), "Ray's folder to be removed", seconds)
