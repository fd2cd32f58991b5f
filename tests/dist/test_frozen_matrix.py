"""Tensors that do not train: a resume, an export, `init:` and a merge have all of them whole, on every ZeRO stage.

Step checkpoints leave these tensors out, and ZeRO-3 leaves every rank only a part of them. Three stages have some: with
frozen parts, with fixed positions, and with a frozen language model behind a frozen encoder. Two ranks train each. The
truth is the stage's module as it is in the ranks' memory (tests/dist/frozen_ranks.py), and for what does not train
also the numbers that this process made for the first step. Everything is compared bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.build.objective import build
from pretrain.export.write_folder import export
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import TrainStage
from pretrain.run.exit_codes import DONE, RUN_AGAIN
from tests.support import commands, tiny

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
Tensors = dict[str, Tensor]
BETA = 0.3
# What does not train, by the names of all its tensors; every other tensor must train.
FIXED = {
    "freeze": r"(?!visual\.|logit_scale$).*",
    "sincos": r"visual\.positional_embedding",
    "llm": r"(vision|llm)\..*",
}


@dataclass(frozen=True)
class Trained:
    """A stage's folder, and its module before the first and after the last step of one start."""

    folder: Path
    before: Tensors
    after: Tensors


class Stages:
    """Trains stages of two steps, each once. Their `what` is a key of FIXED."""

    def __init__(self, root: Path, ranks: Callable[..., str]) -> None:
        self.root, self.ranks = root, ranks
        tiny.make_data(root)
        self.start, self.whole, self.stopped, self.resumed, self.second = map(
            cache, (self._start, self._whole, self._stopped, self._resumed, self._second)
        )

    def init(self, what: str, zero: int) -> Path:
        """The weights with which the stage `first` starts."""
        return self.root / f"{what}-{zero}.safetensors"

    def recipe(self, what: str, zero: int) -> Path:
        """A recipe whose stage `second` starts with the weights of its stage `first`."""
        sections: dict[str, Any] = {
            "run": {"name": what, "dir": str(self.root / "runs" / f"{what}-{zero}"), "seed": 3},
            "engine": {"zero": zero},
            "train": {"steps": 2},
            "checkpoint": {"every": 1, "keep": 9},
            "stages": {"first": {"init": str(self.init(what, zero))}, "second": {"init": "first"}},
        }
        if what == "llm":
            recipe = tiny.sphinx_recipe(self.root, **sections)
            del recipe["data"]["text"], recipe["objective"]["weights"]
            tower = str(self.root / "runs" / f"sincos-{zero}" / "first")
            recipe["model"] |= {"vision": {"init": tower}, "freeze": ["vision", "llm"]}
        else:
            recipe = tiny.flip_recipe(self.root, **sections)
            if what == "freeze":
                recipe["model"]["vision"]["positions"] = "learnable"
                recipe["model"]["freeze"] = ["text"]
                recipe["model"]["text"] |= {"width": 33, "heads": 3}  # vectors that two ranks share unevenly
        return tiny.write_recipe(self.root / f"{what}-{zero}.yaml", recipe)

    def _train(
        self,
        what: str,
        zero: int,
        name: str,
        *overrides: str,
        stage: str = "first",
        run: str = "",
        code: int = DONE,
    ) -> Trained:
        self.start(what, zero)
        run_dir, logs = (
            self.root / "runs" / f"{what}-{zero}{run}",
            self.root / "logs" / f"{what}-{zero}-{name}",
        )
        assert not logs.exists(), f"this training has failed already, see {logs}"
        logs.mkdir(parents=True)
        job = (str(self.recipe(what, zero)), stage, [f"run.dir={run_dir}", *overrides], str(logs), code)
        self.ranks("tests.dist.frozen_ranks", job, 2, logs)
        return Trained(run_dir / stage, *(torch.load(logs / f"{when}.pt") for when in ("before", "after")))

    def _whole(self, what: str, zero: int) -> Trained:
        return self._train(what, zero, "whole")

    def _stopped(self, what: str, zero: int) -> Trained:
        """The same stage in another run folder, stopped after its first step."""
        return self._train(what, zero, "stopped", "train.hours=1e-9", run="-stopped", code=RUN_AGAIN)

    def _resumed(self, what: str, zero: int) -> Trained:
        self.stopped(what, zero)
        return self._train(what, zero, "resumed", run="-stopped")

    def _second(self, what: str, zero: int) -> Trained:
        self.whole(what, zero)
        return self._train(what, zero, "second", stage="second")

    def _start(self, what: str, zero: int) -> Tensors:
        """All tensors before the first step; writes those that `init:` of the stage `first` reads.

        Neither a seed nor a formula gives them: what is lost cannot come back with the next model that is built.
        """
        tower = self.whole("sincos", zero).after if what == "llm" else {}
        stage = load_recipe(self.recipe(what, zero)).stages["first"]
        assert isinstance(stage, TrainStage)
        model = build(stage, "first", 0, None).objective.model
        made = {name: tensor + torch.randn(tensor.shape) / 10 for name, tensor in model.state_dict().items()}
        save_file({n: t for n, t in made.items() if not n.startswith("vision.")}, self.init(what, zero))
        # The encoder is that of the trained stage as it was in memory, not as this process reads it.
        return made | {
            name.replace("visual.", "vision.0."): t for name, t in tower.items() if name.startswith("visual.")
        }


@pytest.fixture(scope="module")
def stages(ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("frozen"), ranks)


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    described = [{name: (t.shape, t.dtype) for name, t in each.items()} for each in (found, expected)]
    assert described[0] == described[1]
    bits = [{name: t.numpy().tobytes() for name, t in each.items()} for each in (found, expected)]
    assert [name for name in expected if bits[0][name] != bits[1][name]] == []


def fixed(what: str, tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if re.fullmatch(FIXED[what], name)}


def read_folder(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files, of which none may be in two files."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def metrics(stage: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def check_resume(stages: Stages, what: str, zero: int, folder: Path) -> None:
    """A stage that was stopped after its first step ends as one that was not."""
    whole, stopped, resumed = (each(what, zero) for each in (stages.whole, stages.stopped, stages.resumed))
    assert [row["step"] for row in metrics(whole.folder)] == [1, 2]
    assert metrics(resumed.folder) == metrics(whole.folder)
    assert_same(resumed.before, stopped.after)
    assert_same(resumed.after, whole.after)


def check_export(stages: Stages, what: str, zero: int, folder: Path) -> None:
    """The written files have every tensor of the trained module."""
    whole = stages.whole(what, zero)
    expected = dict(whole.after)
    if what == "llm":
        export(str(whole.folder), "transformers", folder)
        own, others = (load_file(folder / f"{name}.safetensors") for name in ("model", "multimodal"))
        found = others | {f"llm.{name}": tensor for name, tensor in own.items()}
    else:
        export(str(whole.folder), "open_clip", folder)
        found = read_folder(folder)
        expected["logit_scale"] = expected["logit_scale"].reshape(())  # a number in open_clip
    assert_same(found, expected)


def check_init(stages: Stages, what: str, zero: int, folder: Path) -> None:
    """The next stage's module begins with every tensor of this one, and the stage keeps what it does not train."""
    first, second = stages.whole(what, zero), stages.second(what, zero)
    assert_same(second.before, first.after)
    expected = fixed(what, stages.start(what, zero))
    assert_same(fixed(what, second.after), expected)
    assert_same(load_file(second.folder / "frozen.safetensors"), expected)


def check_merge(stages: Stages, what: str, zero: int, folder: Path) -> None:
    """Of the last step and the first step of the same stage in another run folder."""
    a, b = stages.whole(what, zero), stages.stopped(what, zero)
    inputs = (str(a.folder), f"{b.folder}@1")
    done = commands.run("merge", *inputs, "--beta", str(BETA), "--out", str(folder))
    assert done.returncode == 0, done.stderr
    expected = {
        name: (BETA * tensor.double() + (1 - BETA) * b.after[name].double()).float()
        for name, tensor in a.after.items()
    }
    assert_same(read_folder(folder), expected | fixed(what, stages.start(what, zero)))


USES = {"resume": check_resume, "export": check_export, "init": check_init, "merge": check_merge}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("what", FIXED)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_does_not_train_is_whole_wherever_it_goes(
    stages: Stages, zero: int, what: str, use: str, tmp_path: Path
) -> None:
    start, trained = stages.start(what, zero), stages.whole(what, zero)
    assert_same(trained.before, start)
    changed = {name for name, tensor in trained.after.items() if not torch.equal(tensor, start[name])}
    assert changed == start.keys() - fixed(what, start).keys()
    USES[use](stages, what, zero, tmp_path / "out")
