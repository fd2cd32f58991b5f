"""Makes workers crash, be killed, exit or hang at samples whose image carries a mark.

No image crashes a decoder reliably, so the workers import a sitecustomize that wraps the decode function. The marks
follow the end of the image, where every decoder ignores them.
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
    """Make workers act on marks. Returns the file to which they write one line per mark they meet."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK)
    patch.setenv("PYTHONPATH", str(folder))
    patch.setenv("CRASHES", str(folder / "marks"))
    (folder / "marks").touch()
    return folder / "marks"


def marked(shard: int, index: int, what: str, times: int | None = None) -> Members:
    """A good sample at which a worker does `what` (a signal name, EXIT or HANG): always, or the first `times` times."""
    sample = members(shard, index)
    mark = f"!do:{what}" + (f":{times}" if times is not None else "")
    return sample | {"png": sample["png"] + mark.encode()}
