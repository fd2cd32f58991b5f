"""The address grammar of weights: a stage name, RUN/STAGE[@STEP], a path, s3://, hf://, open_clip://."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import UserError
from pretrain.run import metrics_log
from pretrain.run.folder import (
    complete_steps,
    is_complete,
    read_mapping,
    read_record,
    step_of,
    tag_of,
)

Kind = Literal["checkpoint", "folder", "file", "open_clip", "hf"]
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")  # ORG/NAME
AT_STEP = re.compile(r"^(?P<base>.+)@(?P<at>\d+|latest|best)$")
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Located:
    """The weights that an address names.

    kind:      checkpoint (a folder in DeepSpeed's layout), folder (of safetensors), file, open_clip or hf.
    path:      local path or s3:// URL; for open_clip and hf the part after `://` (`org/name@rev`).
    stage_dir: the folder whose resolved.yaml describes the model and which may hold frozen.safetensors: the stage that
               wrote the weights, or the output folder of `dromos merge`. None if there is none.
    step:      optimizer steps done when the checkpoint was saved; None for other kinds.
    """

    kind: Kind
    path: str
    stage_dir: Path | None = None
    step: int | None = None


class StageNotReady(UserError):
    """The addressed stage has not run or has not finished.

    The message is `before` + the command that runs the stage + `after`. A caller that knows the recipe replaces
    the general command with its own through `with_command`.
    """

    def __init__(self, stage: str, before: str, after: str = "") -> None:
        super().__init__(f"{before}dromos run RECIPE --stage {stage}{after}")
        self.stage, self.before, self.after = stage, before, after

    def with_command(self, command: str) -> str:
        """The message with `command` as the command that runs the stage."""
        return f"{self.before}{command}{self.after}"


def locate(address: str, run_dir: Path | None = None) -> Located:
    """Resolve `address`. A bare name is a stage of `run_dir`; in RUN/STAGE, RUN may be a run beside `run_dir`.

    Without @STEP, @latest or @best a stage must have finished at its newest checkpoint (result.json names the step),
    so that no stage starts by accident from a half-trained one. Raises UserError that names the stage and the command
    that trains it.
    """
    address = str(address).strip()
    if not address:
        raise UserError("empty address: write STAGE, RUN/STAGE[@STEP], a path, s3://, hf:// or open_clip://")
    if "://" in address:
        return _locate_url(address)
    match = AT_STEP.match(address)
    base, at = (match["base"], match["at"]) if match else (address, None)
    literal = Path(address).expanduser()
    if at and _is_path(address) and literal.exists():  # the @ may be a part of the path
        return _locate_path(literal, None, address)
    if not _is_path(base):
        if run_dir is not None:
            return _locate_stage(Path(run_dir) / base, at, address)
        if literal.exists():
            return _locate_path(literal, None, address)
        suggestion = _did_you_mean(literal)
        raise UserError(
            f"{address}: not found{suggestion or '.'} Name a stage as RUN/STAGE, for example runs/demo/{base}"
        )
    candidates = [Path(base).expanduser()]
    if run_dir is not None and not candidates[0].is_absolute() and base.split("/")[0] not in (".", ".."):
        candidates.append(Path(run_dir).parent / base)
    stages = {c.resolve(): c for c in candidates if is_stage(c)}
    if len(stages) > 1:
        both = " and ".join(str(c) for c in stages.values())
        raise UserError(f"{address} is ambiguous: {both} are both stages; write ./{base} or an absolute path")
    for stage in stages.values():
        return _locate_stage(stage, at, address)
    for candidate in candidates:
        if candidate.exists():
            return _locate_path(candidate, at, address)
    raise _not_found(candidates, address)


def is_stage(folder: Path) -> bool:
    """True for a stage folder of a run: it holds files that a stage writes and `dromos merge` does not."""
    if not folder.is_dir() or (folder / "merge.json").exists() or (folder / "recipe.yaml").exists():
        return False
    stage_files = (folder / "resolved.yaml", folder / "result.json")
    return any(file.exists() for file in stage_files) or any((folder / "checkpoints").glob("step_*"))


def best_step(stage_dir: Path, steps: list[int], address: str) -> int:
    """The step among `steps` with the best evaluation in metrics.jsonl: highest mean accuracy, else lowest mean NLL.

    If several are equally good, returns the last. Raises UserError if none of them was evaluated.
    """
    scores: dict[int, float] = {}
    for row in metrics_log.read(stage_dir / "metrics.jsonl"):
        if row.get("step") in steps and (score := _score(row.get("eval"))) is not None:
            scores[row["step"]] = score
    if not scores:
        raise UserError(
            f"{address}: no complete checkpoint of {stage_dir} has an evaluation; write @STEP or @latest"
        )
    return max(scores, key=lambda step: (scores[step], step))


def model_stage(stage_dir: Path) -> Path | None:
    """The folder of the training stage that defines the model; for a merge, that of `copy_rest` or its first input."""
    record = read_record(stage_dir, any_schema=True)
    if record is None:
        return None
    stage = record["stage"]
    if stage.get("kind") != "merge":
        return stage_dir
    inputs = stage.get("inputs")
    address = stage.get("copy_rest") or next(iter(inputs if isinstance(inputs, dict) else ()), None)
    if address is None:
        return None
    parent = locate(address, stage_dir.parent)
    return model_stage(parent.stage_dir) if parent.stage_dir is not None else None


def _score(evaluation: Any) -> float | None:
    """Mean of the accuracies of an evaluation, else minus the mean of its losses; None if it has neither."""
    metrics = _named_numbers("", evaluation)
    accuracies = [value for name, value in metrics if re.search(r"top_?1$|accuracy$", name)]
    losses = [-value for name, value in metrics if re.search(r"nll$|loss$|perplexity$", name)]
    chosen = accuracies or losses
    return sum(chosen) / len(chosen) if chosen else None


def _named_numbers(name: str, value: Any) -> list[tuple[str, float]]:
    """(dotted name, number) of all numbers in nested dicts."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _named_numbers(f"{name}.{key}", inner)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [(name, float(value))] if is_number else []


def _is_path(text: str) -> bool:
    return "/" in text or text.startswith(("~", ".")) or text.endswith(FILE_SUFFIXES)


def _locate_url(address: str) -> Located:
    scheme, rest = address.split("://", 1)
    if not rest:
        raise UserError(f"{address}: nothing follows ://")
    if scheme == "s3":
        return Located("file" if rest.endswith(FILE_SUFFIXES) else "folder", address.rstrip("/"))
    if scheme == "open_clip":
        return Located("open_clip", rest)
    if scheme == "hf":
        return Located("hf", rest)
    raise UserError(f"{address}: unknown scheme {scheme}://; known are s3://, hf:// and open_clip://")


def _locate_stage(stage: Path, at: str | None, address: str) -> Located:
    if not is_stage(stage):
        raise _not_found([stage], address)
    result = _read_result(stage)
    if (stage / "weights").is_dir():
        if at and at.isdigit():
            raise UserError(f"{address}: {stage} is a merge stage and has no steps; leave @{at} out")
        if result is None:
            raise StageNotReady(
                stage.name, f"{address}: stage {stage.name} of {stage.parent} has not finished; run: "
            )
        return Located("folder", str(stage / "weights"), stage)
    steps = complete_steps(stage / "checkpoints")
    if not steps:
        raise StageNotReady(
            stage.name,
            f"{address}: stage {stage.name} of {stage.parent} has no complete checkpoint yet; run: ",
        )
    newest = max(steps)
    if at is None and (result is None or result.get("step") != newest):
        ended = f"result.json is of step {result.get('step')}; " if result else ""
        raise StageNotReady(
            stage.name,
            f"{address}: stage {stage.name} of {stage.parent} has not finished ({ended}newest checkpoint: step "
            f"{newest}); run: ",
            ", or write @latest to use it as it is",
        )
    step = newest
    if at == "best":
        step = best_step(stage, steps, address)
    elif at and at.isdigit():
        step = int(at)
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"{address}: no complete checkpoint at step {step}; {stage} has steps {known}")
    return Located("checkpoint", str(stage / "checkpoints" / tag_of(step)), stage, step)


def _read_result(stage: Path) -> dict[str, Any] | None:
    """The content of a stage's result.json; None if the stage has not finished. Raises UserError if it is damaged."""
    return read_mapping(stage / "result.json", "delete it to run the stage again")


def _locate_path(path: Path, at: str | None, address: str) -> Located:
    if is_stage(path):
        return _locate_stage(path, at, address)
    if at is not None:
        raise UserError(f"{address}: @{at} needs a stage of a run, and {path} is not one")
    if path.is_file():
        return Located("file", str(path))
    stage = path.parent.parent if path.parent.name == "checkpoints" else None
    step = step_of(path.name)
    if step is not None and stage is not None:
        if not is_complete(path):
            raise UserError(
                f"{address}: this checkpoint is not complete (it has no file COMPLETE); choose another step"
            )
        return Located("checkpoint", str(path), stage, step)
    if any(path.glob("*_states.pt")):
        return Located("checkpoint", str(path))
    if (path / "latest").is_file():  # a DeepSpeed folder of another program: `latest` names the tag
        tag = path / (path / "latest").read_bytes()[:4096].decode("utf-8", "replace").strip()
        if tag.parent == path and tag.is_dir():
            return Located("checkpoint", str(tag))
    if (path / "recipe.yaml").exists():
        stages = ", ".join(sorted(p.name for p in path.iterdir() if is_stage(p))) or "none yet"
        raise UserError(f"{address}: this is a run folder; add the stage, {path}/STAGE (stages: {stages})")
    if path.name == "weights" and is_stage(path.parent):
        return Located("folder", str(path), path.parent)
    return Located("folder", str(path), path if (path / "resolved.yaml").exists() else None)


def _not_found(candidates: list[Path], address: str) -> UserError:
    paths = " or ".join(str(c) for c in candidates)
    stage = candidates[0].name
    for candidate in candidates:
        if (candidate.parent / "recipe.yaml").exists():
            return StageNotReady(stage, f"{address}: stage {stage} of {candidate.parent} has not run; run: ")
    if suggestion := _did_you_mean(candidates[0]):
        return UserError(f"{address}: not found{suggestion}")
    hub = f"; on the Hugging Face hub it is hf://{address}" if HUB_NAME.match(address) else ""
    return StageNotReady(stage, f"{address}: not found (tried {paths}); if it is a stage, run: ", hub)


def _did_you_mean(path: Path) -> str:
    """`; did you mean ...?` if the folder holds an entry with a similar name, else an empty string."""
    try:
        names = {child.name for child in path.absolute().parent.iterdir()}
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""
