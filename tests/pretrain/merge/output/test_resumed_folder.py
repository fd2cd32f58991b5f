"""The folder that a merge fills: when it is kept, refused, deleted, and when it appears under its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import partial_of
from pretrain.merge.output.journal import JOURNAL, SpanRecord
from pretrain.merge.output.resumed_folder import resumed_folder

HEAD = {"plan": "p", "jobs": "j", "inputs": {"a: x": "1", "b: y": "2"}}
RECORD = SpanRecord("0" * 16, ())


class Killed(BaseException):
    """Simulates a kill or a failure in the block."""


def fill(out: Path, head: dict[str, Any] = HEAD, *, spans: int = 1, end: bool = False, **options: Any) -> int:
    """Write weights and `spans` journal lines, and stop unless it is the `end`; returns the lines that were there."""
    found = -1
    try:
        with resumed_folder(out, head, options.pop("needed", 0), **options) as (partial, journal):
            found = len(journal.done)
            (partial / "model.safetensors").touch()
            (partial / "config.json").write_text("{}")
            for span in range(spans):
                journal.add(0, found + span, RECORD)
            if not end:
                raise Killed
    except Killed:
        pass
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finished_spans_are_kept_and_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert fill(out) == 0
    assert fill(out, spans=2) == 1
    assert not out.exists()
    assert fill(out, spans=0) == 3
    assert fill(out, end=True) == 3
    assert content(out) == {"model.safetensors": b"", "config.json": b"{}"}
    assert not partial_of(out).exists()


@pytest.mark.parametrize("durable", [False, True])
def test_without_a_finished_span_nothing_is_left(tmp_path: Path, durable: bool) -> None:
    assert fill(tmp_path / "out", spans=0, durable=durable) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_someone_removed_meanwhile_does_not_hide_the_error(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        shutil.rmtree(partial)
        raise Killed

    with pytest.raises(Killed), resumed_folder(tmp_path / "out", HEAD, 0) as (partial, _):
        fail(partial)


CHANGED = {**HEAD, "plan": "q", "inputs": {"a: x": "1", "b: y": "3"}}


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            CHANGED,
            r"unfinished merge, and b: y changed since it began; restore the previous files, or delete",
        ),
        (
            {**HEAD, "plan": "q", "inputs": {"a: x": "2", "c: z": "2"}},
            r"unfinished merge, and a: x, b: y, c: z changed since",
        ),
        ({**CHANGED, "jobs": "k"}, r"unfinished merge of another plan; finish it with the command"),
        ({**HEAD, "plan": "q"}, r"unfinished merge of another plan"),
        ({}, r"unfinished merge of another plan"),
    ],
)
@pytest.mark.parametrize("spans", [0, 2])
def test_an_unfinished_merge_of_another_plan_is_refused_and_stays(
    tmp_path: Path, head: dict[str, Any], words: str, spans: int
) -> None:
    out = tmp_path / "out"
    fill(out, spans=2)
    if not spans:  # as after a kill before the first span
        path = partial_of(out) / JOURNAL
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    before = content(partial_of(out))
    with pytest.raises(UserError, match=rf"out: .*/\.out\.dromos-partial has an {words}"):
        fill(out, head)
    assert content(partial_of(out)) == before
    assert fill(out) == spans


def test_an_unfinished_merge_of_another_plan_is_discarded_on_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, spans=3)
    (partial_of(out) / "stray").write_text("")
    opened = len(os.listdir("/proc/self/fd"))
    assert fill(out, CHANGED, discard_unfinished=True) == 0
    assert len(os.listdir("/proc/self/fd")) == opened
    assert fill(out, CHANGED) == 1
    assert "stray" not in content(partial_of(out))
    assert fill(out, CHANGED, spans=0, discard_unfinished=True, end=True) == 2  # its own is never discarded
    fill(tmp_path / "other", spans=3)
    fill(tmp_path / "other", CHANGED, spans=0, discard_unfinished=True)
    assert not partial_of(tmp_path / "other").exists()


def test_space_that_the_unfinished_weights_occupy_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fill(out)
    (partial_of(out) / "model.safetensors").write_bytes(b"x" * 40_000)
    (partial_of(out) / "sparse.safetensors").write_bytes(b"")
    os.truncate(partial_of(out) / "sparse.safetensors", 1 << 20)  # has a size, but no blocks
    (partial_of(out) / "other").write_bytes(b"x" * 40_000)
    occupied = (partial_of(out) / "model.safetensors").stat().st_blocks * 512
    assert occupied >= 40_000
    free = shutil._ntuple_diskusage(1 << 40, 0, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="needs 1,001 bytes more, but only 1,000 are free"):
        fill(out, needed=occupied + 1001)
    assert fill(out, needed=occupied + 1000) == 1


@pytest.mark.parametrize("durable", [False, True])
def test_what_is_on_the_disk_when_the_folder_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """With `durable` everything; else neither the weights, which have digests, nor the new name."""
    out = tmp_path / "out"
    events: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(file: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{file}"))
        real_sync(file)

    def rename(source: Any, target: Any) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    fill(out, end=True, durable=durable)
    partial = partial_of(out)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    small = {str(partial / name) for name in ("config.json", JOURNAL, ".lock")}
    weights = {str(partial / "model.safetensors")} if durable else set()
    assert set(before) == {str(tmp_path), str(partial), *small, *weights}
    assert before[0] == str(tmp_path)  # the name of the partial folder first, the names in it last
    assert before[-1] == str(partial)
    assert after == ([str(tmp_path)] if durable else [])
