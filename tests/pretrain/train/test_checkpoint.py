"""The checkpoint protocol in one process: a kill at any instant leaves a complete checkpoint; damage is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from data_pipeline.errors import UserError
from pretrain.run.folder import complete_steps, tag_of
from pretrain.train.checkpoint import save, verify_and_read_state

# System calls that change the disk or flush to it.
CALLS = ("rename", "replace", "unlink", "rmdir", "fsync")


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


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> list[str]:
    """Raise at call `number` (from 0) to CALLS, before or after it takes effect; returns the names of all calls."""
    made: list[str] = []

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) > number:
                raise Killed  # a killed process runs no clean-up either
            made.append(name)
            if len(made) <= number:
                return real(*args, **kwargs)
            if after:
                real(*args, **kwargs)
            raise Killed

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return made


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("keep", "again"), [(1, False), (2, False), (2, True)])
def test_a_kill_at_any_instant_leaves_the_previous_one_or_this_one(
    tmp_path: Path, keep: int, again: bool, after: bool
) -> None:
    """Kill one save at each call that changes the disk, then save again without a kill.

    `again`: the killed save writes a step that exists already. Every folder that counts as complete must verify.
    """
    prepared = tmp_path / "prepared"
    for step in (1, 2):
        save_step(prepared, step, keep=2)
    step = 2 if again else 3
    number, seen = 0, set()
    while True:
        folder = tmp_path / f"{number}"
        shutil.copytree(prepared, folder)
        with pytest.MonkeyPatch.context() as patch:
            made = kill_at(patch, number, after)
            try:
                save_step(folder, step, keep)
                finished = True
            except Killed:
                finished = False
        steps = complete_steps(folder)
        assert steps, f"nothing is left after a kill at call {number} ({made[-1]})"
        assert steps[-1] >= (1 if again else 2)
        for found in steps:
            assert verify_and_read_state(folder / tag_of(found))["step"] == found, (
                f"kill at call {number} ({made[-1]})"
            )
            assert_whole(folder / tag_of(found), found)
        save_step(folder, 4, keep)  # the next save cleans up whatever was left
        assert complete_steps(folder)[-1] == 4
        assert len(complete_steps(folder)) <= keep
        assert {p.name for p in folder.iterdir() if p.is_dir()} == {tag_of(n) for n in complete_steps(folder)}
        if finished:
            break
        seen.add(made[-1])
        number += 1
    assert {"rename", "replace", "unlink", "rmdir", "fsync"} <= seen
    assert number > 10


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
