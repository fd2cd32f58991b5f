"""Progress without a terminal: one line per minute, and none for a short run; the bar's width on a terminal."""

from __future__ import annotations

import re

import pytest

from launch.cli import progress_bar
from launch.cli.progress_bar import counting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("unit", "total", "lines"),
    [
        ("bytes", 4_000_000_000, ["merging: 38% of 4.0 GB, 15 MB/s", "merging: 62% of 4.0 GB, 13 MB/s"]),
        ("elements", 4_000_000_000, ["merging: 38% of 4,000,000,000 elements, 15,000,000 a second",
                                     "merging: 62% of 4,000,000,000 elements, 13,157,895 a second"]),
        ("bytes", 0, ["merging: 0.0 GB, 15 MB/s", "merging: 0.0 GB, 13 MB/s"]),
    ],
)  # fmt: skip
def test_a_log_has_a_line_a_minute(
    unit: str, total: int, lines: list[str], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with counting("merging", total, unit) as bar:
        for seconds in (0, 50, 50, 10, 80, 10):
            clock[0] += seconds
            bar.add(500_000_000)
    assert bar.moved == 3_000_000_000
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in lines))


def test_what_is_over_in_a_moment_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("merging", 10) as bar:
        bar.add(10)
        bar.say("a line [of] its own")
    assert capsys.readouterr().err == "a line [of] its own\n"


@pytest.mark.parametrize("columns", [40, 63, 64, 100])
def test_a_bar_stands_in_one_line(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", str(columns))):
        monkeypatch.setenv(name, value)
    with counting("sweeping", 167_800_000_000) as bar:
        bar.add(125_800_000_000)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    assert lines
    assert all(line.startswith("sweeping ") and len(line) <= columns for line in lines), lines
    assert "…" not in text
