"""How every command ends: one message and exit code 2 for a user's mistake, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from pretrain.exit_codes import FAILED, USER_ERROR

# A module that is not there -> the extra that brings it.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "deepspeed", "transformers", "open_clip", "tokenizers"), "train"
    ),
    **dict.fromkeys(("simplejpeg", "PIL", "sklearn", "matplotlib", "webdataset", "tensorboard"), "train"),
    "ray": "ray",
    "s3fs": "s3",
}


class Commands(TyperGroup):
    """A group of commands in the order in which they were added."""

    def invoke(self, ctx: Any) -> Any:
        with readable_errors():
            return super().invoke(ctx)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a UserError, unreadable data, a missing extra and Ctrl-C into one message and an exit code."""
    from data_pipeline.errors import ReadError, UserError

    try:
        yield
    except UserError as error:
        typer.echo(f"dromos: {error}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except ReadError as error:
        typer.echo(f"dromos: {error}", err=True)
        raise typer.Exit(FAILED) from None
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        typer.echo(
            f"dromos: this command needs {error.name}, which is not installed: pip install 'dromos[{extra}]'",
            err=True,
        )
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        typer.echo("dromos: interrupted", err=True)
        raise typer.Exit(FAILED) from None


def group(help_text: str) -> typer.Typer:
    """A Typer of ours: plain help, errors as above."""
    return typer.Typer(
        cls=Commands,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
