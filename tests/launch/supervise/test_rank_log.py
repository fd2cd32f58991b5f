"""The end of a rank's log, which is printed when the rank fails: short, of this start, and never an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.supervise.rank_process import TAIL_BYTES, Rank, RankProcess


@pytest.mark.parametrize(
    ("prints", "lines"),
    [
        ("seq 1 100", [str(number) for number in range(71, 101)]),
        ("seq 1 30", [str(number) for number in range(1, 31)]),
        ("echo one; echo two >&2; printf '\\n\\n'", ["one", "two"]),
        ("true", []),
        (
            "head -c 200000 /dev/zero | tr '\\0' x; echo end",
            ["x" * (TAIL_BYTES - 4) + "end"],
        ),  # one endless line
        ("printf 'caf\\351 \\n'", ["caf\N{REPLACEMENT CHARACTER}"]),
    ],
)
def test_the_end_of_a_log(tmp_path: Path, prints: str, lines: list[str]) -> None:
    log = tmp_path / "logs" / "rank_0.log"
    for command in ("echo of an earlier start", prints):
        rank = RankProcess(Rank(["bash", "-c", command], os.environ, log))
        assert rank.process.wait() == 0
        rank.kill()
    assert rank.tail().splitlines() == lines
    assert log.read_bytes().count(b"of an earlier start\n") == 1
