"""Progress: a metrics file that grows, is truncated or incomplete; figures; lines and bar."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch.supervise import progress
from launch.supervise.progress import TAIL_BYTES, Metrics, PlainView, Tail, clock, view


def row(step: int, **more: object) -> str:
    return json.dumps({"step": step, "loss": 2.0, **more}) + "\n"


def test_tail_follows_a_file_that_grows_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text(row(1) + row(2) + row(3)[:7])
    assert [r["step"] for r in tail.read()] == [1, 2]
    path.write_text(row(1) + row(2) + row(3))
    assert [r["step"] for r in tail.read()] == [3]
    assert tail.read() == []
    path.write_text(row(1))  # a resume truncated it after step 1
    assert [r["step"] for r in tail.read()] == [1]
    path.write_text(row(1) + "not json\n" + '"text"\n' + row(2))
    assert [r["step"] for r in tail.read()] == [2]


def test_tail_starts_near_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row(step) for step in range(1, 20001)))
    steps = [r["step"] for r in Tail(path).read()]
    assert steps[-1] == 20000
    assert 0 < len(steps) <= TAIL_BYTES / len(row(1))
    assert steps == list(range(steps[0], 20001))


def test_a_view_that_starts_late_shows_the_figures_of_one_from_the_start(tmp_path: Path) -> None:
    """Also with rows of 600 bytes, and a rate that grows all the time."""
    rows = [
        {"step": step, "time": {"step": 0.5, "samples_per_second": 100 * step}, "more": "x" * 520}
        for step in range(1, 501)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    whole, late = Metrics(500), Metrics(500)
    for each in rows:
        whole.add(each)
    for each in Tail(tmp_path / "metrics.jsonl").read():
        late.add(each)
    assert late.text() == whole.text()


def test_figures_of_a_steady_run() -> None:
    figures = Metrics(total=100)
    assert figures.text() == ""
    for step in range(1, 11):
        figures.add(
            {"step": step, "loss": 1.25, "time": {"step": 0.5, "samples_per_second": 2048, "data_wait": 0.05}}
        )
    assert figures.seconds_left == 45.0  # 90 steps of half a second
    assert figures.text() == "loss 1.2500  2,048 samples/s  data wait 10%  ETA 0:45"
    figures.add({"step": 11})  # a row without times changes nothing but the step
    assert figures.seconds_left == 44.5
    assert figures.text() == "loss 1.2500  2,048 samples/s  data wait 10%  ETA 0:44"


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 61, 3725)] == ["0:00", "1:01", "1:02:05"]


def test_plain_lines_are_few_and_the_last_step_is_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(1))
    said: list[str] = []
    with PlainView("masked", tmp_path, 50, said.append, every=1000) as lines:
        for step in range(2, 30):
            with open(path, "a") as file:
                file.write(row(step))
            lines.update()
        assert said == []
    assert said == ["masked  step 29/50  loss 2.0000"]
    with PlainView("masked", tmp_path, 50, said.append, every=0) as lines:
        lines.update()
        assert len(said) == 1  # rows of an earlier start are not printed
        with open(path, "a") as file:
            file.write(row(30))
        lines.update()
        lines.update()
    assert said[1:] == ["masked  step 30/50  loss 2.0000"]


def test_a_bar_where_there_is_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row(7))
    out = io.StringIO()
    with view("masked", tmp_path, 50, Console(file=out, force_terminal=True, width=80)) as bar:
        bar.update()
    assert "7/50" in out.getvalue()
    assert "loss 2.0000" in out.getvalue()
    assert isinstance(view("masked", tmp_path, 50, Console(file=io.StringIO())), PlainView)


def test_a_bar_is_drawn_at_most_ten_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(7))
    out = io.StringIO()
    with view("masked", tmp_path, 50, Console(file=out, force_terminal=True, width=80)) as bar:
        bar.update()
        path.write_text(row(7) + row(8))
        clock.now += 0.09
        bar.update()
        assert "7/50" in out.getvalue()
        assert "8/50" not in out.getvalue()
        clock.now += 0.02
        bar.update()
        assert "8/50" in out.getvalue()
