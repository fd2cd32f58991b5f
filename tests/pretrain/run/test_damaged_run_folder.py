"""Files of a run folder that a crash or a human damaged: one line or no error, never a traceback."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
import yaml

from data_pipeline.errors import UserError
from launch.job import StageJob
from launch.stage_state import is_done
from launch.status import status_lines, summary
from launch.supervise.progress import Metrics, Tail
from pretrain import merge_stage
from pretrain.build.saved_stage import read_stage
from pretrain.recipe.load import load_recipe
from pretrain.report import write
from pretrain.report.read_run import read_run
from pretrain.run import metrics_log
from pretrain.run.address import locate
from pretrain.run.folder import LEFT_OUT, complete_steps
from pretrain.run.identity import check_run_folder
from pretrain.train.checkpoint import verify_and_read_state
from tests.support import rank
from tests.support.damaged_json import damaged

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
        "status": lambda: list(status_lines(run)),
        "list": lambda: summary(run),
        "read for the report": lambda: read_run(run),
        "report": lambda: write(run),
        "is done": lambda: is_done(run, StageJob("main", "train", 3), loaded),
        "resume check": lambda: check_run_folder(run, loaded, "main", 1),
        "address": lambda: locate(str(run / "main")),
        "best": lambda: locate(f"{run}/main@best"),
        "stage": lambda: read_stage(run / "main"),
        "checkpoint": lambda: verify_and_read_state(newest),
        "progress": follow,
        "truncate": lambda: metrics_log.truncate(run / "main/metrics.jsonl", 2),  # last: it removes lines
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


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("job.json", (None, "x")),
        ("env.json", (None, "x", [1, 2], {"a": 1})),
        ("main/result.json", (None, "x", -1, [1, 2], {"a": 1})),
        ("main/metrics.jsonl", (None, "x", [1, 2], {"a": 1}, math.nan)),
        ("main/bad_samples.jsonl", (None, 3, [1, 2])),
        (f"main/{LEFT_OUT}", (None, "x", 2.5, [1, 2], {"a": 1})),
        ("main/resolved.yaml", ("x", [1, 2])),
        ("recipe.yaml", ("x", [1, 2])),
    ],
)
def test_damage_at_any_place_of_a_file_is_a_line_for_the_user(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, others: tuple[Any, ...]
) -> None:
    """A place is missing or has another type."""
    monkeypatch.setattr("pretrain.report.plots._svg", lambda title, draw: "")  # drawing takes seconds
    run = eventful_run(tiny_runs, tmp_path)
    path = run / name
    *before, text = (
        path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_text()]
    )
    whole = yaml.safe_load(text) if name.endswith("yaml") else json.loads(text)
    found = readers(run, tiny_runs / "flip.yaml")
    if name.endswith(".yaml") or name in ("job.json", "main/result.json"):
        found.pop("report")
    number = 0
    for place, value, content in damaged(whole, others):
        path.write_text("".join(before) + json.dumps(content) + "\n")
        for what, read in found.items():
            try:
                told = line_of(read)
            except Exception as error:
                raise AssertionError(f"{what} with {value!r} at {place}") from error
            assert told is None or len(told.splitlines()) == 1 or what == "resume check", (what, place, told)
        number += 1
    assert number > 10


def eventful_run(tiny_runs: Path, folder: Path) -> Path:
    """A copy of the FLIP run with a skipped step, evaluations, a failed one, and a replaced sample."""
    run = folder / "flip"
    shutil.copytree(tiny_runs / "runs/flip", run)
    record = yaml.safe_load((run / "main/resolved.yaml").read_text())
    (run / "recipe.yaml").write_text(
        yaml.safe_dump({"run": record["run"], "stages": {"main": record["stage"]}})
    )
    environment = {
        "host": "n",
        "cores": 2,
        "gpus": ["a"],
        "packages": {"torch": "2"},
        "source": {"commit": "a1"},
    }
    (run / "env.json").write_text(json.dumps(environment))
    job = {
        "on": "slurm",
        "nodes": 1,
        "ranks_per_node": 1,
        "job_id": "7",
        "stages": [{"name": "main", "kind": "train"}],
    }
    (run / "job.json").write_text(json.dumps(job))
    result = {"step": 3, "eval": {"zero_shot": {"digits": {"top1": 0.5}}}, "seconds": 1.5}
    (run / "main/result.json").write_text(json.dumps(result))
    rows = metrics_log.read(run / "main/metrics.jsonl")
    rows[-1] |= {
        "loss": None,
        "non_finite": {"values": ["loss"], "origin": {"stream": "pairs", "kind": "loss", "module": None}},
        "eval": {"zero_shot/digits/top1": 0.5},
        "eval_failed": {"zero_shot/other": "gone"},
        "skipped": {"pairs": {"undecodable": 1}},
    }
    (run / "main/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "main/bad_samples.jsonl").write_text(json.dumps(BAD_SAMPLE) + "\n")
    (run / "main" / LEFT_OUT).write_text(json.dumps({"pairs": {"links": 3, "no extension": 2}}))
    return run


BAD_SAMPLE = {
    "source": "pairs", "url": "pairs/00000.tar", "key": "000000003", "reason": "undecodable", "detail": "no image",
    "row": 3, "epoch": 0, "attempt": 0, "step": 2,
}  # fmt: skip


@pytest.mark.parametrize("damage", ["order", "step", "bad samples"])
def test_a_resume_from_a_damaged_file_is_no_traceback(tiny_runs: Path, tmp_path: Path, damage: str) -> None:
    """Damage inside the data position stops it in one line; damaged lines of bad_samples.jsonl are left out."""
    run = tmp_path / "flip"
    shutil.copytree(tiny_runs / "runs/flip", run)
    newest = run / "main/checkpoints/step_00000003"
    state = json.loads((newest / "state.json").read_text())
    if damage == "order":
        state["order"]["pairs"]["segments"][0]["samples"]["pairs"] = None
        words = [
            f"{newest}/state.json: stream pairs: ",
            "segments[0].samples.pairs is None",
            "from another checkpoint",
        ]
    elif damage == "step":
        state["order"]["pairs"]["step"] = 2
        words = [
            f"{newest}/state.json is damaged: its position of stream pairs is that of step 2; remove step_000"
        ]
    else:
        state["bad_shards"] = {BAD_SAMPLE["url"]: [0, 200]}
        lines = [BAD_SAMPLE, {"step": 2, "url": BAD_SAMPLE["url"]}, {"step": 3}]
        (run / "main/bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["200 samples of pairs/00000.tar", "undecodable (1 sample), for example '000000003': no image",
                 "2 lines of bad_samples.jsonl are damaged and left out."]  # fmt: skip
    seal(newest, json.dumps(state).encode())
    code, printed = rank.run(tiny_runs / "flip.yaml", f"run.dir={run}", logs=tmp_path)
    assert code == (1 if damage == "bad samples" else 2)
    assert "Traceback" not in printed
    for word in words:
        assert word in printed


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_resume_with_a_damaged_file_of_frozen_tensors_is_no_traceback(
    tiny_runs: Path, tmp_path: Path, content: bytes
) -> None:
    """The encoder of the stage is described in that file."""
    run = tmp_path / "sphinx"
    shutil.copytree(tiny_runs / "runs/sphinx", run)
    (run / "main/frozen.safetensors").write_bytes(content)
    code, printed = rank.run(tiny_runs / "sphinx.yaml", f"run.dir={run}", "train.steps=4", logs=tmp_path)
    assert code == 2
    assert "Traceback" not in printed
    assert f"{run}/main/frozen.safetensors is not the file that step_00000003 was saved with" in printed


def seal(checkpoint: Path, state: bytes) -> None:
    """Write a state.json for which manifest.json and COMPLETE vouch."""
    (checkpoint / "state.json").write_bytes(state)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state.json"] = _entry(state)
    sealed = json.dumps(manifest).encode()
    (checkpoint / "manifest.json").write_bytes(sealed)
    (checkpoint / "COMPLETE").write_text(xxhash.xxh64_hexdigest(sealed))


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
        seal(newest, content)
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

    monkeypatch.setattr(merge_stage, "open_inputs", lambda *_: SimpleNamespace(sources=[]))
    record = tmp_path / "weights/merge.json"
    record.parent.mkdir()
    record.write_bytes(content)
    stage: Any = SimpleNamespace(inputs={"a": 1.0}, copy_rest=None)
    with pytest.raises(UserError, match=f"^{record} is (damaged|not valid).*folder to merge again$"):
        merge_stage.is_finished(stage, tmp_path)
