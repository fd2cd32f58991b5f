"""Files of a run folder that a crash or a human damaged: one line or no error, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from data_pipeline.errors import UserError
from launch.job import StageJob
from launch.stage_state import is_done
from launch.status import run_status, summary
from launch.supervise.progress import Metrics, Tail
from pretrain import merge_stage
from pretrain.build.saved_stage import read_stage
from pretrain.recipe.load import load_recipe
from pretrain.report import write
from pretrain.report.read_run import read_run
from pretrain.run import metrics_log
from pretrain.run.address import locate
from pretrain.run.folder import complete_steps
from pretrain.run.identity import check_run_folder
from pretrain.train.checkpoint import verify_and_read_state
from tests.support import rank

DAMAGE = {
    "empty": b"",
    "list": b"[1, 2]",
    "list of objects": b'[{"step": 3}]',
    "number": b"3",
    "text": b'"step"',
    "null": b"null",
    "half": b'{"step": 3, "world_si',
    "binary": bytes(range(256)),
    "deep": b"[" * 3000,
    "other types": json.dumps(
        {"step": [], "world_size": "x", "order": 3, "eval": 5, "stage": [], "time": 7, "loss": {}, "inputs": 1,
         "stages": 2, "run": [], "gpus": 4, "packages": [], "source": "x", "on": 1, "job_id": []}
    ).encode(),
}  # fmt: skip
FILES = [
    "job.json", "env.json", "recipe.yaml", "main/result.json", "main/metrics.jsonl", "main/bad_samples.jsonl",
    "main/resolved.yaml", "main/checkpoints/step_00000003/state.json", "main/checkpoints/step_00000003/manifest.json",
]  # fmt: skip


def readers(run: Path, recipe: Path) -> dict[str, Callable[[], object]]:
    """What commands read of a run folder."""
    loaded = load_recipe(recipe)
    newest = run / "main/checkpoints/step_00000003"

    def follow() -> None:
        metrics = Metrics(3)
        for row in Tail(run / "main/metrics.jsonl").read():
            metrics.add(row)
        metrics.text()

    return {
        "status": lambda: [stage.line() for stage in run_status(run)],
        "list": lambda: summary(run),
        "read for the report": lambda: read_run(run),
        "report": lambda: write(run),
        "is done": lambda: is_done(run, StageJob("main", "train", 3), loaded),
        "resume check": lambda: check_run_folder(run, loaded, "main", 1),
        "address": lambda: locate(str(run / "main")),
        "best": lambda: locate(f"{run}/main@best"),
        "stage": lambda: read_stage(run / "main"),
        "checkpoint": lambda: verify_and_read_state(newest),
        "truncate": lambda: metrics_log.truncate(run / "main/metrics.jsonl", 2),
        "progress": follow,
    }


@pytest.mark.parametrize("name", FILES)
def test_no_reader_raises_anything_but_a_line_for_the_user(
    tiny_runs: Path, tmp_path: Path, name: str
) -> None:
    for kind, content in DAMAGE.items():
        run = tmp_path / kind.replace(" ", "_") / "flip"
        shutil.copytree(tiny_runs / "runs/flip", run)
        (run / "recipe.yaml").write_bytes((run / "main/resolved.yaml").read_bytes())
        (run / name).write_bytes(content)
        for what, read in readers(run, tiny_runs / "flip.yaml").items():
            if what == "report" and kind not in ("other types", "list"):  # its plots take seconds
                continue
            told = line_of(read)
            assert told is None or (len(told.splitlines()) == 1 or what == "resume check"), (kind, what, told)


def line_of(read: Callable[[], object]) -> str | None:
    """The message of the UserError that `read` raises; None without an error."""
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def test_a_state_that_is_no_object_is_named_and_the_checkpoint_before_goes_on(
    tiny_runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "flip"
    shutil.copytree(tiny_runs / "runs/flip", run)
    newest = run / "main/checkpoints/step_00000003"
    state = newest / "state.json"
    whole = json.loads(state.read_text())
    for content, words in ((b"[]", "it holds a list, not an object"), (b"{}", "it has no data position")):
        state.write_bytes(content)
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["state.json"] = _entry(content)
        sealed = json.dumps(manifest).encode()
        (newest / "manifest.json").write_bytes(sealed)
        (newest / "COMPLETE").write_text(xxhash.xxh64_hexdigest(sealed))
        code, printed = rank.run(tiny_runs / "flip.yaml", f"run.dir={run}", "train.steps=4", logs=tmp_path)
        assert code == 2
        assert "Traceback" not in printed
        assert f"{state} is damaged: {words}; remove step_00000003" in printed
    state.write_text(json.dumps(whole))
    shutil.rmtree(newest)  # as the message says; there is none before
    code, printed = rank.run(tiny_runs / "flip.yaml", f"run.dir={run}", logs=tmp_path)
    assert code == 0, printed
    assert complete_steps(run / "main/checkpoints") == [3]


def _entry(content: bytes) -> dict[str, object]:
    import xxhash

    return {"size": len(content), "xxh64": xxhash.xxh64_hexdigest(content)}


def test_a_damaged_line_costs_only_itself_and_is_told_on_resume(tiny_runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "flip"
    shutil.copytree(tiny_runs / "runs/flip", run)
    path = run / "main/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    before = [json.loads(line)["step"] for line in lines]
    assert before == [1, 2, 3]
    path.write_text(lines[0] + lines[1][: len(lines[1]) // 2] + "\n" + lines[2] + '{"step": 4, "lo')
    assert [row["step"] for row in metrics_log.read(path)] == [1, 3]
    code, printed = rank.run(tiny_runs / "flip.yaml", f"run.dir={run}", "train.steps=5", logs=tmp_path)
    assert code == 0, printed
    assert f"dromos: warning: {path}:2: a damaged line was left out" in printed
    assert f"{path}:4" not in printed  # a kill leaves such an end
    assert [row["step"] for row in metrics_log.read(path)] == [1, 3, 4, 5]


@pytest.mark.parametrize("content", [*DAMAGE.values(), b'{"inputs": [{"address": "a"}]}', b'{"inputs": []}'])
def test_a_damaged_merge_record_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    from types import SimpleNamespace
    from typing import Any

    monkeypatch.setattr(merge_stage, "open_inputs", lambda *_: SimpleNamespace(sources=[]))
    record = tmp_path / "weights/merge.json"
    record.parent.mkdir()
    record.write_bytes(content)
    stage: Any = SimpleNamespace(inputs={"a": 1.0}, copy_rest=None)
    with pytest.raises(UserError, match=f"^{record} is (damaged|not valid).*folder to merge again$"):
        merge_stage.is_finished(stage, tmp_path)
