"""The report page of a run: self-contained, equal to the run's files, escaped, complete when files are missing."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from pretrain.report import write
from pretrain.report.page import data_uri, render_code, show_only_patches
from pretrain.report.plots import Level, Line, distinct, downsample, line_plot, smooth, smoothing_window
from tests.support.report_runs import (
    ParsedPage,
    check_self_contained,
    masked_rows,
    step_row,
    write_run,
    write_stage,
)

TRAIN = {"kind": "train", "train": {"steps": 80}}
HOSTILE = '<script>alert("x")</script><img src=http://far.away/x.png>'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run: masked done, real unfinished with two streams and replaced samples, late not started, mix a merge."""
    folder = write_run(
        tmp_path / "small",
        {"masked": TRAIN, "real": TRAIN, "late": TRAIN, "mix": {"kind": "merge", "inputs": {"real": 1.0}}},
    )
    write_stage(folder / "masked", masked_rows(80), {"zero_shot/digits/top1": 0.9})
    rows = [
        step_row(step, {"text": 5.0, "captions": 3.0}, {"text": 8, "captions": 16}) for step in range(1, 21)
    ]
    rows[4]["skipped"] = {"scenes": {"undecodable": 2, "missing caption": 1}}
    rows[9]["skipped"] = {"scenes": {"undecodable": 3}}
    write_stage(folder / "real", rows, None)
    write_stage(folder / "mix", [], {"perplexity/text/nll": 5.125})
    (folder / "mix" / "metrics.jsonl").unlink()
    return folder


def read(folder: Path) -> str:
    path = write(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside_and_is_small(run: Path) -> None:
    page = read(run)
    check_self_contained(page)
    assert len(page) < 3_000_000
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_the_table_of_stages_holds_what_the_metrics_add_up_to(run: Path) -> None:
    seen = ParsedPage(read(run))
    # 80 steps of a quarter second, 64 samples and 0.025 s of waiting each.
    masked = seen.row("masked", "done")
    assert masked[2:6] == ["80 / 80", "20.0 s", "256", "10.0%"]
    first, last = (float(part) for part in masked[6].split("→"))
    assert first == pytest.approx(0.6 + 4 * math.exp(-1 / 20), rel=1e-3)
    assert last == pytest.approx(0.6 + 4 * math.exp(-4), rel=1e-3)
    assert seen.row("real", "not finished")[2:] == ["20 / 80", "5.0 s", "96", "10.0%", "8 → 8"]
    assert seen.row("late", "not started")[2] == "0 / 80"
    assert seen.row("mix", "done")[2:4] == ["merge", "12.5 s"]
    assert seen.row("masked", "zero_shot/digits/top1")[2] == "0.9"
    assert seen.row("mix", "perplexity/text/nll")[2] == "5.125"


def test_samples_are_counted_by_stream_and_replaced_ones_by_reason(run: Path) -> None:
    (run / "real" / "bad_samples.jsonl").write_text(
        json.dumps(
            {
                "step": 5,
                "source": "scenes",
                "reason": "undecodable",
                "key": "000017",
                "url": "s/3.tar",
                "detail": "",
            }
        )
        + "\n"
    )
    seen = ParsedPage(read(run))
    assert seen.row("masked", "pairs")[2] == "5,120"
    assert seen.row("real", "text")[2] == "160"
    assert seen.row("real", "captions")[2] == "320"
    assert seen.row("real", "scenes", "undecodable")[3] == "5"
    assert seen.row("real", "scenes", "missing caption")[3] == "1"
    assert "5,600 samples were served, 6 (0.107%) were replaced" in seen.text
    assert seen.row("real", "undecodable", "000017", "s/3.tar")


def test_damaged_lines_of_bad_samples_are_counted_and_left_out(run: Path) -> None:
    whole = {"step": 5, "reason": "undecodable", "key": "000017", "url": "s/3.tar", "detail": ""}
    lines = [{"step": 5, "reason": "undecodable"}, whole, {"reason": "no step"}, whole | {"url": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{half\n" + '{"the end'
    (run / "real" / "bad_samples.jsonl").write_text(text)
    seen = ParsedPage(read(run))
    assert "Stage real: 4 lines of bad_samples.jsonl are damaged and left out." in seen.text
    assert [row for row in seen.cells if row[:2] == ["real", "undecodable"]] == [
        ["real", "undecodable", "000017", "s/3.tar"]
    ]
    (run / "real" / "bad_samples.jsonl").write_text("{half\n")
    seen = ParsedPage(read(run))
    assert "Stage real: 1 line of bad_samples.jsonl is damaged and left out." in seen.text
    assert "The first replaced samples" not in seen.text


def test_replaced_samples_without_a_number_of_samples_are_no_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "odd", {"masked": TRAIN})
    rows = [
        step_row(1, {"pairs": 2.0}, {"pairs": 8}, skipped={"web": {"undecodable": 2, "odd": "x"}, "other": 3})
    ]
    rows[0]["samples"] = {"pairs": "x"}
    write_stage(folder / "masked", rows, None)
    assert ParsedPage(read(folder)).row("masked", "web", "undecodable")[3] == "2"


def not_finite(row: dict[str, Any], values: list[str], origin: dict[str, Any] | None) -> None:
    """Make a row that of a skipped step, as the trainer writes it."""
    row |= dict.fromkeys((*values, "grad_norm"))
    row["non_finite"] = {"values": values, "origin": origin, "in_a_row": 1}


def test_skipped_steps_are_counted_listed_and_marked(run: Path) -> None:
    rows = masked_rows(80)
    not_finite(
        rows[16], ["loss", "loss/pairs"], {"stream": "pairs", "kind": "output", "module": "visual.mlp"}
    )
    not_finite(rows[17], ["loss", "loss/pairs"], {"stream": "pairs", "kind": "loss", "module": None})
    not_finite(rows[40], ["grad_norm"], None)
    write_stage(run / "masked", rows, {"zero_shot/digits/top1": 0.9})
    page = read(run)
    seen = check_self_contained(page)
    assert "100 optimizer steps 3 skipped" in seen.text
    assert (
        "Stage masked: 3 steps skipped because a loss or the gradient was not finite (the last: step 41)."
        in seen.text
    )
    assert seen.row("masked", "17")[2:] == ["loss, loss/pairs", "pairs", "the output of visual.mlp"]
    assert seen.row("masked", "18")[2:] == ["loss, loss/pairs", "pairs", "the loss"]
    assert seen.row("masked", "41")[2:] == ["grad_norm", "–", "not when computed again: suspect the hardware"]
    assert "Stage real: " not in seen.text
    masked, real = page.split("<h3>Loss of masked</h3>")[1].split("<h3>Loss of real</h3>")
    assert [part.count('class="tick"') for part in (masked, real)] == [1, 0]
    assert "skipped step" in masked


def test_a_run_without_incidents_does_not_mention_them(run: Path) -> None:
    text = ParsedPage(read(run)).text
    assert "kipped" not in text
    assert "failed" not in text


def test_a_stage_that_only_skipped_has_no_loss_and_says_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "nan", {"masked": TRAIN})
    rows = masked_rows(3)
    for row in rows:
        not_finite(row, ["loss", "loss/pairs"], None)
    write_stage(folder / "masked", rows, None)
    seen = ParsedPage(read(folder))
    assert "Loss: no step had a finite loss" in seen.text
    assert "No stage has logged a loss yet." not in seen.text
    assert seen.row("masked", "2")[2] == "loss, loss/pairs"
    assert seen.row("masked", "not finished")[6] == "–"


def test_failed_evaluations_are_counted_and_listed_with_their_reason(run: Path) -> None:
    rows = masked_rows(80)
    reason = "/held/<digits>/00003.tar: No such file or directory"
    for step in (20, 80):
        rows[step - 1].pop("eval")
        rows[step - 1]["eval_failed"] = {"zero_shot/digits": reason}
    write_stage(run / "masked", rows, {})
    seen = check_self_contained(read(run))
    assert "Stage masked: 2 evaluations failed (the last: zero_shot/digits at step 80)." in seen.text
    assert seen.row("masked", "20") == ["masked", "20", "zero_shot/digits", reason]
    assert seen.row("masked", "80") == ["masked", "80", "zero_shot/digits", reason]
    # The figure is that of step 70, the last evaluation that did not fail, and is not called that of the end.
    assert seen.row("masked", "zero_shot/digits/top1")[2:] == ["0.8", "70"]


def test_a_page_on_which_every_evaluation_failed_does_not_say_that_none_ran(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "gone", {"masked": TRAIN})
    rows = [step_row(step, {"pairs": 2.0}, {"pairs": 8}) for step in range(1, 4)]
    rows[1]["eval_failed"] = {"zero_shot/digits": "gone"}
    write_stage(folder / "masked", rows, None)
    seen = ParsedPage(read(folder))
    assert "Held-out metrics: every evaluation failed" in seen.text
    assert "No evaluation has run" not in seen.text
    assert seen.row("masked", "2")[2:] == ["zero_shot/digits", "gone"]


def test_a_table_of_incidents_is_limited_to_the_last_and_says_how_many_there_are(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "many", {"masked": TRAIN})
    rows = masked_rows(1500)
    for row in rows[100:1400]:
        not_finite(row, ["loss", "loss/pairs"], None)
    write_stage(folder / "masked", rows, None)
    seen = ParsedPage(read(folder))
    assert "Stage masked: 1,300 steps skipped" in seen.text
    assert "Skipped steps: the last 20 of each stage, 1,300 in all" in seen.text
    listed = [int(row[1]) for row in seen.cells if row[0] == "masked" and row[1].isdigit()]
    assert listed == list(range(1381, 1401))


def test_every_stage_has_its_curves_and_flip_its_floor(run: Path) -> None:
    text = ParsedPage(read(run)).text
    for expected in (
        "Loss of masked", "Loss of real", "lower bound of the loss (repeated captions)",
        "ln(rows in the batch with the same caption)",
        "zero_shot/digits/top1", "Learning rate", "Gradient norm", "Throughput", "samples/s", "step of the stage",
        "loss (nats)",
    ):  # fmt: skip
        assert expected in text, expected
    flip_part, sphinx_part = text.split("Loss of masked")[1].split("Loss of real")
    assert "lower bound of the loss (repeated captions)" in flip_part
    assert "captions text" in sphinx_part


def test_environment_and_recipe_are_on_the_page(run: Path) -> None:
    page = read(run)
    seen = ParsedPage(page)
    assert seen.row("torch")[1] == "2.99.1"
    assert seen.row("ranks per node")[1] == "2"
    assert "2 cores, 0 GPUs, Python 3.11.7" in seen.text
    assert "<details>" in page
    assert " ".join((run / "recipe.yaml").read_text().split()) in seen.text


def test_missing_parts_are_named(run: Path, tmp_path: Path) -> None:
    text = ParsedPage(read(run)).text
    assert "Not started, so not shown below: late." in text
    assert "Stage real has not finished; its metrics end at step 20." in text
    waiting = write_run(tmp_path / "waiting", {"masked": TRAIN})
    for name in ("env.json", "job.json"):
        (waiting / name).unlink()
    text = ParsedPage(read(waiting)).text
    for line in (
        "Not started", "No stage has logged a loss yet.", "No evaluation has run", "The run folder has no env.json",
    ):  # fmt: skip
        assert line in text, line


def test_a_truncated_metrics_line_and_a_nan_loss_are_tolerated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "cut", {"masked": TRAIN})
    rows = masked_rows(12)
    rows[6]["loss"] = math.nan
    write_stage(folder / "masked", rows, None)
    with open(folder / "masked" / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "loss": 1.')
    assert ParsedPage(read(folder)).row("masked", "not finished")[2] == "12 / 80"


def test_stages_without_a_recipe_are_reported_too(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    write_stage(folder / "main", masked_rows(3), None)
    text = ParsedPage(read(folder)).text
    assert "Run bare" in text
    assert "has no recipe.yaml" in text


def test_text_from_the_run_folder_is_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "hostile", {"masked": TRAIN}, name=HOSTILE)
    rows = [step_row(step, {HOSTILE: 1.0, "other": 2.0}, {HOSTILE: 4}) for step in range(1, 4)]
    rows[0] |= {"skipped": {HOSTILE: {HOSTILE: 1}}, "eval": {HOSTILE: 0.5}}
    write_stage(folder / "masked", rows, {HOSTILE: 0.5})
    (folder / "masked" / "bad_samples.jsonl").write_text(
        json.dumps({"step": 1, "reason": HOSTILE, "key": HOSTILE, "url": HOSTILE, "detail": ""}) + "\n"
    )
    (folder / "env.json").write_text(json.dumps({"host": HOSTILE, "packages": {HOSTILE: HOSTILE}}))
    page = read(folder)
    seen = check_self_contained(page)
    assert "img" not in seen.tags
    assert seen.text.count('<script>alert("x")</script>') > 10
    assert "<script" not in page


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_run_is_named(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "nothing-here"
    if exists:
        folder.mkdir()
    with pytest.raises(UserError, match="nothing-here"):
        write(folder)
    assert not (folder / "report.html").exists()


def test_the_same_folder_gives_the_same_page(run: Path) -> None:
    assert read(run) == read(run)


def paths(svg: str, variable: str) -> list[list[tuple[float, float]]]:
    """Points of the SVG paths drawn in a colour variable."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: {re.escape(variable)}', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ?(\S+) (\S+)", path)] for path in found]


def test_a_plotted_curve_has_the_values_of_the_data() -> None:
    x, y = [0, 10, 30, 40], [5.0, 1.0, 2.0, 4.0]
    plot = line_plot("loss", [Line("a", x, y, 1)], "step", "nats", [Level("floor", 1.5, 7)])
    assert "http" not in plot.svg
    ((*points,),) = paths(plot.svg, "var(--c1)")
    places, heights = np.array(points).T
    # An SVG's y axis points down; otherwise the drawing is one affine map of the data.
    slope, offset = np.polyfit(heights, y, 1)
    assert slope < 0
    np.testing.assert_allclose(slope * heights + offset, y, atol=1e-4)
    np.testing.assert_allclose(np.polyval(np.polyfit(places, x, 1), places), x, atol=1e-3)
    (level,) = paths(plot.svg, "var(--c7)")
    assert {round(slope * height + offset, 4) for _, height in level} == {1.5}
    assert [(key.label, key.mark) for key in plot.legend] == [("a", "line"), ("floor", "dashed")]


def test_marks_stand_at_their_steps() -> None:
    """The marks' x in the drawing is the same affine map of the step as the curve's."""
    x, y = [0, 10, 30, 40], [5.0, 1.0, 2.0, 4.0]
    plot = line_plot("loss", [Line("a", x, y, 1)], "step", "nats", marks=[10, 25], marked="skipped step")
    ((*points,),) = paths(plot.svg, "var(--c1)")
    slope, offset = np.polyfit([place for place, _ in points], x, 1)
    marks = re.findall(r'<use href="[^"]*" x="([^"]*)" y="[^"]*" style="[^"]*var\(--c6\)', plot.svg)
    np.testing.assert_allclose(np.array(marks, float) * slope + offset, [10, 25], atol=1e-3)
    assert [(key.label, key.mark, key.colour) for key in plot.legend][1:] == [("skipped step", "tick", 6)]


def test_many_marks_are_thinned_to_what_a_plot_can_show() -> None:
    steps = sorted({*range(1, 3000), 10_000, 50_000})
    kept = distinct(steps, most=100)
    assert set(kept) <= set(steps)
    assert len(kept) <= 100
    width = (50_000 - 1) / 100
    for step in steps:  # something is drawn within the width of one interval of every mark
        assert min(abs(step - place) for place in kept) <= width
    assert distinct([3, 4, 9], most=3) == [3, 4, 9]


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.7), (0.31, 0.44), (1.0, 9.5), (2.0, 19.0), (0.1, 60.0), (0.002, 300.0)]
)
def test_a_log_axis_has_a_few_labels_whatever_its_range(low: float, high: float) -> None:
    values = list(np.geomspace(low, high, 20))
    plot = line_plot("norm", [Line("a", list(range(20)), values, 0)], "x", "y", log=True)
    labels = re.findall(r'<text style="[^"]*text-anchor: end[^"]*"[^>]*>([^<]*)</text>', plot.svg)
    assert 3 <= len(labels) <= 10, labels
    assert all(low / 2 <= float(label) <= high * 2 for label in labels), labels


def test_long_curves_are_thinned_without_moving_their_mean() -> None:
    generator = np.random.default_rng(1)
    y = generator.normal(size=4000)
    places, values = downsample(range(4000), y, max_points=400)
    assert len(values) == 400
    np.testing.assert_allclose(values, y.reshape(400, 10).mean(axis=1))
    np.testing.assert_allclose(places, np.arange(4000).reshape(400, 10).mean(axis=1))
    places, values = downsample([1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0])
    assert (list(places), list(values)) == ([1, 4], [1.0, 2.0])


@pytest.mark.parametrize("steps", [1, 2, 5, 59, 60, 200])
def test_smoothing_is_the_mean_over_neighbours(steps: int) -> None:
    y = np.random.default_rng(steps).normal(size=steps)
    y[steps // 2] = math.nan if steps > 5 else y[steps // 2]
    for window in (1, 3, 9, smoothing_window(steps)):
        half = window // 2
        expected = (
            [np.nanmean(y[max(0, i - half) : i + half + 1]) if steps else 0 for i in range(steps)]
            if window > 1
            else y
        )
        np.testing.assert_allclose(smooth(y, window), expected, rtol=1e-9, atol=1e-12)


def decoded(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)


def test_pictures_keep_their_pixels_and_masks_hide_whole_patches() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 12), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(data_uri(pixels)), pixels)
    kept = [0, 4, 8]
    seen = decoded(data_uri(show_only_patches(pixels, kept, 4)))
    for y in range(12):
        for x in range(12):
            is_kept = y // 4 * 3 + x // 4 in kept
            assert seen[3, y, x] == (255 if is_kept else 0)
            if is_kept:
                assert seen[:3, y, x].tolist() == pixels[:, y, x].tolist()


def test_backticks_become_code_and_nothing_else_does() -> None:
    assert render_code("run `a <b>` & go") == "run <code>a &lt;b&gt;</code> &amp; go"
    assert render_code("one ` alone <i>") == "one ` alone &lt;i&gt;"


def test_files_that_are_in_no_sample_are_counted(run: Path) -> None:
    assert "in no sample" not in read(run)
    (run / "real" / "left_out.json").write_text(
        json.dumps({"text.scenes": {"symbolic links": 1234}, "odd": 3})
    )
    page = read(run)
    assert "Files in the tars that are in no sample" in page
    assert "symbolic links" in page
    assert "1,234" in page
