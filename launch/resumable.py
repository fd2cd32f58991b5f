"""Commands that may be stopped at any moment and run again: Ctrl-C and SIGTERM end them in words, with exit code 75."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from pretrain.exit_codes import GO_ON


@contextmanager
def resumable() -> Iterator[None]:
    """What is stopped in here keeps what it has written; the same command goes on with it.

    A scheduler's SIGTERM is taken for a Ctrl-C, so that what the command started ends with it.
    """
    here = threading.current_thread() is threading.main_thread()
    before: Any = signal.signal(signal.SIGTERM, _interrupt) if here else None
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("dromos: interrupted; the same command goes on with what is done", err=True)
        raise typer.Exit(GO_ON) from None
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
