"""The journal of a merge, cut at every byte and damaged in every line: what it holds is what was written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.merge.output.journal import JOURNAL, Journal, SpanRecord

HEAD = {"plan": "p", "jobs": "j", "inputs": {"a: x": "1"}}
SPANS = {
    (job, span): SpanRecord(
        f"{job:08x}{span:08x}", tuple(f"{n:016x}" for n in range(job)), overflow=10 * span
    )
    for job in range(3)
    for span in range(4)
}


def written(folder: Path, spans: dict[tuple[int, int], SpanRecord] = SPANS) -> bytes:
    folder.mkdir()
    journal = Journal(folder, HEAD)
    for key, record in spans.items():
        journal.add(*key, record)
    assert journal.done == spans
    journal.close()
    return (folder / JOURNAL).read_bytes()


def test_a_journal_that_was_cut_anywhere_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole")
    assert whole.count(b"\n") == 1 + len(SPANS)
    (tmp_path / "ordinary").touch(0o644)  # as the umask has it, and nobody may execute it
    modes = [path.stat().st_mode for path in (tmp_path / "whole" / JOURNAL, tmp_path / "ordinary")]
    assert modes[0] == modes[1]
    (tmp_path / "cut").mkdir()
    for length in range(len(whole) + 1):
        (tmp_path / "cut" / JOURNAL).write_bytes(whole[:length])
        complete = max(0, whole[:length].count(b"\n") - 1)
        journal = Journal(tmp_path / "cut", HEAD)
        assert list(journal.done.items()) == list(SPANS.items())[:complete]
        assert journal.stored_head == HEAD
        for key in list(SPANS)[complete:]:
            journal.add(*key, SPANS[key])
        journal.close()
        assert (tmp_path / "cut" / JOURNAL).read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 40,
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b'{"plan": "p"}',
        b'[1,1,"00",[]]',
        b'[1,1,"00",[],0,0]',
        b'[1,1,"00",7,0]',
        b'[1,1,"00",[],"x"]',
        b'[[1],1,"00",[],0]',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("line", [1, 2, 12])
def test_what_follows_a_damaged_line_is_done_again(tmp_path: Path, damage: bytes, line: int) -> None:
    """The spans after it may be whole, but a journal that grows behind a damaged line could not be read again."""
    lines = written(tmp_path / "x").splitlines()
    lines[line] = damage
    (tmp_path / "x" / JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
    kept = dict(list(SPANS.items())[: line - 1])
    journal = Journal(tmp_path / "x", HEAD)
    assert journal.done == kept
    journal.add(7, 0, SPANS[1, 1])
    journal.close()
    again = Journal(tmp_path / "x", HEAD)
    assert again.done == kept | {(7, 0): SPANS[1, 1]}
    again.close()


@pytest.mark.parametrize("damage", [b"\0" * 40, b"", b"{", b"null", b'[1,1,"00",[],0]'])
def test_without_its_head_a_journal_says_nothing(tmp_path: Path, damage: bytes) -> None:
    """Nobody can tell which plan its spans belong to."""
    whole = written(tmp_path / "x")
    (tmp_path / "x" / JOURNAL).write_bytes(damage + b"\n" + whole.partition(b"\n")[2])
    journal = Journal(tmp_path / "x", HEAD)
    assert (journal.done, journal.stored_head) == ({}, HEAD)
    journal.close()
    assert (tmp_path / "x" / JOURNAL).read_bytes() == whole.partition(b"\n")[0] + b"\n"


def test_a_journal_of_another_plan_is_read_and_not_changed(tmp_path: Path) -> None:
    whole = written(tmp_path / "x")
    journal = Journal(tmp_path / "x", {"plan": "other"})
    assert journal.stored_head == HEAD
    assert journal.done == SPANS
    journal.close()
    assert (tmp_path / "x" / JOURNAL).read_bytes() == whole


def test_a_span_that_is_written_again_counts_once(tmp_path: Path) -> None:
    """After the disk lost a span, its line is appended a second time."""
    written(tmp_path / "x")
    journal = Journal(tmp_path / "x", HEAD)
    del journal.done[0, 1]
    other = SpanRecord("f" * 16, (), 3)
    journal.add(0, 1, other)
    journal.close()
    again = Journal(tmp_path / "x", HEAD)
    assert again.done == SPANS | {(0, 1): other}
    again.close()


def test_a_line_is_on_its_way_to_the_disk_before_the_next_span(tmp_path: Path) -> None:
    """A kill must not lose lines that wait in a buffer of the process; and other programs can read the lines."""
    (tmp_path / "x").mkdir()
    journal = Journal(tmp_path / "x", HEAD)
    lines = [json.loads((tmp_path / "x" / JOURNAL).read_text())]
    for key, record in SPANS.items():
        journal.add(*key, record)
        lines = [json.loads(line) for line in (tmp_path / "x" / JOURNAL).read_text().splitlines()]
        assert lines[-1] == [*key, record.digest, list(record.inputs), record.overflow]
    journal.close()
    assert lines[0] == HEAD
