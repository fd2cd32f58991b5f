"""Workers that do what a mark at the end of a sample's image tells them to: crash, be killed, leave, or hang.

A decoder cannot be made to crash at will, so the workers import a sitecustomize that wraps the function that decodes.
The marks follow the image's own end, where every decoder ignores them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.samples import Members, members

HOOK = """
import os, signal, sys, time

def act(mark):
    if mark == "HANG":
        time.sleep(600)
    elif mark == "EXIT":
        os._exit(7)
    else:
        os.kill(os.getpid(), getattr(signal, mark))
        time.sleep(600)

if "data_pipeline.workers.worker" in sys.orig_argv:
    from data_pipeline.batches import row_builder

    decode = row_builder.decode_image

    def wrapped(data, *given, **named):
        _, mark, rest = bytes(data).partition(b"!do:")
        if mark:
            what, _, times = rest.decode().partition(":")
            with open(os.environ["CRASHES"], "a+") as file:
                file.write(what + "\\n")
                file.seek(0)
                met = file.read().split().count(what)
            if not times or met <= int(times):
                act(what)
        return decode(data, *given, **named)

    row_builder.decode_image = wrapped
"""


def install(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Let workers act on marks from now on; the file that gets a line for each mark that was met."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK)
    patch.setenv("PYTHONPATH", str(folder))
    patch.setenv("CRASHES", str(folder / "marks"))
    (folder / "marks").touch()
    return folder / "marks"


def marked(shard: int, index: int, what: str, times: int | None = None) -> Members:
    """A good sample at which a worker does `what`, a signal's name, EXIT or HANG: always, or only the first times."""
    given = members(shard, index)
    mark = f"!do:{what}" + (f":{times}" if times is not None else "")
    return given | {"png": given["png"] + mark.encode()}
