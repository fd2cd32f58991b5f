"""Typer groups, errors to exit codes, JSON output, and commands that can be interrupted and resumed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from launch.supervise.stop_signals import signals_interrupt
from pretrain.run.exit_codes import FAILED, RUN_AGAIN, USER_ERROR
from pretrain.run.failures import explain, print_traceback, say

# Module that is not installed -> the extra that installs it.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "deepspeed", "transformers", "open_clip", "tokenizers"), "train"
    ),
    **dict.fromkeys(("simplejpeg", "PIL", "sklearn", "matplotlib", "webdataset", "tensorboard"), "train"),
    "ray": "ray",
    "s3fs": "s3",
}
# Typer's note on the range of a number, alone or after the default.
RANGE = re.compile(r"\s*\[x[<>]=?[-0-9.]+\]$|; x[<>]=?[-0-9.]+(?=\]$)")


class Commands(TyperGroup):
    """A command group that turns errors into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        with readable_errors():
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command whose help shows arguments as a user types them, without Typer's type names."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(usage(param) for param in arguments)]

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
    """An argument on the usage line. A metavar with `...` already shows that it repeats, and is not changed."""
    name = metavar(param)
    if "..." in name:
        return name
    name = name if param.required else f"[{name}]"
    return name if param.nargs == 1 else f"{name}..."


class App(typer.Typer):
    """A Typer application whose commands are of class `Command`."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": Command, **settings})


def printable(text: str) -> str:
    """`text` with control characters escaped: file names from a data set may contain terminal commands."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn an error that can be explained, a missing extra and Ctrl-C into one message and an exit code."""
    try:
        yield
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
    except BrokenPipeError:
        raise  # click ends the command in silence
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        say(printable(failure.message))
        print_traceback(error)
        raise typer.Exit(failure.code) from None


def group(help_text: str) -> App:
    """A command group with plain help and readable errors."""
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
    """Indented JSON; a list of scalars is on one line."""
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


def print_note(text: str | None) -> None:
    """Print a note to stderr; nothing for None."""
    if text is not None:
        typer.echo(f"note: {text}", err=True)


@contextmanager
def resumable() -> Iterator[None]:
    """Exits with 75 when the block is interrupted. Use it where partial files remain and the same command resumes.

    SIGTERM (from a scheduler) and SIGHUP (a lost connection) act like Ctrl-C, so that processes that the command
    started end with it. Ignored signals, as under nohup, stay ignored.
    """
    try:
        with signals_interrupt():
            yield
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be gone
            typer.echo("dromos: interrupted; the same command resumes", err=True)
        raise typer.Exit(RUN_AGAIN) from None
