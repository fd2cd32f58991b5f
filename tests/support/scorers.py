"""Small commands that score a checkpoint folder, for tests: the standard library alone, so that they start fast."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

CODE = """
import json, os, struct, sys
folder = sys.argv[1]
raw = open(os.path.join(folder, "model.safetensors"), "rb").read()
size = struct.unpack("<Q", raw[:8])[0]
at = 8 + size + json.loads(raw[8 : 8 + size])["w"]["data_offsets"][0]
x = struct.unpack("<f", raw[at : at + 4])[0]
with open("calls", "a") as calls:
    calls.write(folder + "\\n")
"""


def scorer(folder: Path, body: str) -> str:
    """A command `python FILE {}`; `body` runs with `folder` and x, the first element of the tensor w, and prints."""
    path = folder / "score it.py"
    path.write_text(CODE + body)
    return f"{shlex.quote(sys.executable)} -S -E {shlex.quote(str(path))} {{}}"


def calls(folder: Path) -> list[str]:
    """The folders that were scored, in their order; the commands ran in `folder`."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []
