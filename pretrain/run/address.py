"""The one address grammar of weights: a stage name, RUN/STAGE@STEP, a path, s3://, hf://, open_clip://."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from data_pipeline.errors import UserError
from pretrain.run import metrics_log
from pretrain.run.folder import complete_steps, is_complete, step_of, tag_of

Kind = Literal["checkpoint", "folder", "file", "open_clip", "hf"]
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
WHICH = re.compile(r"^(?P<base>.+)@(?P<which>\d+|latest|best)$")
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Located:
    """Where an address leads.

    kind:      checkpoint (a folder in DeepSpeed's layout), folder (safetensors inside), file, open_clip, hf.
    path:      local path or s3:// URL; for open_clip and hf what stands after `://` (`org/name@rev`).
    stage_dir: the folder whose resolved.yaml says what the model is (frozen.safetensors may be there): the
               stage that wrote it, or the output folder of `dromos merge`.
    step:      steps done when the checkpoint was saved; None outside checkpoints.
    """

    kind: Kind
    path: str
    stage_dir: Path | None = None
    step: int | None = None


class StageNotReady(UserError):
    """The addressed stage has not run or has not finished.

    The message is `before`, the command that runs the stage, and `after`. A caller that knows the recipe replaces
    the general command by its own with `with_command`.
    """

    def __init__(self, stage: str, before: str, after: str = "") -> None:
        super().__init__(f"{before}dromos run RECIPE --stage {stage}{after}")
        self.stage, self.before, self.after = stage, before, after

    def with_command(self, command: str) -> str:
        """The message with `command` as the command that runs the stage."""
        return f"{self.before}{command}{self.after}"


def locate(address: str, run_dir: Path | None = None) -> Located:
    """Resolve `address`; a bare name is a stage of `run_dir`, a bare RUN is looked up beside `run_dir`.

    Without @STEP, @latest or @best a stage must have finished, with its newest checkpoint (result.json names the
    step): nothing starts by accident from half a predecessor. Raises UserError naming the stage and the command
    that makes it.
    """
    address = str(address).strip()
    if not address:
        raise UserError("empty address: write STAGE, RUN/STAGE[@STEP], a path, s3://, hf:// or open_clip://")
    if "://" in address:
        return _remote(address)
    found = WHICH.match(address)
    base, which = (found["base"], found["which"]) if found else (address, None)
    literal = Path(address).expanduser()
    if which and _is_path(address) and literal.exists():  # a path may hold an @ of its own
        return _path(literal, None, address)
    if not _is_path(base):
        if run_dir is not None:
            return _stage(Path(run_dir) / base, which, address)
        if literal.exists():
            return _path(literal, None, address)
        meant = _near(literal)
        raise UserError(
            f"{address}: nothing there{meant or '.'} A stage is addressed as RUN/STAGE, for example runs/demo/{base}"
        )
    candidates = [Path(base).expanduser()]
    if run_dir is not None and not candidates[0].is_absolute() and base.split("/")[0] not in (".", ".."):
        candidates.append(Path(run_dir).parent / base)
    stages = {c.resolve(): c for c in candidates if is_stage(c)}
    if len(stages) > 1:
        both = " and ".join(str(c) for c in stages.values())
        raise UserError(f"{address}: {both} are both stages; write ./{base} or an absolute path")
    for stage in stages.values():
        return _stage(stage, which, address)
    for candidate in candidates:
        if candidate.exists():
            return _path(candidate, which, address)
    raise _absent(candidates, address)


def is_stage(folder: Path) -> bool:
    """A stage folder of a run: it holds what only a stage writes, and is not the output of `dromos merge`."""
    if not folder.is_dir() or (folder / "merge.json").exists() or (folder / "recipe.yaml").exists():
        return False
    marks = (folder / "resolved.yaml", folder / "result.json")
    return any(mark.exists() for mark in marks) or any((folder / "checkpoints").glob("step_*"))


def best_step(stage_dir: Path, steps: list[int], address: str) -> int:
    """The one of `steps` with the best evaluation in metrics.jsonl: highest mean top-1, else lowest NLL."""
    scores: dict[int, float] = {}
    for row in metrics_log.read(stage_dir / "metrics.jsonl"):
        if row.get("step") in steps and (score := _score(row.get("eval"))) is not None:
            scores[row["step"]] = score
    if not scores:
        raise UserError(
            f"{address}: no complete checkpoint of {stage_dir} has an evaluation; write @STEP or @latest"
        )
    return max(scores, key=lambda step: (scores[step], step))


def _score(evaluation: Any) -> float | None:
    figures = list(_figures("", evaluation))
    rising = [value for name, value in figures if re.search(r"top_?1$|accuracy$", name)]
    falling = [-value for name, value in figures if re.search(r"nll$|loss$|perplexity$", name)]
    chosen = rising or falling
    return sum(chosen) / len(chosen) if chosen else None


def _figures(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [figure for key, inner in value.items() for figure in _figures(f"{name}.{key}", inner)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [(name, float(value))] if is_number else []


def _is_path(text: str) -> bool:
    return "/" in text or text.startswith(("~", ".")) or text.endswith(FILE_SUFFIXES)


def _remote(address: str) -> Located:
    scheme, rest = address.split("://", 1)
    if not rest:
        raise UserError(f"{address}: nothing stands after ://")
    if scheme == "s3":
        return Located("file" if rest.endswith(FILE_SUFFIXES) else "folder", address.rstrip("/"))
    if scheme == "open_clip":
        return Located("open_clip", rest)
    if scheme == "hf":
        return Located("hf", rest)
    raise UserError(f"{address}: unknown scheme {scheme}://; known are s3://, hf:// and open_clip://")


def _stage(stage: Path, which: str | None, address: str) -> Located:
    if not is_stage(stage):
        raise _absent([stage], address)
    result = _result(stage)
    if (stage / "weights").is_dir():
        if which and which.isdigit():
            raise UserError(f"{address}: {stage} is a merge stage and has no steps; leave @{which} out")
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
    if which is None and (result is None or result.get("step") != newest):
        ended = f"it once ended at step {result.get('step')}, the " if result else ""
        raise StageNotReady(
            stage.name,
            f"{address}: stage {stage.name} of {stage.parent} has not finished ({ended}newest checkpoint: step "
            f"{newest}); run: ",
            ", or write @latest to take it as it is",
        )
    step = newest
    if which == "best":
        step = best_step(stage, steps, address)
    elif which and which.isdigit():
        step = int(which)
        if step not in steps:
            have = ", ".join(map(str, steps))
            raise UserError(f"{address}: no complete checkpoint at step {step}; {stage} has steps {have}")
    return Located("checkpoint", str(stage / "checkpoints" / tag_of(step)), stage, step)


def _result(stage: Path) -> dict[str, Any] | None:
    """What a stage wrote at its end; None while it has not ended."""
    path = stage / "result.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what a stage writes there; delete it to run the stage again")
    return content


def _path(path: Path, which: str | None, address: str) -> Located:
    if is_stage(path):
        return _stage(path, which, address)
    if which is not None:
        raise UserError(f"{address}: @{which} belongs to a stage of a run, and {path} is none")
    if path.is_file():
        return Located("file", str(path))
    stage = path.parent.parent if path.parent.name == "checkpoints" else None
    step = step_of(path.name)
    if step is not None and stage is not None:
        if not is_complete(path):
            raise UserError(
                f"{address}: this checkpoint is not complete (no COMPLETE in it); take another step"
            )
        return Located("checkpoint", str(path), stage, step)
    if any(path.glob("*_states.pt")):
        return Located("checkpoint", str(path))
    if (path / "latest").is_file():  # a foreign DeepSpeed folder: `latest` names the tag
        tag = path / (path / "latest").read_bytes()[:4096].decode("utf-8", "replace").strip()
        if tag.parent == path and tag.is_dir():
            return Located("checkpoint", str(tag))
    if (path / "recipe.yaml").exists():
        stages = ", ".join(sorted(p.name for p in path.iterdir() if is_stage(p))) or "none yet"
        raise UserError(f"{address}: this is a run folder; add the stage, {path}/STAGE (stages: {stages})")
    if path.name == "weights" and is_stage(path.parent):
        return Located("folder", str(path), path.parent)
    return Located("folder", str(path), path if (path / "resolved.yaml").exists() else None)


def _absent(candidates: list[Path], address: str) -> UserError:
    looked = " or ".join(str(c) for c in candidates)
    stage = candidates[0].name
    for candidate in candidates:
        if (candidate.parent / "recipe.yaml").exists():
            return StageNotReady(stage, f"{address}: stage {stage} of {candidate.parent} has not run; run: ")
    if meant := _near(candidates[0]):
        return UserError(f"{address}: not found{meant}")
    hub = f"; on the Hugging Face hub it is hf://{address}" if HUB_NAME.match(address) else ""
    return StageNotReady(
        stage, f"{address}: not found (looked for {looked}); if it is a stage, make it: ", hub
    )


def _near(path: Path) -> str:
    """`; did you mean ...?` where something of almost that name lies beside it."""
    try:
        there = {child.name for child in path.absolute().parent.iterdir()}
    except OSError:
        return ""
    close = get_close_matches(path.name, there, n=1, cutoff=0.75)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def model_stage(stage_dir: Path) -> Path | None:
    """The folder of the training stage whose model these weights have: a merge has that of its parent."""
    path = stage_dir / "resolved.yaml"
    if not path.is_file():
        return None
    stage = yaml.safe_load(path.read_text())["stage"]
    if stage.get("kind") != "merge":
        return stage_dir
    parent = locate(stage.get("copy_rest") or next(iter(stage["inputs"])), stage_dir.parent)
    return model_stage(parent.stage_dir) if parent.stage_dir is not None else None
