"""Commands that may be stopped at any moment and run again: Ctrl-C and signals end them in words, with exit code 75."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import typer

from pretrain.run.exit_codes import GO_ON


@contextmanager
def resumable() -> Iterator[None]:
    """What is stopped in here keeps what it has written; the same command goes on with it.

    A scheduler's SIGTERM and a lost connection are taken for a Ctrl-C, so that what the command started ends with it.
    Signals that are ignored, as under nohup, stay ignored.
    """
    here = threading.current_thread() is threading.main_thread()
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if here and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):  # of a terminal that is gone
            typer.echo("dromos: interrupted; the same command goes on with what is done", err=True)
        raise typer.Exit(GO_ON) from None
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
