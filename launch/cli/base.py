"""How every command ends: one message and exit code 2 for a user's mistake, never a traceback."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pretrain.run.exit_codes import FAILED, GO_ON, USER_ERROR

# A module that is not there -> the extra that brings it.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "deepspeed", "transformers", "open_clip", "tokenizers"), "train"
    ),
    **dict.fromkeys(("simplejpeg", "PIL", "sklearn", "matplotlib", "webdataset", "tensorboard"), "train"),
    "ray": "ray",
    "s3fs": "s3",
}
# Typer's note on the range of a number, alone or behind the default.
RANGE = re.compile(r"\s*\[x[<>]=?[-0-9.]+\]$|; x[<>]=?[-0-9.]+(?=\]$)")


class Commands(TyperGroup):
    """A group of commands in the order in which they were added."""

    def invoke(self, ctx: Any) -> Any:
        with readable_errors():
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command whose help shows arguments as a person writes them, without the types that Typer parses them by."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        given = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(usage(param) for param in given)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            name, text = param.get_help_record(ctx) or ("", "")
            if param.param_type_name == "argument":
                sections["Arguments"].append((metavar(param), param.help or ""))  # type: ignore[attr-defined]
            elif name:
                sections["Options"].append((name, RANGE.sub("", text)))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def usage(param: Any) -> str:
    """An argument on the usage line; a metavar that says itself how many there may be stays as it is."""
    name = metavar(param)
    if "..." in name:
        return name
    name = name if param.required else f"[{name}]"
    return name if param.nargs == 1 else f"{name}..."


class App(typer.Typer):
    """A Typer whose commands have our help."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": Command, **settings})


def printable(text: str) -> str:
    """Lines in which nothing commands the terminal: names of files come from others."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a UserError, unreadable data, a missing extra and Ctrl-C into one message and an exit code."""
    from data_pipeline.errors import ReadError, UserError

    try:
        yield
    except UserError as error:
        typer.echo(f"dromos: {printable(str(error))}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except ReadError as error:
        typer.echo(f"dromos: {printable(str(error))}", err=True)
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


def group(help_text: str) -> App:
    """A Typer of ours: plain help, errors as above."""
    return App(
        cls=Commands,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def as_json(values: Any, indent: str = "") -> str:
    """Indented JSON in which a list without lists or maps in it stands on one line."""
    import json

    inner = indent + "  "
    if isinstance(values, dict) and values:
        lines = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {as_json(value, inner)}"
            for key, value in values.items()
        ]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"
    if isinstance(values, list) and any(isinstance(value, list | dict) for value in values):
        return "[\n" + ",\n".join(inner + as_json(value, inner) for value in values) + f"\n{indent}]"
    return json.dumps(values, ensure_ascii=False)


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
