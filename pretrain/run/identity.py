"""Resume compatibility: which recipe keys must match the run folder, and the error when they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.recipe.dump import stage_record
from pretrain.recipe.fields import Length, parse_length
from pretrain.recipe.lengths import length_steps
from pretrain.recipe.schema import Recipe
from pretrain.recipe.sections.data import Image, Stream
from pretrain.run.folder import complete_steps, json_mapping, read_record, tag_of

# Keys that must match on resume. `_check_resumable` also refuses another engine.zero or world size, and `_shortened` a
# shorter length. The other keys of a stage (init_allow, loader, checkpoint, eval, train.micro_batch, train.hours, the
# rest of engine) may change.
IDENTITY: tuple[tuple[str, ...], ...] = (
    ("run", "seed"),
    ("stage", "kind"),
    ("stage", "init"),
    ("stage", "continue"),
    ("stage", "data"),
    ("stage", "model"),
    ("stage", "objective"),
    ("stage", "optimizer"),
    ("stage", "schedule"),
    ("stage", "engine", "dtype"),
    ("stage", "method"),
    ("stage", "inputs"),
    ("stage", "only"),
    ("stage", "copy_rest"),
)
# Keys that old run folders lack because they were added later, with the value that those runs used.
ADDED_KEYS: dict[tuple[str, ...], Any] = {
    ("image", "max_pixels"): Image.model_fields["max_pixels"].default,
    ("share_by",): Stream.model_fields["share_by"].default,
}
UNITS = ("steps", "samples", "epochs")
ABSENT = "(absent)"


def compare_identity(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences in identity keys between two resolved.yaml contents, as lines `KEY: OLD -> NEW`.

    With run.accept_change in `new`, the data may differ. The length may grow, but not shrink.
    """
    lines: list[str] = []
    for key in _identity_keys(new):
        for path, was, now in _differences(_get(old, key), _get(new, key), key):
            defaults = [value for end, value in ADDED_KEYS.items() if path[-len(end) :] == end]
            if not (was is None and now in defaults):
                lines.append(f"{_name(path)}: {_show(was)} -> {_show(now)}")
    return lines + _shortened(old, new)


def compare_changeable_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences in the keys that may change, as lines `KEY: OLD -> NEW` for the log of the run."""
    changed = [
        item
        for item in _differences(old.get("stage"), new.get("stage"), ("stage",))
        if not any(item[0][: len(key)] == key for key in _identity_keys(new))
    ]
    return [f"{_name(path)}: {_show(was)} -> {_show(now)}" for path, was, now in changed]


def compare_versions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each decoder whose version changed; empty if a record holds no versions."""
    was, now = old.get("versions"), new.get("versions")
    if not isinstance(was, dict) or not isinstance(now, dict):
        return []
    return [
        f"{_name(path)}: {_show(before)} -> {_show(after)}: images may decode to slightly different pixels from "
        "now on; install the old version for identical bits"
        for path, before, after in _differences(was, now, ("versions",))
    ]


def check_run_folder(run_dir: str | Path, recipe: Recipe, stage: str, world_size: int | None = None) -> None:
    """Raise UserError if the folder belongs to another recipe or this version cannot resume it with this setup.

    Writes nothing. A folder that does not exist and a stage that has not started pass.
    """
    folder = Path(run_dir)
    old, new = read_record(folder / stage), stage_record(recipe, stage)
    if old is None:
        _check_other_stages(folder, recipe)
        return
    differences = compare_identity(old, new)
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        only_data = all(line.startswith("data.") for line in differences)
        accept = "accept the changed data (run.accept_change=true), " if only_data else ""
        raise UserError(
            f"{folder / stage} was written by a different recipe; value in the run folder -> "
            f"value in this recipe:\n{lines}\n"
            f"{accept}choose another folder (run.dir=NEW), restore these keys, or delete {folder / stage}"
        )
    _check_resumable(folder / stage, old, new, world_size)


def recorded_length(record: dict[str, Any] | None) -> Length | None:
    """The training length in the content of a resolved.yaml; None for a merge stage, and for no record.

    Raises UserError for a damaged one.
    """
    lengths = {unit: _get(record, ("stage", "train", unit)) for unit in UNITS}
    unit = next((unit for unit in UNITS if lengths[unit] is not None), None)
    if unit is None:
        return None
    try:
        length: Length = parse_length(f"{lengths[unit]!r} {unit}")
        return length
    except ValueError:
        stage = _get(record, ("name",))
        raise UserError(
            f"resolved.yaml of stage {stage} is damaged: train.{unit} is {lengths[unit]!r}; restore it, or delete the "
            "stage's folder to start the stage again"
        ) from None


def _check_other_stages(folder: Path, recipe: Recipe) -> None:
    """Raise UserError if the folder holds stages of a run with another name or seed."""
    for path in sorted(folder.glob("*/resolved.yaml")):
        record = read_record(path.parent) or {}
        run = record.get("run")
        run = run if isinstance(run, dict) else {}
        for key, mine in (("name", recipe.run.name), ("seed", recipe.run.seed)):
            if run.get(key) != mine:
                raise UserError(
                    f"{folder} holds stage {path.parent.name!r} of another run: "
                    f"run.{key} is {run.get(key)!r} there and {mine!r} here; "
                    "choose another folder (run.dir=NEW)"
                )


def _check_resumable(
    stage_dir: Path, old: dict[str, Any], new: dict[str, Any], world_size: int | None
) -> None:
    """Raise UserError if ZeRO stage or world size differ from the newest checkpoint.

    Checkpoints cannot be converted yet."""
    steps = complete_steps(stage_dir / "checkpoints")
    if not steps:
        return
    newest = stage_dir / "checkpoints" / tag_of(steps[-1])
    state = json_mapping(newest / "state.json")
    saved_zero = _get(old, ("stage", "engine", "zero"))
    zero = _get(new, ("stage", "engine", "zero"))
    if saved_zero != zero:
        raise UserError(
            f"{newest} was saved with engine.zero={saved_zero}; changing it to {zero} on resume "
            f"is not available yet: continue with {saved_zero}, or start a stage with init: {stage_dir}"
        )
    saved = state.get("world_size")
    if world_size is not None and isinstance(saved, int) and saved != world_size:
        raise UserError(
            f"{newest} was saved by {saved} ranks; resuming with {world_size} is not available yet: "
            f"continue with {saved} ranks, or start a stage with init: {stage_dir}"
        )


def _shortened(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line if the new length is shorter than the old one, or cannot be compared with it."""
    was, now = recorded_length(old), recorded_length(new)
    if was is None or now is None or was == now:
        return []
    batches = {name: stream.get("batch") for name, stream in (_get(old, ("stage", "data")) or {}).items()}
    if was.unit == now.unit:
        shorter = now.value < was.value
    elif "epochs" in (was.unit, now.unit) or len(batches) != 1:
        return [f"train: {was} -> {now} (cannot tell which is longer)"]
    else:
        (batch,) = batches.values()
        shorter = length_steps(now, batch) < length_steps(was, batch)
    return [f"train: {was} -> {now} (the length may grow, but not shrink)"] if shorter else []


def _identity_keys(new: dict[str, Any]) -> list[tuple[str, ...]]:
    accept = bool((new.get("run") or {}).get("accept_change"))
    return [key for key in IDENTITY if not (accept and key == ("stage", "data"))]


def _get(record: Any, key: tuple[str, ...]) -> Any:
    """The value at a path of keys; None if it is absent."""
    for part in key:
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _differences(old: Any, new: Any, at: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any, Any]]:
    """(path, old value, new value) of every leaf that differs; None for an absent value."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [item for key in keys for item in _differences(old.get(key), new.get(key), (*at, str(key)))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [item for index, (was, now) in pairs for item in _differences(was, now, (*at, str(index)))]
    return [] if old == new else [(at, old, new)]


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path[1:] if path[0] == "stage" else path)


def _show(value: Any) -> str:
    return ABSENT if value is None else json.dumps(value, ensure_ascii=False, default=str)
