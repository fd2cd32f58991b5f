"""The checkpoint protocol in one process: a cut at any instant leaves a complete checkpoint; damage is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import xxhash

from data_pipeline.errors import UserError
from pretrain.run.folder import complete_steps, tag_of
from pretrain.train.checkpoint import missing_rank_file, save, verify_and_read_state
from tests.support.damaged_json import Missing, damaged
from tests.support.recorded_files import Outcome, recorded


class Killed(BaseException):
    """Simulates SIGKILL: no code of the project catches a BaseException of this kind."""


def content(step: int) -> dict[str, bytes]:
    return {"model.pt": f"weights {step}".encode() * 50, "zero/shard_0.pt": bytes([step % 256]) * 700}


def writer(step: int) -> Callable[[Path, str], None]:
    def write(folder: Path, tag: str) -> None:
        for name, data in content(step).items():
            path = folder / tag / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return write


def save_step(folder: Path, step: int, keep: int = 2) -> Path:
    return save(folder, step, {"step": step, "world_size": 1}, writer(step), keep)


def assert_whole(path: Path, step: int) -> None:
    """Assert that the checkpoint has every byte that was written."""
    for name, data in content(step).items():
        assert (path / name).read_bytes() == data
    assert json.loads((path / "state.json").read_text()) == {"step": step, "world_size": 1}


def test_a_saved_checkpoint_is_complete_and_verifies(tmp_path: Path) -> None:
    folder = tmp_path / "main" / "checkpoints"
    assert complete_steps(folder) == []
    path = save_step(folder, 5)
    assert path == folder / "step_00000005"
    assert complete_steps(folder) == [5]
    assert verify_and_read_state(path) == {"step": 5, "world_size": 1}
    assert_whole(path, 5)
    assert (folder / "latest").read_text() == "step_00000005"
    manifest = json.loads((path / "manifest.json").read_text())
    written = {name: (path / name).read_bytes() for name in (*content(5), "state.json")}
    assert manifest == {
        name: {"size": len(data), "xxh64": xxhash.xxh64_hexdigest(data)} for name, data in written.items()
    }


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9_999_999, 123_456_789):  # by number, not by letter
        save_step(tmp_path, step, keep=2)
    assert complete_steps(tmp_path) == [9_999_999, 123_456_789]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_09999999", "step_123456789"]
    save_step(tmp_path, 200_000_000, keep=1)
    assert complete_steps(tmp_path) == [200_000_000]
    assert verify_and_read_state(tmp_path / tag_of(200_000_000))["step"] == 200_000_000


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    save(tmp_path, 3, {"step": 3, "again": True}, writer(4), 2)
    assert verify_and_read_state(tmp_path / tag_of(3)) == {"step": 3, "again": True}
    assert (tmp_path / tag_of(3) / "model.pt").read_bytes() == content(4)["model.pt"]


def checkpoints(root: Path) -> Path:
    """The folder of checkpoints in a run folder `root/run`, of which the tests below make only `root` themselves."""
    return root / "run" / "main" / "checkpoints"


def assert_kept(outcome: Outcome, root: Path, before: tuple[int, ...]) -> None:
    """Assert that a cut left the checkpoints from before or the new one, each whole; after a kill, save once more.

    `before`: the steps that were complete before the save that was cut.
    """
    outcome.write(root)
    folder = checkpoints(root)
    steps = complete_steps(folder)
    assert steps or not before, f"nothing is left after {outcome.after}"
    assert set(map(int, outcome.promised)) <= set(steps), f"lost after {outcome.after}"
    for step in steps:
        assert verify_and_read_state(folder / tag_of(step))["step"] == step, outcome.after
        assert_whole(folder / tag_of(step), step)
    latest = folder / "latest"
    if latest.exists() and latest.read_text() not in map(tag_of, before):
        assert latest.read_text() in map(tag_of, steps), outcome.after
    if outcome.kill:
        with mock.patch.object(os, "fsync"):  # this save need not wait for the disk
            save_step(folder, 4, keep=1)
        # It has removed whatever was left.
        assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == ["latest", tag_of(4)]


@pytest.mark.parametrize(
    ("before", "step", "keep"), [((), 3, 2), ((2,), 3, 1), ((1, 2), 3, 2), ((1, 2), 2, 1)], ids=str
)
def test_a_cut_at_any_instant_leaves_the_previous_one_or_this_one(
    tmp_path: Path, before: tuple[int, ...], step: int, keep: int
) -> None:
    """Every state that a kill or a power cut may leave: of a first save, of one that deletes an older checkpoint, and
    of a step that is saved again.
    """
    root = tmp_path / "root"
    root.mkdir()
    for earlier in before:
        save_step(checkpoints(root), earlier)
    with recorded(root) as disk:
        save_step(checkpoints(root), step, keep)
        disk.promise(str(step))
    outcomes = list(disk.outcomes())
    assert len(outcomes) > 50
    for outcome in outcomes:
        assert_kept(outcome, tmp_path / "cut", before)


def test_a_power_cut_after_a_kill_leaves_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is killed after it renamed the old checkpoint, and the next save: the cut may undo that rename."""
    root = tmp_path / "root"
    root.mkdir()
    save_step(checkpoints(root), 2)

    def killed(*_: Any) -> None:
        raise Killed  # a killed process runs no clean-up either

    with recorded(root) as disk:
        real = os.fsync
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "fsync", lambda file: killed() if list(root.rglob("*.old.tmp")) else real(file))
            save_step(checkpoints(root), 3, keep=1)
        assert list(root.rglob("*.old.tmp"))
        save_step(checkpoints(root), 4, keep=1)
        disk.promise("4")
    for outcome in disk.outcomes():
        assert_kept(outcome, tmp_path / "cut", (2,))


def test_a_writer_that_fails_leaves_the_previous_one(tmp_path: Path) -> None:
    save_step(tmp_path, 1)

    def write(folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        (folder / tag / "model.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, {"step": 2}, write, 2)
    assert complete_steps(tmp_path) == [1]
    assert (tmp_path / "latest").read_text() == tag_of(1)
    save_step(tmp_path, 2)
    assert verify_and_read_state(tmp_path / tag_of(2))["step"] == 2


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip_a_bit,
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["model.pt", "zero/shard_0.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_file_is_named(tmp_path: Path, name: str, kind: str) -> None:
    path = save_step(tmp_path, 7)
    DAMAGE[kind](path / name)
    with pytest.raises(UserError) as found:
        verify_and_read_state(path)
    text = str(found.value)
    assert name in text or (
        kind == "flipped" and name == "manifest.json"
    )  # the flipped bit may be in a file name
    assert "step_00000007" in text
    assert "Remove" in text  # what to do


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as found:
        verify_and_read_state(path)
    assert path.name in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("lost", [(), ("model.pt",), ("state.json",), ("zero/shard_0.pt",)])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_manifest_that_lists_less_than_was_saved_is_refused(
    tmp_path: Path, lost: tuple[str, ...], sealed: bool
) -> None:
    """It would verify less, `{}` nothing at all. Checkpoints of an earlier version have an empty COMPLETE."""
    path = save_step(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    kept = {name: entry for name, entry in manifest.items() if lost and name not in lost}
    (path / "manifest.json").write_text(json.dumps(kept))
    if not sealed:
        (path / "COMPLETE").write_text("")
    reason = (
        "manifest.json is missing or damaged"
        if sealed
        else f"{(lost or ('state.json',))[0]} is not listed in"
    )
    assert reason in refusal(path)


def test_a_checkpoint_of_an_earlier_version_verifies(tmp_path: Path) -> None:
    path = save_step(tmp_path, 7)
    (path / "COMPLETE").write_text("")
    assert verify_and_read_state(path)["step"] == 7


def test_a_file_and_its_entry_cannot_disappear_together(tmp_path: Path) -> None:
    path = save_step(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["model.pt"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "model.pt").unlink()
    assert "manifest.json is missing or damaged" in refusal(path)


# Names that DeepSpeed 0.19 gives the files of two ranks (tests/dist/test_zero_shards.py reads real ones).
MODEL = ["mp_rank_00_model_states.pt"]
OPTIMIZER = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
SHARDS = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]


@pytest.mark.parametrize(
    ("zero", "names"), [(0, MODEL), (1, MODEL + OPTIMIZER), (2, MODEL + OPTIMIZER), (3, SHARDS + OPTIMIZER)]
)
def test_a_file_of_every_rank_is_expected(zero: int, names: list[str]) -> None:
    state = {"zero": zero, "world_size": 2}
    assert missing_rank_file([*names, "state.json"], state) is None
    for name in names:
        kind = "*_optim_states.pt" if "optim" in name else "*_model_states.pt"
        number = 1 if "rank_1_" in name else 0
        assert missing_rank_file(set(names) - {name}, state) == f"{kind} of rank {number}"
    assert missing_rank_file([], {"step": 1}) is None


def test_a_rank_whose_files_were_never_written_is_named(tmp_path: Path) -> None:
    def write(folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        for name in (*MODEL, OPTIMIZER[0]):
            (folder / tag / name).write_bytes(b"weights")

    path = save(tmp_path, 3, {"step": 3, "world_size": 2, "zero": 1}, write, 1)
    assert "*_optim_states.pt of rank 1 is missing" in refusal(path)


STATE = {
    "step": 5, "world_size": 2, "zero": 1, "order": {}, "replaced": {"web": [[8, 0], [8, 1]]},
    "bad_shards": {"web/00000.tar": [0, 2]}, "skipped_in_a_row": 0, "frozen": "028dd2b809e1e436",
    "line": '{"step": 5, "loss": 2.5}',
}  # fmt: skip


def test_a_field_of_another_type_in_state_json_is_named(tmp_path: Path) -> None:
    """Hashes match: the file was written so."""

    def write(folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        for name in (
            "mp_rank_00_model_states.pt",
            *(f"zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in (0, 1)),
        ):
            (folder / tag / name).write_bytes(b"")

    path = save(tmp_path, 5, STATE, write, 1)
    assert verify_and_read_state(path) == STATE
    assert verify_and_read_state(save(tmp_path, 5, STATE | {"frozen": None, "line": None}, write, 1))
    named = set()
    for place, value, state in damaged(STATE):
        if value is Missing or place[0] == "order" or (place, value) in FREE:
            continue
        save(tmp_path, 5, state, write, 1)
        with pytest.raises(UserError) as told:
            verify_and_read_state(path)
        words = f"checkpoint {path}: state.json is damaged: {place[0]} is "
        assert str(told.value).startswith(words), (place, value, str(told.value))
        assert str(told.value).endswith("Remove step_00000005 to resume from the checkpoint before it.")
        named.add(place[0])
    assert named == STATE.keys() - {"order"}


# Values that a whole state.json may hold too.
FREE = [
    (("step",), None), (("frozen",), "x"), (("frozen",), None), (("line",), None), (("replaced", "web", 0), [1, 2]),
    (("replaced", "web", 1), [1, 2]), (("bad_shards", "web/00000.tar"), [1, 2]),
]  # fmt: skip
