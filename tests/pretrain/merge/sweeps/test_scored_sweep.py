"""Scored sweeps: the scores are those that the command prints, and no output is scored twice."""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge import merge, parse_betas
from pretrain.merge.sweeps.chart import picture
from pretrain.merge.sweeps.results import Sweep, SweepPoint
from pretrain.merge.sweeps.scored_sweep import run_sweep
from pretrain.merge.sweeps.scoring import parse_command
from pretrain.merge.sweeps.sweep import plan_sweep
from pretrain.run.lock import FolderLock
from tests.support.merge_inputs import floats, write
from tests.support.scorers import calls, scorer

A, B = 2.0, 1.0  # first elements of w


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    for seed, (name, first) in enumerate((("a", A), ("b", B))):
        w = floats(seed, 50, 3)
        w[0, 0] = first
        write(tmp_path / name, {"w": w, "h": floats(seed, 7)})
    return "./a", "./b"


def run(pair: tuple[str, str], betas: str, body: str, **options: object) -> Sweep:
    numbers = parse_betas(betas)
    plans, opened = plan_sweep(*pair, numbers)
    command = parse_command(scorer(Path(), body), "--eval-cmd")
    return run_sweep(plans, opened, numbers, Path("s"), command, **options)  # type: ignore[arg-type]


def expected(beta: float) -> float:
    return float(np.float32(beta * A + (1 - beta) * B))


PEAK = "print(-(x - 1.3) ** 2)"


@pytest.mark.parametrize("keep", [True, False])
def test_scores_are_those_of_the_merges(pair: tuple[str, str], keep: bool) -> None:
    result = run(pair, "0:1:0.1", PEAK, keep=keep)
    assert [one.beta for one in result.points] == parse_betas("0:1:0.1")
    for one in result.points:
        assert one.metrics == {"score": -((expected(one.beta) - 1.3) ** 2)}
    assert result.best is not None
    assert result.best.beta == 0.3
    folders = sorted(path.name for path in Path("s").iterdir() if path.is_dir())
    assert folders == (["logs"] if not keep else sorted([f"beta-{b / 10:.2f}" for b in range(11)] + ["logs"]))
    assert len(calls(Path())) == 11
    rows = list(csv.DictReader(Path("s/sweep.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [
        one.metrics["score"] for one in result.points if one.metrics
    ]
    assert [row["folder"] for row in rows] == (
        [f"beta-{b / 10:.2f}" for b in range(11)] if keep else [""] * 11
    )
    ElementTree.parse("s/sweep.svg")
    marked = [line for line in result.lines() if "* best" in line]
    assert [line.split()[0] for line in marked] == ["0.3"]


def test_without_keeping_one_output_is_there_at_a_time(pair: tuple[str, str]) -> None:
    body = "print(sum(name.startswith('beta-') for name in os.listdir(os.path.dirname(folder))))"
    result = run(pair, "0:1:0.25", body, keep=False)
    assert [one.metrics for one in result.points] == [{"score": 1.0}] * 5


def test_the_scored_folder_has_the_bytes_of_merge(pair: tuple[str, str]) -> None:
    merge(pair, Path("m"), beta=0.25)
    body = "import hashlib; print(int(hashlib.sha256(raw).hexdigest()[:12], 16))"
    result = run(pair, "0,0.25", body, keep=False)
    import hashlib

    digest = int(hashlib.sha256(Path("m/model.safetensors").read_bytes()).hexdigest()[:12], 16)
    assert result.points[1].metrics == {"score": float(digest)}


@pytest.mark.parametrize("keep", [True, False])
def test_after_a_failure_it_resumes_with_the_outputs_without_a_score(
    pair: tuple[str, str], keep: bool
) -> None:
    body = "if x > 1.4 and not os.path.exists('fixed'): sys.exit('no memory')\nprint(x)"
    with pytest.raises(UserError, match=r"exit code 1; see s/logs/beta-0\.50\.err\n  no memory"):
        run(pair, "0:1:0.25", body, keep=keep)
    half = json.loads(Path("s/sweep.json").read_text())
    assert [e["figures"] is not None for e in half["betas"]] == [True, True, False, False, False]
    Path("fixed").write_text("")
    result = run(pair, "0:1:0.25", body, keep=keep)
    assert [one.metrics for one in result.points] == [{"score": expected(b)} for b in parse_betas("0:1:0.25")]
    assert [Path(c).name for c in calls(Path())] == [
        f"beta-{b}" for b in ("0.00", "0.25", "0.50", "0.50", "0.75", "1.00")
    ]
    assert run(pair, "0:1:0.25", body, keep=keep).lines() == result.lines()
    assert len(calls(Path())) == 6
    assert not keep or Path("s/beta-0.50").is_dir()


def test_more_betas_are_added_to_those_scored(pair: tuple[str, str]) -> None:
    run(pair, "0:1:0.5", PEAK, keep=False)
    result = run(pair, "0:1:0.25", PEAK, keep=False)
    assert len(calls(Path())) == 5
    assert len(result.points) == 5
    fewer = run(pair, "0.5", PEAK, keep=False)
    assert len(fewer.points) == 5
    assert len(calls(Path())) == 5


def test_outputs_that_were_kept_are_not_removed(pair: tuple[str, str]) -> None:
    run(pair, "0:1:0.5", PEAK, keep=True)
    result = run(pair, "0:1:0.25", PEAK, keep=False)
    assert sorted(p.name for p in Path("s").glob("beta-*")) == ["beta-0.00", "beta-0.50", "beta-1.00"]
    assert [one.folder is not None for one in result.points] == [True, False, True, False, True]


def test_an_output_that_was_removed_by_hand_is_made_again_for_its_score(pair: tuple[str, str]) -> None:
    plans, opened = plan_sweep(*pair, [0.0, 0.5])
    run_sweep(plans, opened, [0.0, 0.5], Path("s"))
    shutil.rmtree("s/beta-0.50")
    result = run(pair, "0,0.5", "print(x)", keep=False)
    assert [one.metrics for one in result.points] == [{"score": expected(beta)} for beta in (0.0, 0.5)]
    assert [one.folder for one in result.points] == ["beta-0.00", None]


def test_outputs_keep_their_names_beside_betas_of_more_decimals(pair: tuple[str, str]) -> None:
    run(pair, "0,1", "print(x)")
    result = run(pair, "0,0.125", "print(x)")
    assert sorted(path.name for path in Path("s").glob("beta-*")) == ["beta-0.00", "beta-0.125", "beta-1.00"]
    assert [one.folder for one in result.points] == ["beta-0.00", "beta-0.125", "beta-1.00"]
    assert len(calls(Path())) == 3


def test_metric_and_lower_is_better(pair: tuple[str, str]) -> None:
    body = "print(json.dumps({'top1': x, 'nll': {'real': (x - 1.5) ** 2, 'odd': float('nan')}}))"
    result = run(pair, "0:1:0.25", body, metric="nll.real", lower=True)
    assert result.best is not None
    assert result.best.beta == 0.5
    assert result.names == ["nll.real", "top1", "nll.odd"]
    assert "nan" in result.lines()[1]
    assert json.loads(Path("s/sweep.json").read_text())["betas"][0]["figures"]["nll.odd"] is None
    with pytest.raises(UserError, match=r"the command printed top1, nll\.real, nll\.odd"):
        run(pair, "0.1", body, metric="accuracy")
    before = Path("s/sweep.json").read_text()
    with pytest.raises(UserError, match="--metric accuracy: the command printed top1"):  # all are scored
        run(pair, "0:1:0.25", body, metric="accuracy")
    assert Path("s/sweep.json").read_text() == before


def test_another_command_or_other_weights_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    run(pair, "0:1:0.5", PEAK, keep=False)
    plans, opened = plan_sweep(*pair, [0.5])
    with pytest.raises(UserError, match="scored by another command"):
        run_sweep(plans, opened, [0.5], Path("s"), parse_command("cat {}/x", "--eval-cmd"))
    write(tmp_path / "b", {"w": floats(9, 50, 3), "h": floats(9, 7)})
    with pytest.raises(UserError, match="holds a sweep of other weights"):
        run(pair, "0:1:0.5", PEAK, keep=False)
    Path("s/sweep.json").write_text("{}")
    with pytest.raises(UserError, match="not written by dromos sweep"):
        run(pair, "0:1:0.5", PEAK, keep=False)


def test_a_command_that_never_scored_is_forgotten(pair: tuple[str, str]) -> None:
    betas = [0.0, 0.5, 1.0]
    plans, opened = plan_sweep(*pair, betas)
    typo = parse_command("ls {}/x", "--eval-cmd")
    with pytest.raises(UserError, match="exit code"):
        run_sweep(plans, opened, betas, Path("s"), typo)
    result = run(pair, "0:1:0.5", "print(x)")
    assert [one.metrics for one in result.points] == [{"score": expected(beta)} for beta in betas]
    with pytest.raises(UserError, match="another command"):
        run_sweep(plans, opened, betas, Path("s"), typo)


def test_a_store_is_refused_and_no_folder_takes_its_name(pair: tuple[str, str], tmp_path: Path) -> None:
    plans, opened = plan_sweep(*pair, [0.5])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="write s3://BUCKET"):
        run_sweep(plans, opened, [0.5], Path("s3://bucket/sweep"))
    assert sorted(tmp_path.iterdir()) == before


def test_no_keep_needs_a_scoring_command(pair: tuple[str, str]) -> None:
    plans, opened = plan_sweep(*pair, [0.5])
    with pytest.raises(UserError, match="--eval-cmd"):
        run_sweep(plans, opened, [0.5], Path("s"), keep=False)
    assert not Path("s").exists()


def test_two_sweeps_into_one_folder(pair: tuple[str, str]) -> None:
    lock = FolderLock(Path("s"))
    try:
        with pytest.raises(UserError, match=r"s is being written by pid .* or choose another --out"):
            run(pair, "0.5", PEAK)
    finally:
        lock.release()
    assert run(pair, "0.5", PEAK).best is not None


def scored(values: dict[float, float | None], lower: bool = False) -> Sweep:
    betas = [SweepPoint(beta, None, "k", {"m": value}) for beta, value in values.items()]
    return Sweep("a <&", 'b "', ("x",), "m", lower, betas)


def test_the_best_is_finite_and_of_equals_the_smallest() -> None:
    assert scored({0.0: None, 0.5: 2.0, 0.7: 2.0, 1.0: 1.0}).best == SweepPoint(0.5, None, "k", {"m": 2.0})
    lower = scored({0.0: -1.0, 0.5: 2.0, 1.0: None}, lower=True).best
    assert lower is not None
    assert lower.beta == 0.0
    assert scored({0.5: None}).best is None


@pytest.mark.parametrize(
    "values",
    [
        {0.0: 1.0, 0.5: 3.0, 1.0: 2.0},
        {0.0: 1.0, 0.5: None, 1.0: 2.0},
        {0.5: 1.0},
        {0.5: None},
        {0.0: 1.0, 1.0: 1.0},
    ],
    ids=str,
)
def test_the_chart_shows_every_finite_score(values: dict[float, float | None]) -> None:
    root = ElementTree.fromstring(picture(scored(values)))
    tips = {tip.text for tip in root.iter("{http://www.w3.org/2000/svg}title")}
    for beta, value in values.items():
        assert (f"beta {beta:g}: {value:.8g}" in tips) is (value is not None) if value is not None else True
    dashed = [e for e in root.iter("{http://www.w3.org/2000/svg}line") if e.get("stroke-dasharray")]
    assert len(dashed) == (0.0 in values and 1.0 in values)


def test_the_gain_is_one_shape_and_a_best_parent_is_reported() -> None:
    above: dict[float, float | None] = {0.0: 1.0, 0.25: 3.0, 0.5: 4.0, 1.0: 2.0}
    twice: dict[float, float | None] = {0.0: 1.0, 0.2: 3.0, 0.5: 1.0, 0.8: 3.0, 1.0: 1.5}
    assert picture(scored(above)).count('fill="#e7f0fa"') == 1
    assert "+2 against the better parent" in picture(scored(above))
    assert picture(scored(twice)).count('fill="#e7f0fa"') == 2
    assert "no mix is better than the better parent" in picture(scored({0.0: 1.0, 0.5: 1.5, 1.0: 2.0}))


def test_the_direction_is_stored_with_the_metric(pair: tuple[str, str]) -> None:
    body = "print(json.dumps({'top1': 1, 'loss': x}))"
    first = run(pair, "0:1:0.5", body, metric="loss", lower=True)
    assert run(pair, "0:1:0.25", body).best == first.best
    assert run(pair, "0:1:0.25", body, metric="loss").lower
    assert not run(pair, "0:1:0.25", body, metric="top1").lower
    assert not run(pair, "0:1:0.25", body, metric="loss", lower=False).lower


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_last_panel_fills_its_row(count: int) -> None:
    betas = [
        SweepPoint(beta, None, "k", {f"m{i}": beta + i for i in range(count)}) for beta in (0.0, 0.5, 1.0)
    ]
    drawn = picture(Sweep("a", "b", ("x",), "m0", False, betas))
    ends = [
        float(x)
        for x in re.findall(r'<line x1="[0-9.]+" y1="[0-9.]+" x2="([0-9.]+)"[^>]*stroke-dasharray', drawn)
    ]
    assert len(ends) == count
    assert ends[-1] == ends[0]
