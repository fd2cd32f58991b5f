"""The greedy soup equals the paper's recipe, computed here by brute force; every mean is computed from the inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import make_request
from pretrain.merge.sweeps.scoring import parse_command
from pretrain.merge.sweeps.soup import Soup, run_soup
from pretrain.merge.verify.check_output import verify
from tests.support.merge_inputs import floats, write
from tests.support.scorers import calls, scorer

FIRST = [0.9, 1.6, 1.25, 0.2, 1.05]  # first elements of w
PEAK = 1.1
SCORE = f"print(json.dumps({{'top1': -abs(x - {PEAK}), 'x': x}}))"


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for seed, first in enumerate(FIRST):
        w = floats(seed, 30, 3)
        w[0, 0] = first
        write(tmp_path / f"m{seed}", {"w": w, "h": floats(seed, 7)})
    return [f"./m{seed}" for seed in range(len(FIRST))]


def greedy() -> tuple[list[int], list[tuple[int, ...]]]:
    """Inputs in the order in which the recipe adds them, and every mean that it scores."""

    def score(of: list[int]) -> float:
        mean = sum(np.float64(np.float32(FIRST[i])) * (1.0 / len(of)) for i in sorted(of))
        return -abs(float(np.float32(mean)) - PEAK)

    order = sorted(range(len(FIRST)), key=lambda i: -score([i]))
    chosen = [order[0]]
    tried: list[tuple[int, ...]] = [(i,) for i in range(len(FIRST))]
    for i in order[1:]:
        tried.append(tuple(sorted([*chosen, i])))
        if score([*chosen, i]) >= score(chosen):
            chosen.append(i)
    return chosen, tried


def run(inputs: list[str], body: str = SCORE, out: str = "soup", **options: Any) -> Soup:
    merge_request = make_request(inputs, method="soup")
    _, opened = prepare(merge_request)
    command = parse_command(scorer(Path(), body), "--score-cmd")
    return run_soup(merge_request, opened, Path(out), command, **options)


def same_tensors(a: str, b: str) -> bool:
    one, two = load_file(f"{a}/model.safetensors"), load_file(f"{b}/model.safetensors")
    return one.keys() == two.keys() and all(one[n].tobytes() == two[n].tobytes() for n in one)


def test_the_soup_is_that_of_the_recipe(inputs: list[str]) -> None:
    chosen, tried = greedy()
    assert 1 < len(chosen) < len(FIRST)  # else this shows little
    soup = run(inputs)
    assert list(soup.chosen) == chosen
    assert [trial.members for trial in soup.trials] == tried
    merge([inputs[i] for i in sorted(chosen)], "want", method="soup")
    assert same_tensors("soup", "want")
    assert not Path("soup.trials").exists()
    assert sorted(p.name for p in Path("soup").iterdir() if p.is_dir()) == ["logs"]
    found = json.loads(Path("soup/soup.json").read_text())
    assert found["chosen"] == [chr(ord("A") + i) for i in chosen]
    kept = [tuple(t["of"]) for t in found["trials"] if t["kept"]]
    assert kept[-1] == tuple(sorted(chosen))
    assert found["trials"][0]["figures"]["x"] == np.float32(FIRST[0])
    assert verify("soup", full=True).wrong is False
    text = "\n".join(soup.lines())
    assert "soup: the mean of " + " ".join(found["chosen"]) in text
    assert "dropped" in text


def test_less_may_be_better(inputs: list[str]) -> None:
    soup = run(inputs, f"print(abs(x - {PEAK}))", lower=True)
    assert list(soup.chosen) == greedy()[0]


def test_a_score_that_stays_the_same_is_no_drop_and_nan_is_worst(inputs: list[str]) -> None:
    assert len(run(inputs, "print(1)").chosen) == len(FIRST)
    body = "print('nan' if x > 1.5 else 1)"  # the second model alone
    soup = run(inputs, body, out="other")
    assert soup.trials[1].metrics == {"score": None}
    assert soup.chosen[-1] == 1


def test_it_resumes_after_a_failure(inputs: list[str]) -> None:
    body = "if x == 1.25 and not os.path.exists('fixed'): sys.exit('lost the node')\n"
    with pytest.raises(UserError, match=r"exit code 1; see soup\.trials/logs/C\.err\n  lost the node"):
        run(inputs, body + SCORE)
    assert not Path("soup").exists()
    assert len(json.loads(Path("soup.trials/soup.json").read_text())["trials"]) == 2
    Path("fixed").write_text("")
    soup = run(inputs, body + SCORE)
    chosen, tried = greedy()
    assert list(soup.chosen) == chosen
    assert len(calls(Path())) == len(tried) + 1
    again = run(inputs, body + SCORE)
    assert again.plain() == soup.plain()
    assert len(calls(Path())) == len(tried) + 1


def test_the_best_alone_is_that_model(inputs: list[str]) -> None:
    best = float(np.float32(FIRST[3]))
    soup = run(inputs, f"print(1 if x == {best!r} else 0)")
    assert soup.chosen == (3,)
    assert same_tensors("soup", "m3")


def test_uniform_needs_no_score_and_takes_one(inputs: list[str]) -> None:
    merge_request = make_request(inputs, method="soup")
    _, opened = prepare(merge_request)
    with pytest.raises(UserError, match="--score-cmd"):
        run_soup(merge_request, opened, Path("soup"))
    assert not Path("soup.trials").exists()
    soup = run_soup(merge_request, opened, Path("soup"), uniform=True)
    assert soup.chosen == (0, 1, 2, 3, 4)
    merge(inputs, "want", method="soup")
    assert same_tensors("soup", "want")
    scored = run(inputs, "print(x)", out="scored", uniform=True)
    assert [(t.members, t.metrics) for t in scored.trials] == [
        ((0, 1, 2, 3, 4), {"score": float(load_file("want/model.safetensors")["w"][0, 0])})
    ]


def test_a_kill_before_the_results_are_beside_a_uniform_soup(
    inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_request = make_request(inputs, method="soup")
    _, opened = prepare(merge_request)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.merge.sweeps.soup._Search.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            run_soup(merge_request, opened, Path("soup"), uniform=True)
    assert Path("soup/model.safetensors").is_file()
    run_soup(merge_request, opened, Path("soup"), uniform=True)
    assert json.loads(Path("soup/soup.json").read_text())["recipe"] == "uniform"
    assert not Path("soup.trials").exists()


def test_other_models_commands_and_folders_are_refused(inputs: list[str]) -> None:
    run(inputs)
    with pytest.raises(UserError, match="of other models"):
        run(list(reversed(inputs)))
    merge_request = make_request(inputs, method="soup")
    _, opened = prepare(merge_request)
    with pytest.raises(UserError, match="scored by another command"):
        run_soup(merge_request, opened, Path("soup"), parse_command("cat {}/x", "--score-cmd"))
    before = len(calls(Path()))
    with pytest.raises(UserError, match="is not the output of a soup"):
        run(inputs, out="m0")
    with pytest.raises(UserError, match="write s3://BUCKET"):
        run(inputs, out="s3://bucket/soup")
    assert not Path("m0.trials").exists()
    assert not Path("s3:").exists()
    assert len(calls(Path())) == before  # said before hours of scoring
    (Path("soup") / "soup.json").write_text("[]")
    with pytest.raises(UserError, match="not written by dromos soup"):
        run(inputs)


def test_the_direction_is_stored_with_the_metric(inputs: list[str]) -> None:
    body = "print(json.dumps({'far': abs(x - 1.1), 'x': x}))"
    first = run(inputs, body, metric="far", lower=True)
    assert run(inputs, body) == first
    assert run(inputs, body, metric="far") == first
    with pytest.raises(UserError, match="another merge"):
        run(inputs, body, metric="far", lower=False)


def test_without_a_finite_score_there_is_no_soup(inputs: list[str]) -> None:
    with pytest.raises(UserError, match="no model has a finite score"):
        run(inputs[:2], "print('nan')")
    assert not Path("soup").exists()


def test_a_metric_that_is_usually_better_when_lower_is_noted_after_the_first_score(
    inputs: list[str],
) -> None:
    printed: list[str] = []
    run(inputs[:2], "print(json.dumps({'loss': 1.0}))", print_line=printed.append)
    assert printed[0] == "A: loss 1"
    assert printed[1].startswith("note: a higher loss counts as better")
    assert [line for line in printed if "note" in line] == printed[1:2]
    printed.clear()
    run(inputs[:2], "print(json.dumps({'loss': 1.0}))", "other", print_line=printed.append, lower=True)
    assert not [line for line in printed if "note" in line]
