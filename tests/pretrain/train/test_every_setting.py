"""Every key of a training stage does something, at the place where it should: in the data, in the first loss, later.

Each key of the schema is changed alone, and the stage is trained again. A new key without an entry here fails the first
test; a key whose value is read and then dropped fails its own. What a setting does exactly is tested where it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pretrain.recipe.fields import Length
from pretrain.recipe.schema import Run as RunSection
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import TASKS, Evaluation
from pretrain.recipe.variants import variants_of
from tests.support.setting_runs import STEPS, Run, make_data, recipes, train_all

ROOT = Path(__file__).resolve().parents[3]
Check = Callable[[Run, Run], None]


def column(run: Run, name: str) -> list[Any]:
    return [row[name] for row in run["rows"]]


def same_data(base: Run, found: Run) -> None:
    for name in ("batch_digest", "order_digest", "samples", "skipped"):
        assert column(base, name) == column(found, name), name


def data(base: Run, found: Run) -> None:
    """Other samples, crops, flips or captions."""
    assert column(base, "batch_digest") != column(found, "batch_digest")


def draws(base: Run, found: Run) -> None:
    """The same samples with other crops, flips or captions."""
    data(base, found)
    assert column(base, "order_digest") == column(found, "order_digest")


def first_loss(base: Run, found: Run) -> None:
    """The same data, another forward pass."""
    same_data(base, found)
    assert column(base, "loss")[0] != column(found, "loss")[0]


def later_loss(base: Run, found: Run) -> None:
    """The same data and the same first loss, another update."""
    same_data(base, found)
    assert column(base, "loss")[0] == column(found, "loss")[0]
    assert column(base, "loss")[1:] != column(found, "loss")[1:]


def rate(base: Run, found: Run) -> None:
    later_loss(base, found)
    assert column(base, "lr") != column(found, "lr")


def update(base: Run, found: Run) -> None:
    later_loss(base, found)
    assert column(base, "lr") == column(found, "lr")


def weighted(base: Run, found: Run) -> None:
    """Another sum of the same parts."""
    first_loss(base, found)
    for name in ("loss/text", "loss/pairs"):
        assert column(base, name)[0] == column(found, name)[0]


def steps(base: Run, found: Run) -> None:
    """Other steps, with the same data where both have a step."""
    assert column(base, "step") != column(found, "step")
    digests = dict(zip(column(base, "step"), column(base, "batch_digest"), strict=True))
    for row in found["rows"]:
        assert digests.get(row["step"], row["batch_digest"]) == row["batch_digest"]


def figures(base: Run, found: Run) -> None:
    """The same training, other held-out figures or times of them."""
    assert [{**row, "eval": None} for row in base["rows"]] == [{**row, "eval": None} for row in found["rows"]]
    assert [row.get("eval") for row in base["rows"]] != [row.get("eval") for row in found["rows"]]


def checkpoints(base: Run, found: Run) -> None:
    assert base["rows"] == found["rows"]
    assert base["checkpoints"] != found["checkpoints"]


def kept(base: Run, found: Run) -> None:
    assert found["checkpoints"] == ["step_00000002", "step_00000003"]


def continued(base: Run, found: Run) -> None:
    """Only the steps after those of the first run."""
    assert column(found, "step") == [STEPS + 1, STEPS + 2]


def numbers_stay(base: Run, found: Run) -> None:
    """How a step is computed is no part of its result."""
    same_data(base, found)
    for ours, theirs in zip(base["rows"], found["rows"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert theirs.get("eval", {}) == pytest.approx(ours.get("eval", {}), rel=1e-5)


def deterministic(base: Run, found: Run) -> None:
    numbers_stay(base, found)
    assert (base["deterministic"], found["deterministic"]) == (False, True)


def refused(words: str) -> Check:
    def check(base: Run, found: Run) -> None:
        assert words in found["error"]

    return check


LATER = refused("not available yet")
PAIR, IMAGE, TEXT, CAPTIONS = ("data.pairs." + part for part in ("", "image.", "text.", "text.captions."))
SOURCE = "data.pairs.sources.b."
ZERO_SHOT, WORDS = "eval.zero_shot.held.", "eval.perplexity.words."
# Key of the schema (* for a name) -> recipe, overrides (ROOT is the folder of the data), what changes.
CHANGES: dict[str, tuple[str, list[str], Check]] = {
    "run.seed": ("flip", ["run.seed=4"], data),
    "init": ("flip", ["init=ROOT/runs/flip/main"], first_loss),
    "continue": ("flip", ["main.continue=ROOT/runs/flip/main", f"train.steps={STEPS + 2}"], continued),
    "data.*.sources.*.path": ("flip", [f"{SOURCE}path=ROOT/held"], data),
    "data.*.sources.*.weight": ("flip", [f"{SOURCE}weight=0.5"], data),
    "data.*.sources.*.repeat": ("flip", [f"{SOURCE}repeat=3"], data),
    "data.*.sources.*.cap": ("flip", ["data.pairs.sources.a.cap=6"], data),
    "data.*.sources.*.max_epochs": ("flip", [f"{SOURCE}max_epochs=0.5"], data),
    "data.*.sources.*.view": ("flip", ["data.pairs.sources.a.view=half"], data),
    "data.*.batch": ("flip", [f"{PAIR}batch=4"], data),
    "data.*.lanes": ("flip", [f"{PAIR}lanes=2"], data),
    "data.*.share_by": ("flip", [f"{PAIR}share_by=sqrt"], data),
    "data.*.order_as": ("flip", [f"main.{PAIR}order_as=other"], data),
    "data.*.image.size": ("flip", [f"{IMAGE}size=16"], first_loss),
    "data.*.image.crop": ("flip", [f"{IMAGE}crop=[0.2, 1.0]"], draws),
    "data.*.image.flip": ("flip", [f"{IMAGE}flip=true"], draws),
    "data.*.image.max_pixels": ("flip", [f"{IMAGE}max_pixels=500"], draws),
    "data.*.image.mean": ("flip", [f"{IMAGE}mean=[0.5, 0.4578275, 0.40821073]"], first_loss),
    "data.*.image.std": ("flip", [f"{IMAGE}std=[0.26862954, 0.26130258, 0.3]"], first_loss),
    "data.*.text.tokenizer": ("flip", [f"{TEXT}tokenizer=ROOT/other"], first_loss),
    "data.*.text.length": ("flip", [f"{TEXT}length=9"], first_loss),
    "data.*.text.captions.from": ("flip", [f"{CAPTIONS}from=[txt]", f"{CAPTIONS}scores=[]"], draws),
    "data.*.text.captions.scores": ("flip", [f"{CAPTIONS}scores=[]"], draws),
    "data.*.text.captions.top": ("flip", [f"{CAPTIONS}top=3"], draws),
    "model.embed": ("flip", ["model.embed=12"], first_loss),
    "model.vision.arch": (
        "flip",
        ["model.vision.arch=open_clip://ViT-L-14-CLIPA", "model.vision.width=64", "model.vision.head_width=null"],
        first_loss,
    ),
    "model.vision.init": ("sphinx", ["model.vision.init=ROOT/runs/run.seed/main"], first_loss),
    "model.vision.join": ("flip", ["model.vision.join=sequence"], LATER),
    "model.vision.part": ("flip", ["model.vision.part=qformer"], LATER),
    "model.vision.width": ("flip", ["model.vision.width=24"], first_loss),
    "model.vision.layers": ("flip", ["model.vision.layers=2"], first_loss),
    "model.vision.head_width": ("flip", ["model.vision.head_width=4"], first_loss),
    "model.vision.patch": ("flip", ["model.vision.patch=6"], first_loss),
    "model.vision.mlp_ratio": ("flip", ["model.vision.mlp_ratio=2"], first_loss),
    "model.vision.positions": ("flip", ["model.vision.positions=sincos"], first_loss),
    "model.vision.pool": ("flip", ["model.vision.pool=avg"], first_loss),
    "model.text.width": ("flip", ["model.text.width=24"], first_loss),
    "model.text.heads": ("flip", ["model.text.heads=4"], first_loss),
    "model.text.layers": ("flip", ["model.text.layers=2"], first_loss),
    "model.text.causal": ("flip", ["model.text.causal=false"], first_loss),
    "model.llm.init": ("sphinx", ["model.llm.init=hf://a/b", "model.llm.config=null"], LATER),
    "model.llm.config": ("sphinx", ["model.llm.config.num_hidden_layers=2"], first_loss),
    "model.llm.tokenizer": ("sphinx", ["model.llm.tokenizer=ROOT/other"], refused("data.pairs.text.tokenizer")),
    "model.views.size": ("flip", ["model.views.size=8"], LATER),
    "model.views.tiles": ("flip", ["model.views.tiles=2x2"], LATER),
    "model.views.global": ("flip", ["model.views.global=first"], LATER),
    "model.freeze": ("flip", ["model.freeze=[text]"], update),
    "data.*.text.format": ("flip", ["data.pairs.text={format: dialogue, length: 8}"], LATER),
    "data.*.text.template": (
        "flip", ["data.pairs.text={format: dialogue, length: 8, template: vicuna}"], LATER,
    ),
    "model.connector.norm": ("sphinx", ["model.connector.norm=false"], first_loss),
    "objective.image_mask": ("flip", ["objective.image_mask=0.75"], first_loss),
    "objective.text_mask": ("flip", ["objective.text_mask=0.5"], LATER),
    "objective.weights": ("sphinx", ["objective.weights={text: 0.5}"], weighted),
    "optimizer.lr": ("flip", ["optimizer.lr=2e-2"], rate),
    "optimizer.lr_per_256": ("flip", ["optimizer.lr_per_256=1e-2"], rate),
    "optimizer.betas": ("flip", ["optimizer.betas=[0.9, 0.999]"], update),
    "optimizer.eps": ("flip", ["optimizer.eps=1e-3"], update),
    "optimizer.weight_decay": ("flip", ["optimizer.weight_decay=0.3"], update),
    "optimizer.clip": ("flip", ["optimizer.clip=1e-5"], update),
    "optimizer.groups.match": ("flip", ["optimizer.groups=[{match: text, lr_scale: 0.5}]"], update),
    "optimizer.groups.lr": ("flip", ["optimizer.groups=[{match: vision, lr: 0.02}]"], update),
    "optimizer.groups.lr_scale": ("flip", ["optimizer.groups=[{match: vision, lr_scale: 0.5}]"], update),
    "optimizer.groups.weight_decay": ("flip", ["optimizer.groups=[{match: vision, weight_decay: 0.5}]"], update),
    "optimizer.groups.warmup": ("flip", ["optimizer.groups=[{match: vision, warmup: 2}]"], update),
    "schedule.kind": ("flip", ["schedule.kind=linear"], rate),
    "schedule.warmup": ("flip", ["schedule.warmup=1"], rate),
    "schedule.final_lr": ("flip", ["schedule.final_lr=5e-3"], rate),
    "train.steps": ("flip", ["train.steps=2"], steps),
    "train.samples": ("flip", ["train.samples=15"], steps),
    "train.epochs": ("flip", ["train.epochs=0.5"], steps),
    "train.micro_batch": ("sphinx", ["train.micro_batch=1"], numbers_stay),
    "train.hours": ("flip", ["train.hours=1e-9"], steps),
    "train.max_skipped": (
        "flip", ["train.max_skipped=0", "optimizer.lr=1e30"], refused("(train.max_skipped is 0)"),
    ),
    "engine.zero": ("flip", ["engine.zero=0"], numbers_stay),
    "engine.dtype": ("flip", ["engine.dtype=bf16"], first_loss),
    "engine.deterministic": ("flip", ["engine.deterministic=true"], deterministic),
    "engine.activation_checkpointing": ("flip", ["engine.activation_checkpointing=true"], LATER),
    "engine.offload": ("flip", ["engine.offload=cpu"], LATER),
    "engine.compile": ("flip", ["engine.compile=true"], LATER),
    "loader.max_bad_in_shard": ("flip", ["loader.max_bad_in_shard=1"], refused("max_bad_in_shard")),
    "checkpoint.every": ("flip", ["checkpoint.every=2"], checkpoints),
    "checkpoint.keep": ("flip", ["checkpoint.every=1", "checkpoint.keep=2"], kept),
    "eval.every": ("flip_eval", ["eval.every=1"], figures),
    "eval.batch": ("sphinx_eval", ["eval.batch=5"], numbers_stay),
    "eval.zero_shot.*.path": ("flip_eval", [f"{ZERO_SHOT}path=ROOT/more"], figures),
    "eval.zero_shot.*.classes": ("flip_eval", [f"{ZERO_SHOT}classes={{'0': blue, '1': dot, '2': red}}"], figures),
    "eval.zero_shot.*.templates": ("flip_eval", [f"{ZERO_SHOT}templates=['of number {{}}']"], figures),
    "eval.zero_shot.*.label": ("flip_eval", [f"{ZERO_SHOT}label=kind"], figures),
    "eval.perplexity.*.path": ("sphinx_eval", [f"{WORDS}path=ROOT/read"], figures),
    "eval.perplexity.*.stream": ("sphinx_eval", [f"{WORDS}stream=pairs", f"{WORDS}length=null"], refused("an image")),
    "eval.perplexity.*.length": ("sphinx_eval", [f"{WORDS}length=9"], refused("length is 9")),
}  # fmt: skip
# Keys that no training of a few steps shows -> the test that does; for an only value there is nothing to change.
ELSEWHERE = {
    "run.name": "tests/pretrain/run/test_identity.py::test_a_free_key_may_change",
    "run.dir": "tests/pretrain/run/test_identity.py::test_a_free_key_may_change",
    "run.accept_change": "tests/pretrain/train/test_accept_change.py::test_a_shard_is_added_while_the_batch_ramps_up",
    "kind": "tests/pretrain/test_merge_stage.py::",
    "init_allow": "tests/pretrain/train/test_session.py::test_init_that_would_drop_layers",
    "model.connector.kind": "tests/pretrain/recipe/test_variants.py::test_a_mistake_is_said_at_its_key",
    "objective.kind": "tests/pretrain/train/test_every_setting.py::CHANGES",  # both kinds are trained here
    "optimizer.kind": "pretrain/recipe/schema.py::Literal",
    "loader.backend": "tests/pretrain/train/test_stage_setup.py::test_the_loader",
    "loader.workers": "tests/pretrain/train/test_stage_setup.py::test_the_loader",
    "loader.stall_warn": "tests/pretrain/train/test_stage_setup.py::test_the_loader",
    "loader.stall_error": "tests/pretrain/train/test_stage_setup.py::test_the_loader",
    "loader.max_bad_fraction": "tests/pretrain/run/test_metrics_log.py::test_the_limit_is_on_the_samples",
    "loader.cache.folder": "tests/pretrain/train/test_stage_setup.py::test_the_cache",
    "loader.cache.gigabytes": "tests/pretrain/train/test_stage_setup.py::test_the_cache",
}


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections inside a type, such as a list or a map of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is Length else [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that holds a value, with * for the names of streams, sources and tasks."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = sections(field.annotation)
        if not inner:
            yield key
        variants = variants_of(inner[0]) if len(inner) == 1 else None
        if variants is not None:
            inner = list(variants.classes().values())
        if inner == [Evaluation]:
            for task, keys_of in TASKS.items():
                yield from keys(keys_of, f"{key}.{task}.*.")
        for section in inner:
            yield from keys(section, f"{key}.{'*.' if str(field.annotation).startswith('dict') else ''}")


def test_every_key_of_the_schema_is_here() -> None:
    every = {*keys(TrainStage), *keys(RunSection, "run.")}
    assert not CHANGES.keys() & ELSEWHERE.keys()
    assert every - CHANGES.keys() - ELSEWHERE.keys() == set()
    assert CHANGES.keys() | ELSEWHERE.keys() == every
    for key, test in ELSEWHERE.items():
        path, name = test.split("::")
        assert name in (ROOT / path).read_text(), key


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("settings")
    make_data(root)
    bases: dict[str, tuple[str, list[str]]] = {kind: (kind, []) for kind in recipes(root)}
    # A run that another one reads comes before it.
    order = sorted(CHANGES, key=lambda key: key != "run.seed")
    changed = {key: _job(key, root) for key in order}
    return train_all(root, {"flip": bases.pop("flip"), order[0]: changed.pop(order[0]), **bases, **changed})


def _job(key: str, root: Path) -> tuple[str, list[str]]:
    kind, overrides, _ = CHANGES[key]
    return kind, [text.replace("ROOT", str(root)) for text in overrides]


def test_the_base_runs_are_what_the_changes_are_measured_against(trained: dict[str, Run]) -> None:
    for kind in ("flip", "sphinx"):
        rows = trained[kind]["rows"]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert trained[kind]["checkpoints"] == ["step_00000003"]
        assert all(row["loss"] != other["loss"] for row, other in pairwise(rows))
    last = {kind: trained[f"{kind}_eval"]["rows"][-1]["eval"] for kind in ("flip", "sphinx")}
    assert set(last["flip"]) == {"zero_shot/held/top1"}
    assert set(last["sphinx"]) == {"perplexity/words/nll", "perplexity/seen/nll"}


def test_learning_rates_are_those_of_the_formula(trained: dict[str, Run]) -> None:
    """Three steps of a batch of 8 at a peak of 0.01; the cosine is 1, 3/4 and 1/4 at thirds, 1 and 1/2 at halves."""
    expected = {
        "flip": [0.01, 0.0075, 0.0025],
        "optimizer.lr": [0.02, 0.015, 0.005],
        "optimizer.lr_per_256": [0.01 * 8 / 256 * part for part in (1, 0.75, 0.25)],
        "schedule.kind": [0.01, 0.02 / 3, 0.01 / 3],
        "schedule.warmup": [0.005, 0.01, 0.005],
        "schedule.final_lr": [0.01, 0.005 + 0.005 * 0.75, 0.005 + 0.005 * 0.25],
    }
    for key, rates in expected.items():
        assert column(trained[key], "lr") == pytest.approx(rates, rel=1e-12), key


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_value_changes_what_it_should(trained: dict[str, Run], key: str) -> None:
    kind, _, check = CHANGES[key]
    found = trained[key]
    assert "error" not in found or check.__qualname__.startswith("refused"), found.get("error")
    check(trained[kind], found)
