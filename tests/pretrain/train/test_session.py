"""A rank from start to exit: its initial weights, the reasons to stop, and the resume by the next rank."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from data_pipeline.sources.tar import TarWriter
from data_pipeline.transforms.decode import decoder_versions
from launch.cli.app import app
from pretrain.build.module_weights import read_state
from pretrain.distributed.engine import Engine, ParameterGroup, Runtime, join_process_group
from pretrain.run.folder import complete_steps
from pretrain.train import session, stop_signals
from pretrain.train.main import main
from tests.support import forks, rank, tiny
from tests.support.launching import alive

RATE = 1e-3
# AdamW's first update is +-lr per element, whatever the gradient (Kingma and Ba 2015, section 2.1).
FIRST_STEP = {
    "optimizer": {"kind": "adamw", "lr": RATE, "eps": 1e-20, "weight_decay": 0.0},
    "schedule": {"kind": "constant"},
    "train": {"steps": 1},
}


def flip(root: Path, folder: Path, **sections: Any) -> Path:
    """A recipe whose run is `folder/run`, on the data of `root`; its stage is `main`."""
    recipe = tiny.flip_recipe(root, **sections)
    recipe["run"] = {"name": "run", "dir": str(folder / "run"), "seed": 11}
    return tiny.write_recipe(folder / "recipe.yaml", recipe)


def rows(stage: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


def steps(stage: Path) -> list[int]:
    """Steps in the complete lines of a log that another process may be writing."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def children(pid: int) -> list[int]:
    return [
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    ]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def assert_first_step(found: dict[str, Tensor], before: dict[str, Tensor], rate: float = RATE) -> None:
    """Assert that every element is unchanged or one first AdamW update away."""
    moved = torch.cat([(found[name] - before[name]).abs().reshape(-1) for name in before]) / rate
    assert moved.max() < 1.001
    far = moved[moved > 0]
    assert len(far) > 0.5 * len(moved)
    assert (far > 0.999).double().mean() > 0.99


def test_time_limits_and_signals_save_and_the_next_rank_resumes(tiny_runs: Path, tmp_path: Path) -> None:
    """A run that is stopped three times equals an uninterrupted one bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    length = {"train": {"steps": 60}, "checkpoint": {"every": 1000, "keep": 99}}
    for folder in (whole, parts):
        folder.mkdir()
    uninterrupted = rank.start(flip(tiny_runs, whole, **length))
    recipe, stage = flip(tiny_runs, parts, **length), parts / "run" / "main"

    def stopped(code: int, at: int) -> None:
        assert code == 75
        assert steps(stage) == list(range(1, at + 1))
        assert complete_steps(stage / "checkpoints")[-1] == at
        assert not (stage / "result.json").exists()

    code, _ = rank.run(recipe, "train.hours=1e-9")
    stopped(code, 1)

    early = rank.start(recipe)  # a signal before the first step: it trains one step, saves and stops
    early.wait_for(lambda: f'"pid": "{early.pid}"' in (stage / ".lock").read_text())
    early.send_signal(signal.SIGUSR1)
    stopped(early.code(), 2)

    # Ctrl-C reaches the loader's workers too: the rank needs them for the step before it saves.
    late = rank.start(recipe, "loader.workers=2")
    late.wait_for(lambda: len(steps(stage)) >= 5)
    workers = [pid for pid in children(late.pid) if b"workers.worker" in command_line(pid)]
    assert len(workers) == 2
    late.send_signal_to_all(signal.SIGINT)
    stopped(late.code(), len(steps(stage)))
    assert 5 <= len(steps(stage)) < 60
    assert not any(map(alive, workers))
    assert "Traceback" not in late.log.read_text()

    record = yaml.safe_load((stage / "resolved.yaml").read_text())
    assert record["versions"] == decoder_versions()
    record["versions"]["simplejpeg"] = "0.9"
    (stage / "resolved.yaml").write_text(yaml.safe_dump(record))
    code, printed = rank.run(recipe)
    assert code == 0
    assert re.search(r"main resumes after step \d+", printed)
    assert f'warning: versions.simplejpeg: "0.9" -> "{decoder_versions()["simplejpeg"]}"' in printed
    assert printed.count("warning: versions.") == 1
    assert yaml.safe_load((stage / "resolved.yaml").read_text())["versions"] == decoder_versions()
    assert uninterrupted.code() == 0
    assert rows(stage) == rows(whole / "run" / "main")
    assert json.loads((stage / "result.json").read_text())["step"] == 60
    ours, theirs = (read_state(str(folder / "run" / "main")) for folder in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_init_takes_the_weights_and_nothing_else(tiny_runs: Path, tmp_path: Path) -> None:
    parent = str(tiny_runs / "runs" / "flip" / "main")
    code, printed = rank.run(flip(tiny_runs, tmp_path, init=parent, **FIRST_STEP))
    assert code == 0, printed
    assert "newly initialised" not in printed
    before, after = read_state(parent), read_state(str(tmp_path / "run" / "main"))
    assert set(before) == set(after)
    assert_first_step(after, before)
    assert steps(tmp_path / "run" / "main") == [1]  # its own count
    theirs, ours = (rows(folder)[0] for folder in (Path(parent), tmp_path / "run" / "main"))
    assert ours["order_digest"] != theirs["order_digest"]  # and its own order


def test_init_names_the_modules_that_are_new(tiny_runs: Path, tmp_path: Path) -> None:
    """The weights of a text-only stage: a language model without connector and delimiters."""
    runs = tiny_runs / "runs"
    words = {
        name: t for name, t in read_state(str(runs / "sphinx" / "main")).items() if name.startswith("llm.")
    }
    save_file(words, tmp_path / "words.safetensors")
    recipe = tiny.sphinx_recipe(tiny_runs, init=str(tmp_path / "words.safetensors"), **FIRST_STEP)
    recipe["run"] = {"name": "run", "dir": str(tmp_path / "run"), "seed": 11}
    recipe["model"]["vision"] = {"init": str(runs / "flip" / "main")}
    code, printed = rank.run(tiny.write_recipe(tmp_path / "recipe.yaml", recipe))
    assert code == 0, printed
    assert re.findall(r"newly initialised: (.*)", printed) == [
        "connector.* (4 tensors), end_image, start_image"
    ]
    assert "not used" not in printed
    after = read_state(str(tmp_path / "run" / "main"))
    assert_first_step(after, words)
    tower = read_state(str(runs / "flip" / "main"))
    frozen = {name.removeprefix("vision.0."): t for name, t in after.items() if name.startswith("vision.0.")}
    assert frozen
    assert all(
        torch.equal(t, tower[f"visual.{name}"]) for name, t in frozen.items() if f"visual.{name}" in tower
    )


def test_a_tower_at_init_comes_before_that_of_model_vision_init(tiny_runs: Path, tmp_path: Path) -> None:
    """An earlier stage may have trained it. One of another shape is not taken, and that is said."""
    runs = tiny_runs / "runs"
    parent = read_state(str(runs / "sphinx" / "main"))
    name = "vision.0.conv1.weight"
    for number, (changed, line) in enumerate(
        (
            (parent[name] + 1, f"used in place of model.vision.init: {name}"),
            (parent[name][:, :, :2, :2].contiguous(), "not used: vision.* (32 tensors)"),
        )
    ):
        save_file(parent | {name: changed}, tmp_path / f"{number}.safetensors")
        recipe = tiny.sphinx_recipe(tiny_runs, init=str(tmp_path / f"{number}.safetensors"), **FIRST_STEP)
        recipe["run"] = {"name": "run", "dir": str(tmp_path / str(number)), "seed": 11}
        recipe["model"]["vision"] = {"init": str(runs / "flip" / "main")}
        path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe)
        checked = CliRunner().invoke(app, ["recipe", "check", str(path), "--model"])
        assert checked.exit_code == 0, checked.output
        code, printed = rank.run(path)
        assert code == 0, printed
        assert line in printed
        after = read_state(str(tmp_path / str(number) / "main"))
        assert torch.equal(after[name], changed if number == 0 else parent[name])


def test_init_that_would_drop_layers_is_refused_until_it_is_allowed(tiny_runs: Path, tmp_path: Path) -> None:
    """Two layers into one: the error names the tensors and the line to write, and then they are printed."""
    runs = tiny_runs / "runs"
    recipe = tiny.sphinx_recipe(tiny_runs, init=str(runs / "sphinx" / "main"), **FIRST_STEP)
    recipe["run"] = {"name": "run", "dir": str(tmp_path / "run"), "seed": 11}
    recipe["model"]["vision"] = {"init": str(runs / "flip" / "main")}
    recipe["model"]["llm"]["config"]["num_hidden_layers"] = 1
    code, printed = rank.run(tiny.write_recipe(tmp_path / "recipe.yaml", recipe))
    assert code == 2, printed
    assert "llm.model.layers.1.* (9 tensors): not used by the model" in printed
    (line,) = re.findall(r"write (init_allow: .*)", printed)
    assert [path.name for path in (tmp_path / "run" / "main").iterdir()] == [".lock"]
    recipe |= yaml.safe_load(line)
    code, printed = rank.run(tiny.write_recipe(tmp_path / "recipe.yaml", recipe))
    assert code == 0, printed
    assert re.findall(r"not used: (.*)", printed) == ["llm.model.layers.1.* (9 tensors)"]
    assert "newly initialised" not in printed  # and the tower is that of model.vision.init
    parent, after = read_state(str(runs / "sphinx" / "main")), read_state(str(tmp_path / "run" / "main"))
    assert {name for name in parent if name not in after} == {n for n in parent if ".layers.1." in n}
    trained = {name: t for name, t in parent.items() if name in after and not name.startswith("vision.")}
    assert_first_step({name: after[name] for name in trained}, trained)


def test_another_file_of_frozen_tensors_is_refused(tiny_runs: Path, tmp_path: Path) -> None:
    recipe, stage = flip(tiny_runs, tmp_path, **FIRST_STEP), tmp_path / "run" / "main"
    assert rank.run(recipe)[0] == 0
    whole = (stage / "frozen.safetensors").read_bytes()  # sines and cosines, which never train
    for content in (whole[:-1] + b"\x7f", whole[:-9], b""):
        (stage / "frozen.safetensors").write_bytes(content)
        code, printed = rank.run(recipe, "train.steps=2")
        assert code == 2
        assert "frozen.safetensors is not the file that step_00000001 was saved with" in printed
        assert "Traceback" not in printed


def test_groups_train_at_their_own_rate(tiny_runs: Path, tmp_path: Path) -> None:
    """AdamW's first update is the rate itself; ZeRO-3 cuts groups of its own."""
    parent = str(tiny_runs / "runs" / "flip" / "main")
    groups = [{"match": r"visual\.proj", "lr": 3 * RATE}, {"match": "vision", "lr_scale": 0.25}]
    for zero in (0, 1, 3):
        optimizer = FIRST_STEP["optimizer"] | {"lr": RATE, "groups": groups}
        folder = tmp_path / str(zero)
        folder.mkdir()
        sections = FIRST_STEP | {"optimizer": optimizer, "engine": {"zero": zero}}
        code, printed = rank.run(flip(tiny_runs, folder, init=parent, **sections))
        assert code == 0, printed
        stage = folder / "run" / "main"
        before, after = read_state(parent), read_state(str(stage))
        for pattern, scale in ((r"visual\.proj", 3), (r"visual\.(?!proj$).*", 0.25), (r"(?!visual\.).*", 1)):
            names = [name for name in before if re.fullmatch(pattern, name)]
            assert_first_step({n: after[n] for n in names}, {n: before[n] for n in names}, scale * RATE)
        row = rows(stage)[0]
        assert row["lr"] == RATE
        assert row["lr_groups"] == pytest.approx({r"visual\.proj": 3 * RATE, "vision": RATE / 4})
        assert re.search(
            r"dromos: main trains [\d,]+ of [\d,]+ parameters\n  text +lr 0.001, weight", printed
        )
        assert re.search(r"\n  vision +lr 0.00025, weight_decay 0 \(vision\) +[\d,]+ parameters", printed)


def test_what_cannot_train_is_refused_before_anything_is_written(tiny_runs: Path, tmp_path: Path) -> None:
    recipe = tiny.sphinx_recipe(tiny_runs, **FIRST_STEP)
    recipe["run"] = {"name": "run", "dir": str(tmp_path / "run"), "seed": 11}
    recipe["model"]["vision"] = {"init": str(tiny_runs / "runs" / "flip" / "main")}
    for overrides, words in (
        ([r"model.freeze=[vision, 'llm\..*']"], "data.text: no parameter that this stream uses is trained"),
        (
            [r"model.freeze=[vision, 'llm\.layers\..*']"],
            r"model.freeze: 'llm\\.layers\\..*' matches no parameter",
        ),
        ([r"optimizer.groups=[{match: 'llm\.head', lr: 1}]"], "optimizer.groups.0.match: 'llm"),
    ):
        code, printed = rank.run(tiny.write_recipe(tmp_path / "recipe.yaml", recipe), *overrides)
        assert (code, words in printed, "Traceback" in printed) == (2, True, False), printed
        assert [path.name for path in (tmp_path / "run" / "main").iterdir()] == [".lock"]


def settings_after_load(folder: str) -> int:
    """Runs in a fork: 0 if a checkpoint saved with other settings leaves those of the engine that loads it."""
    runtime = join_process_group()
    settings = [((0.5, 0.6), 1e-3, 0.1), ((0.7, 0.8), 1e-5, 0.3)]

    def engine(number: int) -> Engine:
        torch.manual_seed(0)
        betas, eps, decay = settings[number]
        groups = [ParameterGroup(frozenset({"1.weight"}), decay / 2)]
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return Engine(model, 1, "fp32", betas, eps, decay, 0, runtime, groups)

    first, second = engine(0), engine(1)
    with first.accumulate():
        first.backward(first(torch.ones(2, 3)).sum())
    first.step(0.1, 0.2)
    first.save(Path(folder), "step")
    second.load(Path(folder), "step")
    betas, eps, decay = settings[1]
    found = [(g["betas"], g["eps"], g["weight_decay"]) for g in second._engine.optimizer.param_groups]
    print(found)
    return int(found != [(betas, eps, decay), (betas, eps, 0.0), (betas, eps, decay / 2)])


def test_the_settings_of_the_recipe_apply_after_a_load(tmp_path: Path) -> None:
    environment = forks.rank_environment(0, 1, forks.free_port())
    forked = forks.fork(__name__, "settings_after_load", (str(tmp_path),), environment, tmp_path / "log")
    assert forked.code() == 0, forked.log.read_text()


def weights_after_a_step_of_rate_0(dtype: str) -> int:
    """Runs in a fork: 0 if neither the start of the engine nor a step of rate 0 changes a weight."""
    runtime = join_process_group()
    model = nn.Linear(3, 4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine = Engine(model, 0, dtype, (0.9, 0.95), 1e-8, 0.5, 0, runtime)
    after = list(engine.module.parameters())
    with engine.accumulate():
        engine.backward(engine(torch.ones(2, 3, dtype=after[0].dtype)).sum())
    engine.step(0.0)
    print(before, after)
    return int(not all(torch.equal(old.to(new.dtype), new) for old, new in zip(before, after, strict=True)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_engine_that_starts_leaves_the_weights_as_they_are(tmp_path: Path, dtype: str) -> None:
    """In bf16, stage 0 starts with a step without gradients, which must not decay the weights."""
    environment = forks.rank_environment(0, 1, forks.free_port())
    job = "weights_after_a_step_of_rate_0"
    forked = forks.fork(__name__, job, (dtype,), environment, tmp_path / "log")
    assert forked.code() == 0, forked.log.read_text()


def test_too_many_replaced_samples_stop_the_rank_with_their_number(tiny_runs: Path, tmp_path: Path) -> None:
    with TarWriter(tmp_path / "noisy" / "00000.tar") as tar:
        for number in range(60):
            picture = b"no image" if number % 5 == 4 else tiny.picture("red", number)
            tar.write(f"{number:09d}", {"jpg": picture, "txt": b"a red square"})
    stream = tiny.pairs_stream(tiny_runs, batch=32) | {"sources": {"noisy": str(tmp_path / "noisy")}}
    data, loader = {"pairs": stream}, {"workers": 0, "max_bad_fraction": 0.05}
    recipe = flip(tiny_runs, tmp_path, data=data, loader=loader, train={"steps": 7})
    stage = tmp_path / "run" / "main"
    code, printed = rank.run(recipe)
    assert code == 1
    named = [json.loads(line) for line in (stage / "bad_samples.jsonl").read_text().splitlines()]
    replaced = sum(line["attempt"] == 0 for line in named)  # each row once, however many tries it took
    assert 0 < replaced < len(named)
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["skipped"].get("noisy", {}).get("undecodable", 0) for row in rows) == replaced
    # 7 steps of 32 are the first to reach the 200 samples below which no fraction is judged.
    message = f"step 7: {replaced} of the last 224 samples of noisy were replaced"
    assert message in printed
    assert "Traceback" not in printed
    assert all(int(line["key"]) % 5 == 4 for line in named)
    assert not (stage / "result.json").exists()

    code, printed = rank.run(recipe)  # it was stopped at its last step, so it is still not finished
    assert (code, message in printed) == (1, True), printed
    assert not (stage / "result.json").exists()

    code, printed = rank.run(recipe, "loader.max_bad_fraction=0.9", "train.steps=9")  # as the message says
    assert code == 0, printed
    assert steps(stage) == list(range(1, 10))


def test_a_shard_without_images_stops_the_rank_with_the_likely_cause(tiny_runs: Path, tmp_path: Path) -> None:
    for shard in range(4):
        with TarWriter(tmp_path / "laion" / f"{shard:05d}.tar") as tar:
            for number in range(40):
                kind = "image" if shard == 3 else "jpg"
                tar.write(f"{number:09d}", {kind: tiny.picture("red", number), "txt": b"a red square"})
    stream = tiny.pairs_stream(tiny_runs, batch=32) | {"sources": {"laion": str(tmp_path / "laion")}}
    loader = {"workers": 1, "max_bad_fraction": 1.0, "max_bad_in_shard": 30}
    recipe = flip(
        tiny_runs,
        tmp_path,
        data={"pairs": stream},
        loader=loader,
        checkpoint={"every": 2},
        train={"steps": 6},
    )
    stage = tmp_path / "run" / "main"
    code, printed = rank.run(recipe)
    assert code == 1
    assert "no member ending in jpg/" in printed
    assert "laion/00003.tar: members are .image, .txt" in printed
    assert "Traceback" not in printed
    named = [json.loads(line) for line in (stage / "bad_samples.jsonl").read_text().splitlines()]
    assert sum(line["attempt"] == 0 for line in named) >= 30
    assert {line["url"][-9:] for line in named} == {"00003.tar"}
    done = steps(stage)
    # It saved where it stopped, within the first epoch of 5 steps.
    assert complete_steps(stage / "checkpoints")[-1] == done[-1] <= 5

    code, printed = rank.run(recipe, "loader.max_bad_in_shard=41")
    assert code == 0, printed


def test_steps_that_are_not_finite_are_skipped_until_there_are_too_many(
    tiny_runs: Path, tmp_path: Path
) -> None:
    """The first update ruins the weights. They stay as they are, and the run says where it became infinite."""
    optimizer = {"kind": "adamw", "lr": 1e30}
    recipe = flip(
        tiny_runs, tmp_path, optimizer=optimizer, schedule={"kind": "constant"},
        checkpoint={"every": 1, "keep": 9},
    )  # fmt: skip
    code, printed = rank.run(recipe)
    stage = tmp_path / "run" / "main"
    assert code == 1
    for number in (2, 3, 4):
        line = rf"step {number}: loss.* is not finite \(first in the output of \w+.*, stream pairs\); the step was "
        assert re.search(line + f"skipped, {number - 1} in a row", printed), printed
    assert re.search(r"step 5: loss.* is not finite .*train.max_skipped is 3.*saved at step 4", printed)
    assert "Traceback" not in printed
    assert complete_steps(stage / "checkpoints") == [1, 2, 3, 4]
    ours, theirs = (read_state(f"{stage}@{step}") for step in (1, 4))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logged = rows(stage)
    assert ["non_finite" in row for row in logged] == [False, True, True, True]
    assert [row["loss"] is None for row in logged] == [False, True, True, True]
    assert not (stage / "result.json").exists()

    code, printed = rank.run(recipe)  # the count goes on
    assert code == 1
    assert "step 5: " in printed
    assert "was skipped" not in printed
    code, printed = rank.run(recipe, "train.max_skipped=4")
    assert code == 1
    assert rows(stage)[:4] == logged
    assert steps(stage) == [1, 2, 3, 4, 5]


def test_a_tar_that_changes_under_a_run_stops_it_with_a_checkpoint(tmp_path: Path) -> None:
    """Its samples do not count as unusable. Once the tar is restored, the run resumes as if uninterrupted."""
    tiny.make_data(tmp_path)
    length = {"train": {"steps": 60}, "checkpoint": {"every": 1000}, "loader": {"workers": 0}}
    recipe, stage = flip(tmp_path, tmp_path, **length), tmp_path / "run" / "main"
    shard = tmp_path / "pairs" / "00000.tar"
    whole = shard.read_bytes()
    running = rank.start(recipe)
    running.wait_for(lambda: len(steps(stage)) >= 3)
    os.truncate(shard, 1024)
    assert running.code() == 2
    done = len(steps(stage))
    assert 3 <= done < 60
    printed = running.log.read_text()
    assert f"step {done + 1}: " in printed
    assert "00000.tar is shorter than before" in printed
    assert f"The run is saved at step {done}; run it again to resume" in printed
    assert complete_steps(stage / "checkpoints") == [done]
    shard.write_bytes(whole)
    code, printed = rank.run(recipe)
    assert code == 0, printed
    assert f"main resumes after step {done}" in printed
    assert steps(stage) == list(range(1, 61))
    assert not (stage / "bad_samples.jsonl").read_text()


def train_without_inductor(recipe: str) -> int:
    """Runs in a fork: a whole training, then 0 if it has not imported torch's compiler."""
    code = main(recipe, "main")
    return code or int("torch._inductor.compile_fx" in sys.modules)


def test_a_training_does_not_import_the_compiler(tiny_runs: Path, tmp_path: Path) -> None:
    """DeepSpeed imports it for an optimizer that is not used, in seconds per start."""
    recipe = flip(tiny_runs, tmp_path, train={"steps": 1})
    forked = forks.fork(
        __name__,
        "train_without_inductor",
        (str(recipe),),
        forks.rank_environment(0, 1, forks.free_port()),
        tmp_path / "log",
    )
    assert forked.code() == 0, forked.log.read_text()


@pytest.mark.parametrize("rank_number", [0, 1])
def test_only_the_rank_that_writes_frozen_tensors_holds_them(
    monkeypatch: pytest.MonkeyPatch, rank_number: int
) -> None:
    """The engine of ZeRO-3 frees the whole tensors of a rank that holds none of them."""
    setup = mock.MagicMock()
    setup.open_streams.return_value = mock.MagicMock(), []
    setup.open_engine.side_effect = InterruptedError
    monkeypatch.setattr(session, "setup", setup)
    monkeypatch.setattr(session, "find_start", lambda *given: None)
    opened = object.__new__(session.Session)
    runtime = Runtime(rank_number, 2, rank_number, torch.device("cpu"))
    opened.context = mock.MagicMock(runtime=runtime)
    with pytest.raises(InterruptedError):
        opened.train()
    assert setup.build_objective.return_value.objective.frozen.call_count == (1 if rank_number == 0 else 0)


def test_the_collector_runs_again_after_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        assert not gc.isenabled()
        raise UserError("no such recipe")

    monkeypatch.setattr(session, "Session", refuse)
    monkeypatch.setattr(stop_signals, "StopFlag", object)  # the signals of this process stay as they are
    assert main("recipe.yaml", "main") == 2
    assert gc.isenabled()
