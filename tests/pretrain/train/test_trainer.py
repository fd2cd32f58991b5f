"""The training loop on one rank: what a kill or a power cut leaves of checkpoints and logs together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.folder import complete_steps, json_mapping
from pretrain.run.metrics_log import read, truncate
from pretrain.train.non_finite import NonFinite
from pretrain.train.trainer import write_result
from tests.support import fake_training as fake
from tests.support.recorded_files import recorded


def test_a_checkpoint_is_never_ahead_of_the_logs(tmp_path: Path) -> None:
    """A resume at a checkpoint needs the lines of all steps before it: they are not written again."""
    stage = tmp_path / "root" / "main"
    stage.mkdir(parents=True)
    bad = (1, 4)
    with recorded(tmp_path / "root") as disk:
        trainer, _ = fake.trainer(stage, bad=bad, save_every=2)
        assert trainer.run(0)
        disk.promise("the run")
        trainer.close()
    seen = set()
    for outcome in disk.outcomes():
        outcome.write(tmp_path / "cut")
        cut = tmp_path / "cut" / "main"
        newest = max(complete_steps(cut / "checkpoints"), default=0)
        seen.add(newest)
        assert newest == fake.STEPS or not outcome.promised, outcome.after
        logged = [row["step"] for row in read(cut / "metrics.jsonl") if row["step"] <= newest]
        assert logged == list(range(1, newest + 1)), outcome.after
        lines = [line for line in read(cut / "bad_samples.jsonl") if line["step"] <= newest]
        assert [(line["step"], line["row"]) for line in lines] == [
            (step, row) for step in range(1, newest + 1) for row in bad
        ], outcome.after
    assert seen == {0, 2, 4, 6}


def test_a_result_is_absent_or_whole_and_stays(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with recorded(tmp_path / "root") as disk:
        write_result(tmp_path / "root" / "main", 6, 1.5, {"nll": 2.0})
        disk.promise("the result")
    written = {"step": 6, "eval": {"nll": 2.0}, "seconds": 1.5}
    for outcome in disk.outcomes():
        content = outcome.files.get("main/result.json")
        assert content is not None or not outcome.promised, outcome.after
        assert content is None or json.loads(content) == written
    assert json_mapping(tmp_path / "root/main/result.json") == written


@pytest.mark.parametrize("most", [0, 2, 3])
def test_skipped_steps_in_a_row_are_counted_over_a_resume(tmp_path: Path, most: int) -> None:
    """Steps 2 to 4 of 6 are not finite; a run that is saved in their midst stops where an uninterrupted one does."""

    def trained(folder: Path, first: int, stops: int = -1) -> int:
        folder.mkdir(exist_ok=True)
        state = json_mapping(folder / f"checkpoints/step_{first:08d}/state.json") or None
        options = {"nan": (5,), "nan_steps": (1, 2, 3), "max_skipped": most, "stops": stops}
        trainer, engine = fake.trainer(folder, previous_state=state, **options)  # type: ignore[arg-type]
        try:
            if most < 3 and not (stops >= 0 and most == 2):
                with pytest.raises(NonFinite, match=f"step {most + 2}: .*train.max_skipped is {most}"):
                    trainer.run(first)
            else:
                trainer.run(first)
        finally:
            trainer.close()
        return engine.updates

    assert trained(tmp_path / "whole", 0) == (3 if most == 3 else 1)
    rows = read(tmp_path / "whole" / "metrics.jsonl")
    assert [row["non_finite"]["in_a_row"] for row in rows[1:4] if "non_finite" in row] == [1, 2, 3][:most]
    if most:
        trained(tmp_path / "parts", 0, stops=2)  # the signal comes with step 3, which is skipped
        assert complete_steps(tmp_path / "parts" / "checkpoints") == [3]
        trained(tmp_path / "parts", 3)
        assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")


def untimed(stage: Path) -> list[dict[str, Any]]:
    return [{**row, "time": 0} for row in read(stage / "metrics.jsonl")]


def resume(stage: Path, evaluate: Callable[[], dict[str, float]], **options: Any) -> bool:
    """Continue as `Session` does; returns what `Trainer.run` returns."""
    first = max(complete_steps(stage / "checkpoints"), default=0)
    state = json_mapping(stage / f"checkpoints/step_{first:08d}/state.json")
    truncate(stage / "metrics.jsonl", first, state.get("line"))
    trainer, _ = fake.trainer(stage, previous_state=state or None, evaluate=evaluate, **options)
    finished = trainer.run(first)
    trainer.close()
    return finished


def test_an_evaluation_comes_after_the_save_and_a_cut_between_them_loses_neither(tmp_path: Path) -> None:
    """After any power cut, the resumed run has the log of an uninterrupted one, with every figure."""
    stage = tmp_path / "root" / "main"
    stage.mkdir(parents=True)
    options: dict[str, Any] = {"save_every": 4, "evaluate_every": 2}
    found = []

    def evaluate() -> dict[str, float]:
        row = read(stage / "metrics.jsonl")[-1]
        found.append((row["step"], "eval" in row, complete_steps(stage / "checkpoints")))
        return {"perplexity/held/nll": 0.5}

    with recorded(tmp_path / "root", in_place=["metrics.jsonl"]) as disk:
        trainer, _ = fake.trainer(stage, evaluate=evaluate, **options)
        assert trainer.run(0)
        trainer.close()
    assert found == [(2, False, []), (4, False, [4]), (6, False, [4, 6])]
    whole = untimed(stage)
    assert [row["step"] for row in whole if "eval" in row] == [2, 4, 6]
    assert set(read(stage / "metrics.jsonl")[1]["time"]) > {"eval"}
    ended, seen, cut = set(), set(), tmp_path / "cut" / "main"
    for outcome in disk.outcomes():
        done = [name for name in outcome.files if name.endswith("COMPLETE") and ".tmp" not in name]
        newest = max((int(name.split("_")[1][:8]) for name in done), default=0)
        key = (newest, outcome.files.get("main/metrics.jsonl"))
        if key in seen:
            continue
        seen.add(key)
        outcome.write(tmp_path / "cut")
        cut.mkdir(exist_ok=True)
        logged = len(read(cut / "metrics.jsonl"))
        ended.add((newest, logged < newest, "eval" in (read(cut / "metrics.jsonl") or [{}])[-1]))
        assert resume(cut, lambda: {"perplexity/held/nll": 0.5}, **options)
        assert untimed(cut) == whole, outcome.after
    # A kill between save and evaluation, after the evaluation, and a cut while the line was overwritten.
    assert {
        (4, False, False),
        (4, False, True),
        (4, True, False),
        (6, False, False),
        (6, False, True),
    } <= ended


@pytest.mark.parametrize("stops", [1, 3, 4, 5])
def test_a_run_that_was_asked_to_stop_saves_and_evaluates_when_it_goes_on(tmp_path: Path, stops: int) -> None:
    """The signal comes with step stops + 1; evaluations are due after steps 2, 4 and 6, the last one."""
    calls = []

    def evaluate() -> dict[str, float]:
        calls.append(1)
        return {"perplexity/held/nll": 0.5}

    options: dict[str, Any] = {"evaluate_every": 2}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert resume(tmp_path / "whole", evaluate, **options)
    calls.clear()
    assert not resume(tmp_path / "parts", evaluate, stops=stops, **options)
    assert complete_steps(tmp_path / "parts" / "checkpoints") == [stops + 1]
    assert len(calls) == stops // 2
    assert "eval" not in untimed(tmp_path / "parts")[-1]
    assert resume(tmp_path / "parts", evaluate, **options)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert len(calls) == 3


def test_a_run_without_held_out_sets_that_is_asked_to_stop_in_its_last_step_is_done(tmp_path: Path) -> None:
    trainer, _ = fake.trainer(tmp_path, stops=fake.STEPS - 1)
    assert trainer.run(0)
    trainer.close()


def test_a_failed_evaluation_is_in_its_line_and_tried_again_by_a_resume_at_its_step(tmp_path: Path) -> None:
    trainer, _ = fake.trainer(tmp_path, evaluate=dict, eval_failed={"perplexity/held": "it is gone"})
    assert trainer.run(0)
    trainer.close()
    whole = untimed(tmp_path)
    assert ["eval_failed" in row for row in whole] == [False] * (fake.STEPS - 1) + [True]
    assert whole[-1]["eval_failed"] == {"perplexity/held": "it is gone"}
    assert resume(tmp_path, lambda: {"perplexity/held/nll": 0.5})
    whole[-1].pop("eval_failed")
    assert untimed(tmp_path) == [*whole[:-1], whole[-1] | {"eval": {"perplexity/held/nll": 0.5}}]
