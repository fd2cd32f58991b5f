"""Virtual environments of the benchmarks' peers, below .venv-peers; created once, separate from ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-peers"
# open_clip's trainer needs a webdataset older than 1.0, so each has its own environment.
PEERS = {
    "open_clip": ("open_clip_torch", "webdataset<=0.2.86", "pandas"),
    "webdataset": ("open_clip_torch", "webdataset>=1"),
    "Energon": ("open_clip_torch", "megatron-energon"),
    "litdata": ("open_clip_torch", "litdata"),
}
# Pinned to our versions, so that all peers decode and compute with the same libraries.
SAME = ("torch", "torchvision", "pillow", "numpy", "open_clip_torch")


def install(wanted: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Peer -> the Python of its environment, created if missing; and peer -> why it could not be created."""
    pythons, missing = {}, {}
    for peer in wanted:
        python, problem = environment(peer, *PEERS[peer], *_pins())
        if python is None:
            missing[peer] = problem
        else:
            pythons[peer] = python
    return pythons, missing


def environment(peer: str, *packages: str) -> tuple[Path | None, str]:
    """The Python of a peer's environment, created if missing; or None and the reason it could not be created."""
    folder = FOLDER / peer
    python, marker = folder / "bin" / "python", folder / "installed"
    if not marker.exists():
        problem = _run("venv", "--quiet", "--clear", "--python", sys.executable, str(folder)) or _run(
            "pip", "install", "--quiet", "--python", str(python), *packages
        )
        if problem:
            return None, problem
        marker.touch()
    return python, ""


def _pins() -> list[str]:
    return [f"{name}=={version(name)}" for name in SAME]


def _run(*arguments: str) -> str:
    """The last line of uv's error output; empty if it succeeded."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        return "uv is missing: pip install uv"
    done = subprocess.run([uv, *arguments], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["uv failed"])[-1]
