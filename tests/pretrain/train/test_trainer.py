"""The training loop on one rank: what a kill or a power cut leaves of checkpoints and logs together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.run.folder import complete_steps, json_mapping
from pretrain.run.metrics_log import read
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
        untimed = [
            [{**row, "time": 0} for row in read(tmp_path / name / "metrics.jsonl")]
            for name in ("parts", "whole")
        ]
        assert untimed[0] == untimed[1]
