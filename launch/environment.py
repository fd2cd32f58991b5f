"""The environment of a job, stored in RUN/env.json: host, cores, GPUs, package versions, commit of the source."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = [
    "dromos",
    "torch",
    "torchvision",
    "deepspeed",
    "transformers",
    "open_clip_torch",
    "ray",
    "numpy",
    "pyarrow",
    "simplejpeg",
    "pillow",
    "tokenizers",
    "safetensors",
    "webdataset",
    "s3fs",
]
# Environment variables that are recorded: those that configure a library.
RECORDED = re.compile(
    r"^(OMP|MKL|NCCL|GLOO|CUDA|DS|DEEPSPEED|TORCH|PYTORCH|PYTHON|RAY|SLURM|DROMOS|RANK$|WORLD_SIZE$)"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)


def gpu_count(environ: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that ranks on this machine may use, from CUDA_VISIBLE_DEVICES or the device files.

    Imports no torch and calls no driver.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def core_count() -> int:
    """Number of cores this process may use; taskset or a container may restrict them."""
    return len(os.sched_getaffinity(0))


def capture(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The environment as JSON values. Variables whose names look like secrets are left out."""
    recorded = {name: value for name, value in sorted(environ.items()) if RECORDED.match(name)}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cores": core_count(),
        "gpus": _gpu_names(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "source": _source(),
        "environment": {name: value for name, value in recorded.items() if not SECRET.search(name)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Output of a command; None if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu_names() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return listed.splitlines() if listed else []


def _source() -> dict[str, Any] | None:
    """Commit of this checkout, and `changed` if tracked files differ from it; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changed)} if commit else None
