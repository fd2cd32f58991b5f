"""The listing of complete checkpoints: which folders count, their order, and that every reader agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UserError
from launch.status import run_status
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.run.address import locate
from pretrain.run.folder import complete_steps
from pretrain.run.identity import check_run_folder
from tests.pretrain.run.test_identity import recipe

ODD = (
    "step_7",
    "step_000000000007",
    "step_xx",
    "step_00000300.tmp",
    "latest",
    "step_-0000001",
    "Xstep_00000001",
)


def save(stage: Path, name: str, complete: bool = True, world_size: int = 2) -> Path:
    folder = stage / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"")
    (folder / "state.json").write_text(json.dumps({"world_size": world_size}))
    if complete:
        (folder / "COMPLETE").write_text("")
    return folder


def test_steps_ascend_by_number_and_odd_names_do_not_count(tmp_path: Path) -> None:
    assert complete_steps(tmp_path / "checkpoints") == []
    for step in (100_000_000, 99_999_999, 5):
        save(tmp_path, f"step_{step:08d}")
    save(tmp_path, "step_00000006", complete=False)
    for name in ODD:
        save(tmp_path, name)
    assert complete_steps(tmp_path / "checkpoints") == [5, 99_999_999, 100_000_000]


def test_every_reader_picks_the_same_newest_checkpoint(tmp_path: Path) -> None:
    """As text, step_99999999 comes after step_100000000, and step_xx after both."""
    loaded = recipe(tmp_path)
    stage = tmp_path / "run/masked"
    stage.mkdir(parents=True)
    (stage / "resolved.yaml").write_text(dump_plain(stage_record(loaded, "masked")))
    save(stage, "step_99999999", world_size=4)
    newest = save(stage, "step_100000000", world_size=2)
    for name in ODD:
        save(stage, name, world_size=8)
    assert Path(locate("masked@latest", tmp_path / "run").path) == newest
    check_run_folder(tmp_path / "run", loaded, "masked", 2)
    with pytest.raises(UserError, match="step_100000000 was saved by 2 ranks"):
        check_run_folder(tmp_path / "run", loaded, "masked", 4)
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump({"stages": {"masked": {}}}))
    assert [status.checkpoint for status in run_status(tmp_path / "run")] == [100_000_000]


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import pretrain.run.address, pretrain.run.folder, pretrain.run.identity, pretrain.run.metrics_log\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
