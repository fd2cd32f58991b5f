"""The flags of commands that score models: `dromos sweep` and `dromos soup`."""

from __future__ import annotations

from typing import Annotated

import typer

PROTOCOL = "{} is the checkpoint folder; no shell runs; what it prints last is a number, or a JSON object of numbers."
Metric = Annotated[
    str | None, typer.Option("--metric", metavar="NAME", help="The figure that decides; default: the first.")
]
Lower = Annotated[
    bool | None,
    typer.Option(
        "--lower-is-better/--more-is-better", help="Default: more, or as it was before for that metric."
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="Stop the command after so long; default: never."),
]


def check_scored(flag: str, scored: bool, **given: object) -> None:
    """Raises UserError for flags of a score where no command is given that makes one."""
    from data_pipeline.errors import UserError

    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names and not scored:
        raise UserError(f"{', '.join(names)}: of scores, and nothing is scored; say how with {flag}")
