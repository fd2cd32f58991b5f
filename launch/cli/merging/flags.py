"""Options of the merge commands as type aliases, and the spec that the flags of `dromos merge` describe.

The modules that do the work are imported inside functions: `--help` needs none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pretrain.merge.spec import MergekitFile, MergeSpec
    from pretrain.merge.sweeps.scoring import Command


def _argument(kind: Any, metavar: str, help: str) -> Any:
    return Annotated[kind, typer.Argument(metavar=metavar, help=help)]


def _flag(kind: Any, flag: str, metavar: str | None, help: str, **settings: Any) -> Any:
    return Annotated[kind, typer.Option(flag, metavar=metavar, help=help, **settings)]


# --- inputs and outputs

ADDRESS = "An address, as for dromos merge."
A = _argument(str, "A", ADDRESS)
B = _argument(str, "B", ADDRESS)
Inputs = _argument(list[str], "A B [C]...", "Addresses, as for dromos merge.")
MergeInputs = _argument(
    list[str] | None,
    "A B [C]...",
    "RUN/STAGE[@STEP|@latest|@best], a folder or file of weights, a DeepSpeed checkpoint, s3://, hf://.",
)
OUT = "The folder or s3:// URL to write; it appears when complete."
Out = _flag(str | None, "--out", "DIR", OUT)
RequiredOut = _flag(str, "--out", "DIR", OUT)
SweepOut = _flag(str | None, "--out", "DIR", "The folder or s3:// URL of outputs and results.")
Durable = _flag(
    bool, "--durable", None, "Wait for the disk before DIR appears: DIR is complete even after a power cut."
)
DryRun = _flag(bool, "--dry-run", None, "Print the plan, write nothing.")

# --- how to merge

Beta = _flag(float | None, "--beta", "NUMBER", "Weight of A, from 0 to 1; B has the rest.")
Betas = _flag(str, "--betas", "START:STOP:STEP", "Both ends included; or a list, 0,0.5,1.")
Weights = _flag(
    str | None, "--weights", "W,W[,W]...", "One weight per input: shares (linear, slerp) or factors."
)
Method = _flag(
    str | None,
    "--method",
    "NAME",
    "linear (default), soup (equal weights), slerp, task_arithmetic, ties, dare_linear, dare_ties.",
)
SweepMethod = _flag(str, "--method", "NAME", "linear or slerp.")
Base = _flag(
    str | None, "--base", "ADDRESS", "Base model: task_arithmetic, ties and dare add differences to it."
)
Lambda = _flag(float | None, "--lambda", "NUMBER", "Factor of the summed differences; default 1.")
Density = _flag(
    str | None,
    "--density",
    "D[,D]...",
    "ties, dare: share of the differences to keep; one, or one per input.",
)
T = _flag(float | None, "--t", "NUMBER", "slerp: share of the SECOND input, which is 1 - beta.")
Seed = _flag(int | None, "--seed", "NUMBER", "dare: seed of the random drops; default 0.")
Normalize = _flag(
    bool | None,
    "--normalize/--no-normalize",
    None,
    "Divide by the sum of weights. Default: on for linear and ties, else off.",
)
Window = _flag(
    str | None,
    "--window",
    "RUN/STAGE,KEY=VALUE...",
    "Checkpoints of one run in place of inputs: last=8, or steps|samples|tokens=FIRST:LAST; every=N; "
    "schedule=uniform|linear|1-sqrt|ema, decay=0.8.",
)
Spec = _flag(
    str | None,
    "--spec",
    "FILE",
    "YAML file that describes the merge in place of flags, or an unmodified mergekit file.",
)

# --- which tensors, and how they are stored

Only = _flag(
    str | None, "--only", "REGEX", "Merge only tensors whose name contains a match, such as '^llm\\.'."
)
Exclude = _flag(str | None, "--exclude", "REGEX", "Do not merge tensors whose name contains a match.")
CopyRest = _flag(
    str | None, "--copy-rest", "INPUT", "Copy the other tensors from this input: A, B, ... or an address."
)
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
    "For inputs with different vocabularies: first, pad, or by token: intersect, union.",
)
Key = _flag(
    str | None,
    "--key",
    "NAME",
    "The state dict to read in .pt, .pth or .bin files that hold several, such as model_ema or model.encoder.",
)
Dtype = _flag(
    str | None, "--dtype", "bf16|fp16|fp32|fp64", "Type of the merged tensors; default: as in the inputs."
)
ShardSize = _flag(str | None, "--max-shard-size", "SIZE", "Bytes of tensors in one file; default 5GB.")

# --- scores

PROTOCOL = (
    "{} is replaced by the checkpoint folder. The command runs without a shell and must end its output with a number "
    "or a JSON object of numbers."
)
EvalCommand = _flag(str | None, "--eval-cmd", "CMD", f"Scores an output. {PROTOCOL}")
ScoreCommand = _flag(str | None, "--score-cmd", "CMD", f"Scores a model. {PROTOCOL}")
Metric = _flag(
    str | None, "--metric", "NAME", "The metric to compare; default: the first in the command's output."
)
Lower = _flag(
    bool | None,
    "--lower-is-better/--more-is-better",
    None,
    "Default: higher is better, unless an earlier run in this folder used the other direction for this metric.",
)
Timeout = _flag(
    float | None, "--timeout", "SECONDS", "Stop the command after this many seconds; default: never."
)
Keep = _flag(
    bool, "--keep/--no-keep", None, "Keep the outputs, or write one at a time and delete it once scored."
)
Uniform = _flag(bool, "--uniform", None, "The mean of all; needs no score.")

# --- reports

Chunks = _flag(int, "--chunks", "N", "Recompute N random chunks from the inputs.", min=0)
ChunkSeed = _flag(int, "--seed", "N", "Seed that chooses the chunks.")
Full = _flag(bool, "--full", None, "Recompute everything, and read all of the inputs.")
Depth = _flag(int, "--depth", "N", "Modules: the first N parts of a name; layers count as one.", min=1)
Top = _flag(int, "--top", "K", "List the K tensors that differ most.", min=0)
Picture = _flag(Path | None, "--picture", "FILE.svg", "Heat map of layers by modules; open it in a browser.")
Csv = _flag(Path | None, "--csv", "FILE", "Write one row per tensor to a file.")
MergeJson = _flag(bool, "--json", None, "With --dry-run: the plan as JSON; else the record of the merge.")
DiffJson = _flag(bool, "--json", None, "Print all results as JSON.")
VerifyJson = _flag(bool, "--json", None, "Print all findings as JSON.")


def read_spec(file: str, flags: dict[str, Any]) -> MergeSpec | MergekitFile:
    """The spec in `file`. Raises UserError if any of `flags`, by name, is set too."""
    from data_pipeline.errors import UserError
    from pretrain.merge.spec import load_spec

    if conflicting := [name for name, value in flags.items() if value is not None]:
        names = ", ".join(conflicting).replace("_", "-")
        raise UserError(f"--spec describes the whole merge; leave {names} out, or write it into the spec")
    return load_spec(file)


def spec_of(
    inputs: list[str] | None, rule: list[str] | None, layers: str | None, curve: str | None, **flags: Any
) -> MergeSpec:
    """The spec that the flags describe. Raises UserError that names the flag."""
    from data_pipeline.errors import UserError
    from pretrain.merge.spec import merge_spec

    for name in inputs or []:
        if name.endswith((".yml", ".yaml")):
            raise UserError(
                f"{name} is a spec, not a file of weights; write: dromos merge --spec {name} --out DIR"
            )
    method = flags.get("method") or "linear"
    values = {name: value for name, value in flags.items() if value is not None}
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
    """`1,2,1` -> [1, 2, 1]. Raises UserError."""
    from data_pipeline.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: write numbers with commas between them, such as 1,2,1") from None


def _rule(text: str, inputs: int, method: str) -> dict[str, Any]:
    """REGEX=WEIGHTS as a rule of the spec; `inputs` is the number of inputs."""
    from data_pipeline.errors import UserError

    pattern, equals, action = text.rpartition("=")
    if not equals or not action:
        raise UserError(f"--rule {text}: write REGEX=WEIGHTS, REGEX=exclude or REGEX=copy:B")
    if action == "exclude":
        return {"match": pattern, "exclude": True}
    if action.startswith("copy:"):
        return {"match": pattern, "copy_from": action.removeprefix("copy:")}
    weights = numbers(f"--rule {pattern}", action)
    if len(weights) == 1 and inputs == 2 and method in ("linear", "soup", "slerp"):
        return {"match": pattern, "beta": weights[0]}
    return {"match": pattern, "weights": weights}


def _window(text: str) -> dict[str, str]:
    """RUN/STAGE,KEY=VALUE,... as a window of the spec."""
    from data_pipeline.errors import UserError

    run, *rest = text.split(",")
    pairs = [part.partition("=") for part in rest]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"--window {text}: write RUN/STAGE,KEY=VALUE,..., such as runs/r/real,last=8")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError(f"--window {text}: a key appears twice")
    return {"run": run} | {name: value for name, _, value in pairs}


def score_command(
    flag: str, text: str | None, metric: str | None, lower_is_better: bool | None, timeout: float | None
) -> Command | None:
    """The command that scores a model, None without one. It is killed when this process ends.

    Raises UserError for a command that cannot run, and for options of a score without a command.
    """
    from data_pipeline.errors import UserError
    from launch.supervise.guard import guarded
    from pretrain.merge.sweeps.scoring import parse_command

    if text is not None:
        return parse_command(text, flag, timeout, guarded)
    options = {"--metric": metric, "--lower-is-better": lower_is_better, "--timeout": timeout}
    if useless := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{', '.join(useless)}: only for scores, and nothing is scored; add {flag}")
    return None
