"""Rules of a recipe that the schema cannot express: between fields, between stages, batch and world size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.order.mixture_weights import check_shares, share_mistake
from pretrain.recipe.architectures import arch_mistake, arch_patch, read_arch
from pretrain.recipe.kinds import KINDS
from pretrain.recipe.parameter_names import SHORT_NAMES, expression_mistake
from pretrain.recipe.schema import MergeStage, Recipe, TrainStage
from pretrain.recipe.schema_errors import did_you_mean
from pretrain.recipe.sections.data import Stream
from pretrain.recipe.sections.evaluation import Perplexity
from pretrain.recipe.unsupported import unsupported_features
from pretrain.recipe.yaml_file import Key

# Keys of model.vision that describe a new tower.
OF_A_NEW_TOWER = ("arch", "width", "layers", "head_width", "patch", "mlp_ratio", "positions", "pool")


@dataclass(frozen=True)
class Problem:
    """A mistake: the stage (`run` for the run section), the key, and the message that follows the key."""

    stage: str
    key: Key
    text: str


def unsupported_problems(name: str, stage: TrainStage | MergeStage) -> list[Problem]:
    """A problem for each feature that the stage uses and this version does not implement."""
    if not isinstance(stage, TrainStage):
        return []
    return [Problem(name, key, f"{words} is not available yet") for key, words in unsupported_features(stage)]


def check_stages(recipe: Recipe) -> list[Problem]:
    """Rules between stages: every stage that is named exists and comes earlier in the file."""
    problems: list[Problem] = []
    run_name = recipe.run.name
    if recipe.run.dir is None and (not run_name or run_name in (".", "..") or re.search(r"[/\\]", run_name)):
        problems.append(
            Problem("run", ("name",), f"{run_name!r} is not a valid folder name for runs/NAME; write run.dir")
        )
    earlier: list[str] = []
    for name, stage in recipe.stages.items():
        for key, address in addresses(stage):
            problems += _check_address(name, key, address, earlier, list(recipe.stages))
        if isinstance(stage, TrainStage):
            problems += _check_start_and_order(name, stage, recipe)
        earlier.append(name)
    return problems


def addresses(stage: TrainStage | MergeStage) -> Iterator[tuple[Key, str]]:
    """(key, address) of all weights that a stage reads."""
    if isinstance(stage, MergeStage):
        for address in stage.inputs:
            yield ("inputs", address), address
        if stage.copy_rest is not None:
            yield ("copy_rest",), stage.copy_rest
        return
    if stage.init is not None:
        yield ("init",), stage.init
    if stage.continue_ is not None:
        yield ("continue",), stage.continue_
    for index, tower in enumerate(stage.model.vision or []):
        if tower.init is not None:
            yield ("model", "vision", str(index), "init"), tower.init
    if stage.model.llm is not None and stage.model.llm.init is not None:
        yield ("model", "llm", "init"), stage.model.llm.init


def stage_name(address: str) -> str:
    """`masked@500` -> `masked`; a path or URL is returned unchanged."""
    return address if "://" in address or "/" in address else address.partition("@")[0]


def _check_address(name: str, key: Key, address: str, earlier: list[str], names: list[str]) -> list[Problem]:
    bare = stage_name(address)
    if not address.strip():
        return [Problem(name, key, "is empty; write a stage, RUN/STAGE, a path or a URL")]
    if "://" in address or "/" in address or bare in earlier:
        return []
    if bare == name:
        return [Problem(name, key, "a stage cannot start from itself")]
    if bare in names:
        return [
            Problem(name, key, f"stage {bare!r} comes after {name!r} in the file; move it before {name!r}")
        ]
    if Path(address).exists():
        return []
    known = f"; the stages before it are {', '.join(earlier)}" if earlier else ""
    text = f"{address!r} is not a stage of this recipe{did_you_mean(bare, earlier) or known}"
    return [Problem(name, key, f"{text}; for another run write RUN/STAGE")]


def _check_start_and_order(name: str, stage: TrainStage, recipe: Recipe) -> list[Problem]:
    problems: list[Problem] = []
    if stage.init is not None and stage.continue_ is not None:
        problems.append(
            Problem(name, ("continue",), "write init (weights only) or continue (everything), not both")
        )
    source = stage_name(stage.continue_) if stage.continue_ else None
    if source in recipe.stages and isinstance(recipe.stages[source], MergeStage):
        problems.append(
            Problem(
                name,
                ("continue",),
                f"{source!r} is a merge stage and has no optimizer state; write init: {source}",
            )
        )
    for stream_name, stream in stage.data.items():
        if stream.order_as is None:
            continue
        key, other = ("data", stream_name, "order_as"), recipe.stages.get(stream.order_as)
        if other is None or stream.order_as == name:
            others = [known for known in recipe.stages if known != name]
            text = f"{stream.order_as!r} is not another stage of this recipe{did_you_mean(stream.order_as, others)}"
            problems.append(Problem(name, key, text))
        elif not isinstance(other, TrainStage) or stream_name not in other.data:
            problems.append(Problem(name, key, f"stage {stream.order_as!r} has no stream {stream_name!r}"))
    return problems


def check_stage(name: str, stage: TrainStage | MergeStage, recipe: Recipe) -> list[Problem]:
    """Rules inside one stage."""
    if isinstance(stage, MergeStage):
        mistakes = [*_check_merge(stage), *_check_perplexity(stage, recipe)]
        return [Problem(name, key, text) for key, text in mistakes]
    mistakes = [*_check_training(stage), *_check_evaluation(stage), *_check_perplexity(stage, recipe)]
    mistakes += [*_check_streams(stage), *_check_towers(stage), *KINDS[stage.objective.kind].check(stage)]
    if not any(key == ("model", "freeze") for key, _ in mistakes):
        mistakes += _check_freeze(stage)
    return [Problem(name, key, text) for key, text in mistakes]


def _check_merge(stage: MergeStage) -> Iterator[tuple[Key, str]]:
    if stage.only is not None:
        try:
            re.compile(stage.only)
        except re.error as error:
            yield ("only",), f"{stage.only!r} is not a valid regular expression: {error}"


def _check_training(stage: TrainStage) -> Iterator[tuple[Key, str]]:
    written = [name for name in ("steps", "samples", "epochs") if getattr(stage.train, name) is not None]
    if len(written) != 1:
        yield ("train",), f"write exactly one of steps, samples, epochs; here: {', '.join(written) or 'none'}"
    if stage.optimizer.lr is None and stage.optimizer.lr_per_256 is None:
        yield ("optimizer",), "has no learning rate; write optimizer.lr or optimizer.lr_per_256"
    if stage.checkpoint.every.value == 0:
        yield ("checkpoint", "every"), "must be longer than 0"
    for expression in stage.init_allow or []:
        try:
            re.compile(expression)
        except re.error as error:
            yield ("init_allow",), f"{expression!r} is not a valid regular expression: {error}"
    for expression in stage.model.freeze:
        if mistake := expression_mistake(expression):
            yield ("model", "freeze"), mistake
    for index, group in enumerate(stage.optimizer.groups or []):
        at = ("optimizer", "groups", str(index))
        if mistake := expression_mistake(group.match):
            yield (*at, "match"), mistake
        if (group.lr, group.lr_scale, group.weight_decay, group.warmup) == (None,) * 4:
            yield at, "changes nothing; write lr, lr_scale, weight_decay or warmup, or remove the group"


def _check_towers(stage: TrainStage) -> Iterator[tuple[Key, str]]:
    """Towers that pretrain/models/clip.py cannot build."""
    model = stage.model
    for index, tower in enumerate(model.vision or []):
        at = ("model", "vision", str(index))
        mistake = arch_mistake(tower.arch) if tower.arch else None
        if mistake:
            yield (*at, "arch"), mistake
        if tower.init is not None:
            ignored = [key for key in OF_A_NEW_TOWER if getattr(tower, key) is not None]
            for key in ignored:
                yield (*at, key), f"has no effect beside init: {tower.init}; leave it out"
        if mistake or tower.init is not None:
            continue
        missing = [key for key in ("width", "layers", "patch") if getattr(tower, key) is None]
        if not tower.arch and missing:
            yield at, f"needs width, layers and patch, or arch (missing: {', '.join(missing)})"
        known: dict[str, Any] = (read_arch(tower.arch) or {}).get("vision_cfg", {}) if tower.arch else {}
        for key in ("head_width", "mlp_ratio"):
            if tower.arch and getattr(tower, key) is not None:
                yield (
                    (*at, key),
                    f"is that of {tower.arch}; leave it out, or write width, layers and patch for arch",
                )
        width, head = tower.width or known.get("width"), known.get("head_width") or tower.head_width or 64
        if width is not None and width % head:
            yield (*at, "width"), f"{width} is not a multiple of the width of a head, {head}"
    arch = next((tower.arch for tower in model.vision or [] if tower.arch), None)
    if model.text is not None:
        known = (read_arch(arch) or {}).get("text_cfg", {}) if arch else {}
        width, heads = model.text.width or known.get("width", 512), model.text.heads or known.get("heads", 8)
        if width % heads:
            yield ("model", "text", "width"), f"{width} is not a multiple of the number of heads, {heads}"


def _check_freeze(stage: TrainStage) -> Iterator[tuple[Key, str]]:
    """Short names of parts that the model lacks, and streams that pass through frozen parts alone."""
    model = stage.model
    towers = model.vision or []
    has_text = model.text is not None or (model.llm is None and any(tower.arch for tower in towers))
    parts = {"vision": bool(towers), "text": has_text, "llm": model.llm is not None}
    parts["connector"] = parts["vision"] and parts["llm"]
    for name in SHORT_NAMES:
        if name in model.freeze and not parts[name]:
            yield (
                ("model", "freeze"),
                f"{name!r} matches no parameter: the model of this stage has no such part",
            )
        for index, group in enumerate(stage.optimizer.groups or []):
            if group.match == name and not parts[name]:
                yield (
                    ("optimizer", "groups", str(index), "match"),
                    f"{name!r} matches no parameter: the model of this stage has no such part",
                )
    if "llm" not in model.freeze:
        return
    for name, stream in stage.data.items():
        if stream.image is None or "connector" in model.freeze or not parts["connector"]:
            yield (
                ("data", name),
                "no parameter that this stream uses is trained (model.freeze: "
                f"{', '.join(model.freeze)}); freeze less, or remove the stream (data.{name}: null)",
            )


def _check_streams(stage: TrainStage) -> Iterator[tuple[Key, str]]:
    if not stage.data:
        yield ("data",), "has no stream; write data.STREAM with sources and batch"
    needed = KINDS[stage.objective.kind].fields(stage)
    for name, stream in stage.data.items():
        at = ("data", name)
        if not stream.sources:
            yield (*at, "sources"), "has no source; write sources: {NAME: PATH}"
        yield from _check_shares((*at, "sources"), stream)
        yield from _check_arrays(at, stream, stage.objective.kind, needed.get(name, ()))
        if stream.lanes is not None and stream.batches.divisor % stream.lanes:
            near = ", ".join(map(str, nearest_divisors(stream.batches.divisor, stream.lanes)))
            yield (
                (*at, "lanes"),
                f"a batch of {stream.batches} cannot be divided into {stream.lanes} lanes; nearest: {near}",
            )
        if stream.image is not None:
            low, high = stream.image.crop
            if not 0 < low <= high <= 1:
                yield (
                    (*at, "image", "crop"),
                    f"[{low}, {high}] is not a range of area fractions; write [LOW, HIGH] with 0 < LOW <= HIGH <= 1",
                )
            patches = [patch for tower in stage.model.vision or [] if (patch := arch_patch(tower))]
            if any(stream.image.size % patch for patch in patches):
                yield (
                    (*at, "image", "size"),
                    f"{stream.image.size} is not a multiple of the patch size ({patches[0]} pixels)",
                )


def _check_arrays(at: Key, stream: Stream, kind: str, reads: Sequence[str]) -> Iterator[tuple[Key, str]]:
    """The objective reads all arrays of the stream, and no others."""
    if stream.image is not None and stream.text is not None and stream.text.images == "none":
        yield (*at, "image"), f"does not go with text.format {stream.text.format}; remove one of them"
        return
    if "pixels" in reads and stream.image is None:
        yield (*at, "image"), f"is missing; {kind} needs the images of this stream"
    if "pixels" not in reads and stream.image is not None:
        yield (*at, "image"), f"has no effect: {kind} does not read the images of this stream"
    of_text = [array for array in reads if array != "pixels"]
    if of_text and stream.text is None:
        yield (*at, "text"), f"is missing; {kind} needs the text of this stream"
    if stream.text is not None:
        has, name = stream.text.arrays, stream.text.format
        if absent := [array for array in of_text if array not in has]:
            yield (*at, "text", "format"), f"{name} gives no {' and '.join(absent)}, which {kind} needs"
        if unread := [array for array in has if array not in of_text]:
            yield (*at, "text", "format"), f"{name} gives {' and '.join(unread)}, which {kind} does not read"


def _check_shares(at: Key, stream: Stream) -> Iterator[tuple[Key, str]]:
    wrong = {name: share_mistake(source) for name, source in stream.sources.items()}
    if any(wrong.values()):
        yield from (((*at, name), text) for name, text in wrong.items() if text)
    elif stream.sources:
        try:
            check_shares(stream.sources)
        except UserError as error:
            # The weights contradict each other; the error is reported at the largest one, the likeliest mistake.
            largest = max(stream.sources, key=lambda name: stream.sources[name].weight or 0)
            yield (*at, largest, "weight"), str(error)


def _check_evaluation(stage: TrainStage) -> Iterator[tuple[Key, str]]:
    evaluation = stage.eval
    if evaluation.every is not None and evaluation.every.value == 0:
        yield ("eval", "every"), "must be longer than 0; leave it out to evaluate at the end only"
    unmet = {
        key: task
        for key, _, task in evaluation.tasks()
        if not set(task.needs) <= set(KINDS[stage.objective.kind].predicts)
    }
    for key, task in unmet.items():
        kinds = ", ".join(kind for kind, spec in KINDS.items() if set(task.needs) <= set(spec.predicts))
        yield ("eval", key), f"needs {task.needs_words}, as objective.kind: {kinds} has"


def _check_perplexity(stage: TrainStage | MergeStage, recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """The stream of a perplexity task exists in some stage of the recipe; stages without it skip the task."""
    training = [other for other in recipe.stages.values() if isinstance(other, TrainStage)]
    streams = {stream for other in training for stream in other.data}
    for name, task in stage.eval.of(Perplexity).items():
        if (task.stream is None) == (task.length is None):
            yield (
                ("eval", "perplexity", name),
                "needs exactly one of stream (whose images and text it has) and length (of packed text)",
            )
        if task.stream is not None and task.stream not in streams:
            text = f"no stage has a stream {task.stream!r}{did_you_mean(task.stream, streams)}"
            yield ("eval", "perplexity", name, "stream"), text


def nearest_divisors(number: int, near: int) -> list[int]:
    """The divisors of `number` next to `near`: the largest one below and the smallest one above."""
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    below = [value for value in divisors if value < near][-1:]
    return below + [value for value in divisors if value > near][:1]
