"""A merge that is killed at any moment resumes, and two merges never write the same folder."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.storage import atomic_folder
from data_pipeline.storage.atomic_folder import new_folder, partial_of
from pretrain.merge import merge, plan
from pretrain.merge.methods import blocks
from pretrain.merge.output import journal, local
from pretrain.merge.verify.check_output import verify
from pretrain.weights import dtypes
from tests.support.merge_inputs import floats, write
from tests.support.recorded_files import recorded

SPAN = 64


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Two models of several tensors; each tensor has many spans of SPAN elements."""
    for seed, name in enumerate("ab"):
        tensors = {f"layer.{i}.weight": floats(10 * seed + i, 40, 31) for i in range(4)}
        write(tmp_path / name, tensors | {"norm": floats(seed, 7), "count": np.array([seed], np.int64)})
    return str(tmp_path / "a"), str(tmp_path / "b")


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, dtypes, local):
        monkeypatch.setattr(module, "ELEMENTS_PER_SPAN", SPAN)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Stopped(BaseException):
    """Simulates a kill: no code catches it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, spans: int) -> list[int]:
    """Stop after `spans` journal lines; returns a list with one element per line."""
    added: list[int] = []
    real = journal.Journal.add

    def add(self: journal.Journal, *entry: Any) -> None:
        if len(added) == spans:
            raise Stopped
        added.append(1)
        real(self, *entry)

    monkeypatch.setattr(journal.Journal, "add", add)
    return added


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_killed_merge_resumes(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_spans: None, method: str
) -> None:
    asked: dict[str, Any] = {"beta": 0.3} if method == "linear" else {
        "method": "ties", "base": pair[0], "density": 0.4
    }  # fmt: skip
    inputs = pair if method == "linear" else pair[1:]
    merge(inputs, tmp_path / "whole", **asked)
    done = 0
    for _ in range(10):
        with monkeypatch.context() as patch:
            added = stop_after(patch, 17)
            try:
                told: list[int] = []
                merge(inputs, tmp_path / "out", **asked, progress=told.append)
            except Stopped:
                assert not (tmp_path / "out").exists()
                done += len(added)
                continue
        break
    assert done + len(added) == 4 * -(-40 * 31 // SPAN) + 2  # no span was written twice
    assert sum(told) == (tmp_path / "out/model.safetensors").stat().st_size
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def header(folder: Path) -> int:
    with open(folder / "model.safetensors", "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def stopped(pair: tuple[str, str], out: Path, monkeypatch: pytest.MonkeyPatch, spans: int = 30) -> Path:
    with monkeypatch.context() as patch:
        stop_after(patch, spans)
        with pytest.raises(Stopped):
            merge(pair, out, beta=0.3)
    return partial_of(out)


def test_what_the_disk_lost_is_written_again(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_spans: None
) -> None:
    """After a power cut the journal may be ahead of the data, or end in an incomplete line."""
    merge(pair, tmp_path / "whole", beta=0.3)
    left = stopped(pair, tmp_path / "out", monkeypatch)
    with open(left / "model.safetensors", "r+b") as file:
        file.seek(header(left) + 1000)
        file.write(bytes(3000))
    with open(left / journal.JOURNAL, "ab") as file:
        file.write(b'[2,0,"0123')
    merge(pair, tmp_path / "out", beta=0.3)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("time", ["now", "kept"])
def test_inputs_changed_since_are_noticed(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_spans: None, time: str
) -> None:
    """By their time; also by their content, as after a copy that keeps times."""
    stopped(pair, tmp_path / "out", monkeypatch)
    file = Path(pair[1]) / "model.safetensors"
    raw, status = bytearray(file.read_bytes()), file.stat()
    raw[-100] ^= 1
    file.write_bytes(raw)
    wanted = r"has an unfinished merge, and .*/b: model\.safetensors changed since"
    if time == "kept":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        wanted = "has an unfinished merge of another plan"
    with pytest.raises(UserError, match=wanted):
        merge(pair, tmp_path / "out", beta=0.3)
    with pytest.raises(UserError, match="has an unfinished merge of another plan"):
        merge(pair, tmp_path / "out", beta=0.4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["same", "shorter"])
def test_inputs_changed_after_their_last_read_are_noticed(
    pair: tuple[str, str], tmp_path: Path, small_spans: None, size: str
) -> None:
    """The bytes read may mix both versions, so no output appears."""
    file = Path(pair[1]) / "model.safetensors"
    told: list[int] = []

    def progress(count: int) -> None:
        told.append(count)
        if sum(told) == plan(pair, beta=0.3).size:
            raw = file.read_bytes()
            file.write_bytes(bytes(len(raw)) if size == "same" else raw[:-1])

    with pytest.raises(UserError, match="changed while it was being read"):
        merge(pair, tmp_path / "out", beta=0.3, progress=progress)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_merge_of_another_plan_is_not_thrown_away(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_spans: None
) -> None:
    left = stopped(pair, tmp_path / "out", monkeypatch)
    before = content(left)
    with pytest.raises(UserError, match="has an unfinished merge of another plan"):
        merge(pair, tmp_path / "out", beta=0.4)
    assert content(left) == before
    merge(pair, tmp_path / "out", beta=0.3)


def test_a_complete_output_is_skipped_and_another_plan_is_refused(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    first = merge(pair, tmp_path / "out", beta=0.3)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert merge(pair, tmp_path / "out", beta=0.3) == json.loads(json.dumps(first))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    with pytest.raises(UserError, match="has another merge"):
        merge(pair, tmp_path / "out", beta=0.4)


@pytest.mark.parametrize("durable", [True, False])
def test_a_cut_at_any_instant_leaves_no_output_or_a_whole_one(
    pair: tuple[str, str], tmp_path: Path, small_spans: None, durable: bool
) -> None:
    """Every state that a kill or a power cut may leave. The same command then completes it to the same bytes.

    Without `durable`, only the weights may be damaged, and `verify` says so.
    """
    merge(pair, tmp_path / "whole", beta=0.3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    (tmp_path / "root").mkdir()
    out, cut = tmp_path / "root/a/out", tmp_path / "cut/a/out"
    with recorded(tmp_path / "root") as disk:
        merge(pair, out, beta=0.3, durable=durable)
        disk.promise("out")
    states = Counter[bool]()
    for outcome in disk.outcomes():
        outcome.write(tmp_path / "cut")
        states[cut.exists()] += 1
        assert cut.exists() or not (durable and outcome.promised), outcome.after
        if cut.exists():
            found = {path.name: path.read_bytes() for path in cut.iterdir() if path.name[0] != "."}
            damaged = {name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)}
            assert damaged <= (set() if durable else {"model.safetensors"}), outcome.after
            if damaged:
                assert verify(str(cut), count=0).wrong, outcome.after
        elif outcome.kill or outcome.after.startswith("fsync"):
            merge(pair, cut, beta=0.3)
            assert {path.name: path.read_bytes() for path in cut.iterdir()} == whole, outcome.after
    assert len(states) == 2


SCRIPT = """\
import sys
from pretrain.merge import merge
from pretrain.merge.methods import blocks
from pretrain.merge.output import local
from pretrain.weights import dtypes
for module in (blocks, dtypes, local):
    module.ELEMENTS_PER_SPAN = 4096
print("ready", flush=True)
merge(sys.argv[1:3], sys.argv[3], beta=0.3, chunk=1024)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Kill the merge repeatedly, each time after a longer delay, until it ends by itself."""
    inputs = [
        str(write(tmp_path / name, {f"w{i}": floats(i + seed, 1000, 1000) for i in range(8)}))
        for seed, name in ((0, "a"), (50, "b"))
    ]
    command = [sys.executable, "-c", SCRIPT, *inputs]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    kills, delay, lines = 0, 0.02, [0]
    while delay < 20:
        process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        process.stdout.close()
        if (tmp_path / "out").exists():  # the kill came after publishing
            break
        found = partial_of(tmp_path / "out") / journal.JOURNAL
        lines.append(len(found.read_bytes().splitlines()) if found.exists() else 0)
        kills, delay = kills + 1, delay * 1.6
    assert kills >= 2
    assert max(lines) > 10
    assert lines == sorted(lines)  # a kill loses no finished span
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_merges_into_one_folder(pair: tuple[str, str], tmp_path: Path) -> None:
    """The second raises an error that names the folder; the first is not disturbed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(tmp_path / "out", theirs))
    other.start()
    try:
        assert ours.recv() == "writing"
        with pytest.raises(UserError, match=r"out: another process is writing it \(it holds .*\.lock\)"):
            merge(pair, tmp_path / "out", beta=0.3)
        ours.send("end")
        other.join(20)
    finally:
        other.kill()
    assert (tmp_path / "out/mine").read_text() == "whole"


def hold(out: Path, pipe: Any) -> None:
    with new_folder(out, 0) as partial:
        (partial / "mine").write_text("whole")
        pipe.send("writing")
        pipe.recv()


def test_a_full_disk_and_an_unwritable_folder_are_one_error(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [content(Path(path)) for path in pair]

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="out: cannot be written: No space left on device; make room"):
            merge(pair, tmp_path / "out", beta=0.3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        merge(pair, tmp_path / "file/out", beta=0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file"]
    assert [content(Path(path)) for path in pair] == before


def test_a_kill_at_the_very_end_costs_nothing(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_spans: None
) -> None:
    """Before the rename, and after it while the folder still has lock and journal."""
    merge(pair, tmp_path / "whole", beta=0.3)

    def stop(*_: Any) -> None:
        raise Stopped

    for module, name in ((os, "rename"), (atomic_folder, "tidy")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(Stopped):
                merge(pair, tmp_path / "out", beta=0.3)
    assert (tmp_path / "out" / journal.JOURNAL).exists()
    with monkeypatch.context() as patch:
        added = stop_after(patch, -1)
        merge(pair, tmp_path / "out", beta=0.3)
    assert added == []
    assert content(tmp_path / "out") == content(tmp_path / "whole")
