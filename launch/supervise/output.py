"""Lines that a launcher prints."""

from __future__ import annotations

import sys
from contextlib import suppress

from rich.console import Console


def print_line(console: Console, text: str) -> None:
    """Print `text` as it is, without markup, highlighting or line breaks.

    If the console cannot be written (a log on a full disk), the line goes to stderr or is lost, and the run goes on.
    """
    try:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    except BrokenPipeError:
        raise
    except OSError:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)
