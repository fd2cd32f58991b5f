"""What a job ran on and with: host, cores, GPUs, versions, the source's commit; `RUN/env.json` holds it."""

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
SHOWN = re.compile(r"^(OMP|MKL|NCCL|GLOO|CUDA|DS|DEEPSPEED|TORCH|PYTORCH|PYTHON|RAY|SLURM|RANK$|WORLD_SIZE$)")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)


def gpu_count(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that ranks on this machine may use; no torch, no driver call where device files tell."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def core_count() -> int:
    """Cores this process may run on: what taskset or a container left of the machine's."""
    return len(os.sched_getaffinity(0))


def capture(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Facts as JSON; environment variables only where they steer a library, and never a secret."""
    shown = {name: value for name, value in sorted(environ.items()) if SHOWN.match(name)}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cores": core_count(),
        "gpus": _gpu_names(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "source": _source(),
        "environment": {name: value for name, value in shown.items() if not SECRET.search(name)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
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
    """Commit of the checkout that runs, and whether files differ from it; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changed)} if commit else None
