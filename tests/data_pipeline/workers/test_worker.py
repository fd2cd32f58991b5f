"""The worker's own side: an error reaches the parent whole, with the place where it was raised."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from data_pipeline.workers.worker import picklable_error


def local_error(text: str) -> Exception:
    class LocalError(Exception):
        """Cannot be pickled, because no other process can import it."""

    return LocalError(text)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [(ValueError("odd"), ValueError, "odd"), (local_error("odd"), RuntimeError, "LocalError: odd")],
)
def test_an_error_takes_its_traceback_along(error: Exception, kind: type[Exception], text: str) -> None:
    name = type(error).__name__
    try:
        raise error
    except Exception as caught:
        # Bytes made in this line, as a worker sends its error.
        found: Any = pickle.loads(pickle.dumps(picklable_error(caught)))
    assert (type(found), str(found)) == (kind, text)
    (note,) = found.__notes__
    first, *lines = note.splitlines()
    assert (first, lines[0]) == ("in a loader worker:", "Traceback (most recent call last):")
    assert any("test_worker.py" in line for line in lines)
    assert lines[-1].endswith(f"{name}: odd")
