"""Checks the figures of `make demo` against thresholds. Skipped if the demo has not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

RUNS = Path(__file__).resolve().parent.parent / "runs" / "demo"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    if not (RUNS / "summary.json").exists():
        pytest.skip("runs/demo/summary.json does not exist: run `make demo` first")
    return json.loads((RUNS / "summary.json").read_text())


def last_evaluation(stage: str) -> dict[str, float]:
    """Return the figures that training with two ranks logged at its last step: an independent source."""
    rows = [json.loads(line) for line in (RUNS / stage / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["eval"]


def test_flip_reads_handwriting(summary: dict[str, Any]) -> None:
    flip = summary["flip"]
    assert flip["held_out"] >= 300
    assert flip["zero_shot_top1"] >= 0.85
    right = sum(row[place] for place, row in enumerate(flip["confusion"]))
    assert sum(map(sum, flip["confusion"])) == flip["held_out"]
    assert right / flip["held_out"] == pytest.approx(flip["zero_shot_top1"], abs=1e-12)


def test_a_step_is_timed_at_each_mask(summary: dict[str, Any]) -> None:
    """Checks no order of the times: a busy machine must not fail the test."""
    seconds = summary["flip"]["step_seconds"]
    assert set(seconds) == {"0", "0.5", "0.75"}
    assert all(value > 0 for value in seconds.values())


def test_text_is_remembered_with_text_and_forgotten_without(summary: dict[str, Any]) -> None:
    sphinx = summary["sphinx"]
    nll = sphinx["text_nll"]
    assert nll["before"] <= sphinx["ln_vocabulary"] - 1.0
    assert nll["without_text"] - nll["before"] >= 0.3
    assert nll["with_text"] - nll["before"] <= 0.05


def test_captions_need_their_images(summary: dict[str, Any]) -> None:
    sphinx = summary["sphinx"]
    for stage, domain in (("real", "real"), ("synthetic", "synthetic")):
        assert sphinx["caption_nll_shuffled"][stage][domain] - sphinx["caption_nll"][stage][domain] >= 0.3


def test_the_sweep_ends_at_its_parents(summary: dict[str, Any]) -> None:
    sweep, sphinx = summary["merge"]["sweep"], summary["sphinx"]
    assert len(sweep) >= 5
    assert [row["beta"] for row in sweep] == sorted({row["beta"] for row in sweep})
    for row, parent in ((sweep[-1], "real"), (sweep[0], "synthetic")):
        assert row["beta"] in (0.0, 1.0)
        for domain in ("real", "synthetic"):
            assert row[f"nll_{domain}"] == pytest.approx(sphinx["caption_nll"][parent][domain], rel=1e-6)
    assert sweep[-1]["nll_text"] == pytest.approx(sphinx["text_nll"]["with_text"], rel=1e-6)


def test_the_summary_agrees_with_what_training_logged(summary: dict[str, Any]) -> None:
    """One process on the saved weights and two ranks in training give the same held-out figures."""
    logged = last_evaluation("sphinx/real")
    assert summary["sphinx"]["text_nll"]["with_text"] == pytest.approx(
        logged["perplexity/text/nll"], rel=1e-5
    )
    assert summary["sphinx"]["caption_nll"]["real"]["real"] == pytest.approx(
        logged["perplexity/real/nll"], rel=1e-5
    )
    flip = last_evaluation("flip/tuned")["zero_shot/digits/top1"]
    assert summary["flip"]["zero_shot_top1"] == pytest.approx(flip, abs=1.5 / summary["flip"]["held_out"])


def test_the_report_shows_the_summary(summary: dict[str, Any]) -> None:
    """The page shows the main numbers of the summary, rounded, and loads nothing from the web."""
    page = (RUNS / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)
    text = re.sub(r"<[^>]+>", " ", page)
    shown = [summary["flip"]["zero_shot_top1"] * 100, *summary["sphinx"]["text_nll"].values()]
    for value in shown:
        assert any(f"{value:.{places}f}" in text for places in (1, 2, 3)), value
