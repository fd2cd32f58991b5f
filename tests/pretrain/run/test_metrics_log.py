"""JSON-lines logs: partial lines after a kill, truncation on resume; and the limit on replaced samples."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from pretrain.run.metrics_log import JsonLog, read, truncate
from pretrain.train.bad_samples import MIN_SAMPLES, WINDOW_STEPS, BadFraction
from tests.support.recorded_files import recorded

Rows = list[dict[str, object]]


def write(path: Path, rows: Rows) -> None:
    log = JsonLog(path)
    for row in rows:
        log.write(row)
    log.close()


ROWS: Rows = [{"step": n, "loss": 1 / n, "time": {"step": 0.25}, "word": "Größe"} for n in range(1, 6)]


def test_a_log_reads_back_and_is_flushed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "metrics.jsonl"  # the folder is created
    log = JsonLog(path)
    for number, row in enumerate(ROWS, 1):
        log.write(row)
        assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS[:number]
    log.close()
    log.close()
    assert read(path) == ROWS
    write(path, [{"step": 6}])  # a second log appends
    assert read(path) == [*ROWS, {"step": 6}]
    assert read(tmp_path / "none.jsonl") == []


def test_a_kill_at_any_byte_costs_at_most_the_line_being_written(tmp_path: Path) -> None:
    path, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    write(path, ROWS)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        torn.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        found = read(torn)
        # A last line that lacks only its newline is complete too.
        assert found in (ROWS[:whole], ROWS[: whole + 1])
        assert (len(found) > whole) == (content[length : length + 1] == b"\n" and length > 0)


@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_a_truncated_log_continues_at_its_step(tmp_path: Path, step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS)
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    truncate(path, step)
    write(path, [{"step": step + 1, "again": True}])
    assert read(path) == [*ROWS[:step], {"step": step + 1, "again": True}]
    assert path.read_text().count("\n") == len(read(path))
    assert list(tmp_path.iterdir()) == [path]  # nothing left beside it


def test_a_power_cut_leaves_the_log_up_to_the_last_sync_and_no_half_of_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "root/run/main/metrics.jsonl"
    (tmp_path / "root").mkdir()
    with recorded(tmp_path / "root") as disk:
        log = JsonLog(path)
        for row in ROWS[:3]:
            log.write(row)
        log.sync()
        disk.promise("3")
        for row in ROWS[3:]:
            log.write(row)
        log.close()
        disk.promise("5")
        truncate(path, 2)
        disk.promise("2")
    assert {outcome.promised for outcome in disk.outcomes()} == {(), ("3",), ("3", "5"), ("3", "5", "2")}
    for outcome in disk.outcomes():
        outcome.write(tmp_path / "cut")
        found = read(tmp_path / "cut/run/main/metrics.jsonl")
        assert found == ROWS[: len(found)]
        least, most = {(): (0, 5), ("3",): (3, 5), ("3", "5"): (2, 5)}.get(outcome.promised, (2, 2))
        assert least <= len(found) <= most, outcome.after
        if outcome.promised[:2] == ("3", "5"):
            assert len(found) in (2, 5)


@pytest.mark.parametrize("length", [1, 3, 100, 1 << 14, (1 << 14) - 30, 50_000])
@pytest.mark.parametrize("before", [0, 1, 40])
def test_the_last_line_is_amended_and_no_other(tmp_path: Path, before: int, length: int) -> None:
    """Also by another process than the one that wrote it, and with lines longer than what is read at once."""
    path = tmp_path / "metrics.jsonl"
    rows: Rows = [{"step": n, "word": "ö" * (length - n % 2)} for n in range(1, before + 2)]
    write(path, rows)
    log = JsonLog(path)
    for figure in (0.5, 0.25):
        rows[-1] = rows[-1] | {f"eval {figure}": figure}
        assert json.loads(log.amend(rows[-1])) == rows[-1]
        assert read(path) == rows
    log.write({"step": 99})
    log.close()
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 99}])


def test_a_line_behind_an_empty_one_is_amended_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('\n{"step": 1}\n')
    log = JsonLog(path)
    log.amend({"step": 1, "loss": 0.5})
    log.close()
    assert path.read_text() == '\n{"step": 1, "loss": 0.5}\n'


def test_a_line_that_a_cut_damaged_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    last = json.dumps(ROWS[2])
    for kept in range(len(last) + 2):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]) + (last + "\n")[:kept])
        truncate(path, 3, last)
        assert read(path) == ROWS[:3]
    write(path, ROWS[3:])
    truncate(path, 4, json.dumps({"step": 4, "other": 1}))
    assert read(path) == ROWS[:4]  # an undamaged line stays as it is
    path.unlink()
    truncate(path, 1, json.dumps(ROWS[0]))
    assert read(path) == ROWS[:1]


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {
        "step": 1,
        "loss": math.nan,
        "eval": {"nll": math.inf, "top1": 0.5},
        "list": [1.0, -math.inf, "NaN"],
    }
    log = JsonLog(path)
    log.write({"step": 1, "loss": math.inf})
    log.amend(row)
    log.close()
    assert path.read_text() == (
        '{"step": 1, "loss": null, "eval": {"nll": null, "top1": 0.5}, "list": [1.0, null, "NaN"]}\n'
    )


def test_truncating_an_absent_log_creates_none(tmp_path: Path) -> None:
    truncate(tmp_path / "bad_samples.jsonl", 3)
    assert not (tmp_path / "bad_samples.jsonl").exists()


def first_excess(counts: np.ndarray, bad: np.ndarray, limit: float) -> int | None:
    """First step, from 1, whose last WINDOW_STEPS steps hold at least MIN_SAMPLES samples and too many bad ones."""
    for step in range(1, len(counts) + 1):
        last = slice(max(0, step - WINDOW_STEPS), step)
        seen = int(counts[last].sum())
        if seen >= MIN_SAMPLES and int(bad[last].sum()) > limit * seen:
            return step
    return None


def series(seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Samples of 300 steps and how many of them were replaced; clean for a while first."""
    generator = np.random.default_rng([seed, int(1000 * share)])
    counts = generator.integers(1, 40, 300)
    bad = generator.binomial(counts, share)
    bad[: 40 * seed] = 0
    return counts, bad


def excess(limited: BadFraction, counts: np.ndarray, bad: np.ndarray, first: int = 1) -> int | None:
    """The step, of `first` and those after it, at which the limit is passed."""
    for step in range(first, len(counts) + 1):
        wrong = int(bad[step - 1])
        skipped = {"web": {"undecodable": wrong // 2, "missing image": wrong - wrong // 2}} if wrong else {}
        if limited.add(step, {"web": int(counts[step - 1]), "clean": 500}, skipped):
            return step
    return None


@pytest.mark.parametrize(
    ("limit", "share"), [(0.01, 0.01), (0.02, 0.01), (0.1, 0.12), (0.0, 0.001), (1.0, 1.0)]
)
def test_the_limit_is_on_the_samples_of_the_window(limit: float, share: float) -> None:
    for seed in range(6):
        counts, bad = series(seed, share)
        assert excess(BadFraction(limit), counts, bad) == first_excess(counts, bad, limit)


@pytest.mark.parametrize("saved", [1, 5, 60, 130, 299])
def test_a_resumed_run_judges_as_an_undisturbed_one(saved: int) -> None:
    limit, share = 0.05, 0.06
    for seed in range(6):
        counts, bad = series(seed, share)
        expected = first_excess(counts, bad, limit)
        before = BadFraction(limit)
        if excess(before, counts[:saved], bad[:saved]) is None:
            kept = json.loads(json.dumps(before.state()))  # as it goes through state.json
            assert excess(BadFraction(limit, kept), counts, bad, saved + 1) == expected


def test_sources_are_judged_one_by_one_and_named() -> None:
    limited = BadFraction(0.05)
    # Too few samples of `small` to judge.
    assert limited.add(1, {"web": 1000, "small": 199}, {"small": {"undecodable": 190}}) is None
    assert limited.add(2, {"web": 1000}, {"web": {"undecodable": 50}}) is None
    message = limited.add(3, {"web": 1000, "small": 1}, {"small": {"missing caption": 1}})
    assert message is not None
    assert re.search(r"step 3: 191 of the last 200 samples of small\b", message)
    for word in ("max_bad_fraction 0.05", "1 missing caption", "bad_samples.jsonl"):
        assert word in message


def test_what_is_long_ago_is_forgotten() -> None:
    limited = BadFraction(0.01)
    assert limited.add(1, {"web": 10000}, {"web": {"undecodable": 100}}) is None  # exactly the limit
    for step in range(2, WINDOW_STEPS + 1):
        assert limited.add(step, {"web": 10}, {}) is None
    # 9 of 1000: step 1 is out of the window.
    assert limited.add(WINDOW_STEPS + 1, {"web": 10}, {"web": {"undecodable": 9}}) is None
    message = limited.add(WINDOW_STEPS + 2, {"web": 10}, {"web": {"undecodable": 2}})
    assert message is not None
    assert "11 of the last 1000 samples of web" in message
