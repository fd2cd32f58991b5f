"""The flags of `dromos merge`, and the spec that they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pretrain.merge.spec import MergeSpec


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


def _flag(kind: Any, flag: str, metavar: str | None, help: str) -> Any:
    return Annotated[kind, typer.Option(flag, metavar=metavar, help=help)]


Beta = _flag(float | None, "--beta", "NUMBER", "Weight of A, from 0 to 1; B has the rest.")
Weights = _flag(
    str | None, "--weights", "W,W[,W]...", "One for each input: shares (linear, slerp) or factors."
)
Method = _flag(
    str | None,
    "--method",
    "NAME",
    "linear (default), soup (all alike), slerp, task_arithmetic, ties, dare_linear, dare_ties.",
)
Base = _flag(str | None, "--base", "ADDRESS", "What task_arithmetic, ties and dare add differences to.")
Lambda = _flag(float | None, "--lambda", "NUMBER", "Factor of the summed differences; default 1.")
Density = _flag(
    str | None, "--density", "D[,D]...", "ties, dare: the share of differences kept; one, or one for each."
)
T = _flag(float | None, "--t", "NUMBER", "slerp: share of the SECOND input, which is 1 - beta.")
Seed = _flag(int | None, "--seed", "NUMBER", "dare: of what is dropped; default 0.")
Normalize = _flag(
    bool | None, "--normalize/--no-normalize", None, "Divide by the sum of weights; default: linear and ties."
)
Window = _flag(
    str | None,
    "--window",
    "RUN/STAGE,KEY=VALUE...",
    "Checkpoints of one run in place of inputs: last=8, or steps|samples|tokens=FIRST:LAST; every=N; "
    "schedule=uniform|linear|1-sqrt|ema, decay=0.8.",
)
Only = _flag(
    str | None, "--only", "REGEX", "Mix only tensors in whose name this is found, such as '^llm\\.'."
)
Exclude = _flag(str | None, "--exclude", "REGEX", "Do not mix these.")
CopyRest = _flag(str | None, "--copy-rest", "WHOSE", "Whose tensors the rest is: A, B, ... or an address.")
Rule = _flag(
    list[str] | None,
    "--rule",
    "REGEX=WEIGHTS",
    "By name, first match wins: mlp=0.3 (beta), mlp=1,2,1, head=exclude, embed=copy:B. Repeatable.",
)
Layers = _flag(str | None, "--layers", "FIRST:END", "With --curve: the layers that it spans.")
Curve = _flag(str | None, "--curve", "B,B[,B]...", "Betas at equal distances over --layers.")
Vocabulary = _flag(
    str | None,
    "--vocabulary",
    "HOW",
    "Inputs of different vocabularies: first, intersect, union by token, or pad.",
)
Dtype = _flag(
    str | None, "--dtype", "bf16|fp16|fp32|fp64", "Type of the mixed tensors; default: as in the inputs."
)
ShardSize = _flag(str | None, "--max-shard-size", "SIZE", "Bytes of tensors in one file; default 5GB.")
Spec = _flag(
    str | None,
    "--spec",
    "FILE",
    "YAML that says all of this, or mergekit's, unmodified; no other flags then.",
)


def spec_of(
    inputs: list[str] | None, rule: list[str] | None, layers: str | None, curve: str | None, **given: Any
) -> MergeSpec:
    """The spec that the flags say. Raises UserError in the words of the flags."""
    from data_pipeline.errors import UserError
    from pretrain.merge.spec import merge_spec

    for name in inputs or []:
        if name.endswith((".yml", ".yaml")):
            raise UserError(
                f"{name} says what to merge and holds no weights: dromos merge --spec {name} --out DIR"
            )
    method = given.get("method") or "linear"
    values = {name: value for name, value in given.items() if value is not None}
    for name in ("weights", "density"):
        if name in values:
            values[name] = numbers(f"--{name}", values[name])
    if "window" in values:
        values["window"] = _window(values["window"])
    rules = [_rule(text, len(inputs or []), method) for text in rule or []]
    if (layers is None) != (curve is None):
        raise UserError("--layers and --curve belong together: the layers, and the betas over them")
    if curve is not None:
        rules.append({"layers": layers, "curve": numbers("--curve", curve)})
    return merge_spec(values | {"inputs": inputs or [], "rules": rules}, "the flags")


def numbers(flag: str, text: str) -> list[float]:
    """`1,2,1` -> [1, 2, 1]."""
    from data_pipeline.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: write numbers with commas between them, such as 1,2,1") from None


def _rule(text: str, inputs: int, method: str) -> dict[str, Any]:
    from data_pipeline.errors import UserError

    pattern, equals, what = text.rpartition("=")
    if not equals or not what:
        raise UserError(f"--rule {text}: write REGEX=WEIGHTS, REGEX=exclude or REGEX=copy:B")
    if what == "exclude":
        return {"match": pattern, "exclude": True}
    if what.startswith("copy:"):
        return {"match": pattern, "copy_from": what.removeprefix("copy:")}
    given = numbers(f"--rule {pattern}", what)
    if len(given) == 1 and inputs == 2 and method in ("linear", "soup", "slerp"):
        return {"match": pattern, "beta": given[0]}
    return {"match": pattern, "weights": given}


def _window(text: str) -> dict[str, str]:
    from data_pipeline.errors import UserError

    run, *rest = text.split(",")
    pairs = [part.partition("=") for part in rest]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"--window {text}: write RUN/STAGE,KEY=VALUE,..., such as runs/r/real,last=8")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError(f"--window {text}: a key stands twice")
    return {"run": run} | {name: value for name, _, value in pairs}


def check_scored(flag: str, scored: bool, **given: object) -> None:
    """Raises UserError for flags of a score where no command is given that makes one."""
    from data_pipeline.errors import UserError

    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names and not scored:
        raise UserError(f"{', '.join(names)}: of scores, and nothing is scored; say how with {flag}")
