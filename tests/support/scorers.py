"""Small scoring commands for tests; they import only the standard library, so that they start fast."""

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
    """The command `python FILE {}`, where FILE runs `body`, which prints the score.

    `body` can use `folder` and `x`, the first element of the tensor w. Each scored folder is appended to the file
    `calls`.
    """
    path = folder / "score it.py"
    path.write_text(CODE + body)
    return f"{shlex.quote(sys.executable)} -S -E {shlex.quote(str(path))} {{}}"


def calls(folder: Path) -> list[str]:
    """The folders that were scored so far, in order, by commands whose working directory is `folder`."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []
