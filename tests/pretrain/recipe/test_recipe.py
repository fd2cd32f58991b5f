"""Recipes: inheritance, overrides, and the message of every mistake."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import UserError
from data_pipeline.transforms.decode import MAX_PIXELS
from pretrain.build.streams import evaluation_spec, stream_spec
from pretrain.recipe.checks import nearest_divisors
from pretrain.recipe.dump import as_plain, dump, dump_plain, stage_record
from pretrain.recipe.fields import Length, parse_length
from pretrain.recipe.kinds import KINDS
from pretrain.recipe.lengths import length_steps, length_warnings, main_stream, total_steps
from pretrain.recipe.load import load_recipe, run_dir
from pretrain.recipe.resolve import merge_maps
from pretrain.recipe.schema import MergeStage, Recipe, TrainStage
from pretrain.recipe.sections.evaluation import ZeroShot
from pretrain.recipe.yaml_file import load_yaml
from pretrain.run.identity import compare_identity
from pretrain.train.schedule import peak_rate

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "cluster" not in path.parts)

FLIP = """
run: {name: small, seed: 3}
data:
  pairs:
    sources: {digits: data/digits, scenes: {path: data/scenes, weight: 0.5}}
    batch: 64
    image: {size: 32, crop: [0.5, 1.0]}
    text: {tokenizer: clip-bpe, length: 16}
model:
  vision: {width: 64, layers: 2, patch: 8}
  text: {width: 64, heads: 2, layers: 2}
objective: {kind: contrastive, image_mask: 0.5}
optimizer: {lr: 1e-3, betas: [0.9, 0.95]}
schedule: {warmup: 10}
train: {steps: 100}
stages:
  masked: {}
  tuned:
    init: masked
    objective: {image_mask: 0}
    optimizer: {betas: [0.8, 0.9]}
    train: {epochs: 0.5}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(
    folder: Path, text: str = FLIP, *overrides: str, stage: str | None = None, strict: bool = True
) -> Recipe:
    return load_recipe(write(folder, text), overrides, stage, strict=strict)


def training(recipe: Recipe, name: str) -> TrainStage:
    stage = recipe.stages[name]
    assert isinstance(stage, TrainStage)
    return stage


def refused(folder: Path, text: str = FLIP, *overrides: str, stage: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides, stage=stage)
    return str(caught.value)


# --- the shape of a recipe


def test_maps_merge_and_scalars_and_lists_replace() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 2, "c": {"z": 1}}
    over = {"a": {"y": [3]}, "b": {"now": "a map"}, "c": None, "d": {"deep": {"er": 1}}}
    assert merge_maps(base, over) == {
        "a": {"x": 1, "y": [3]},
        "b": {"now": "a map"},
        "d": {"deep": {"er": 1}},
    }
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 2, "c": {"z": 1}}


def test_a_stage_inherits_the_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    masked, tuned = training(recipe, "masked"), training(recipe, "tuned")
    assert list(recipe.stages) == ["masked", "tuned"]
    assert (masked.objective.image_mask, tuned.objective.image_mask) == (0.5, 0.0)
    assert (masked.optimizer.betas, tuned.optimizer.betas) == ((0.9, 0.95), (0.8, 0.9))
    assert tuned.optimizer.lr == masked.optimizer.lr == 1e-3
    assert (tuned.train.epochs, tuned.train.steps) == (0.5, None)  # one length replaces the other
    assert tuned.init == "masked"
    assert masked.data["pairs"].sources["digits"].path == "data/digits"
    assert masked.data["pairs"].sources["scenes"].weight == 0.5


EXTENDED = (
    FLIP
    + """\
  larger:
    extends: tuned
    data: {pairs: {image: {size: 64}}}
  largest: {extends: larger, init: larger, train: {steps: 7}}
"""
)


def test_a_stage_that_extends_another_has_its_settings_but_for_what_it_says(tmp_path: Path) -> None:
    recipe = load(tmp_path, EXTENDED)
    masked, tuned, larger, largest = (training(recipe, name) for name in recipe.stages)
    assert larger.model_dump(exclude={"init", "data"}) == tuned.model_dump(exclude={"init", "data"})
    assert larger.objective != masked.objective
    assert (tuned.init, larger.init, largest.init) == ("masked", None, "larger")  # weights are not settings
    sizes = [stage.data["pairs"].image.size for stage in (masked, tuned, larger, largest)]  # type: ignore[union-attr]
    assert sizes == [32, 32, 64, 64]
    assert larger.data["pairs"].sources == tuned.data["pairs"].sources
    assert (largest.train.steps, largest.train.epochs) == (7, None)
    again = load_recipe(write(tmp_path, dump(recipe), "again.yaml"))
    assert again.stages == recipe.stages


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("extends: tuned", "extends: later", ["stages.larger.extends", "'later'", "masked, tuned"]),
        ("extends: tuned", "extends: tuend", ["'tuend'", "did you mean 'tuned'"]),
        ("extends: tuned", "extends: larger", ["'larger' is not a training stage before this one"]),
        ("extends: tuned", "extends: [tuned]", ["not a training stage before"]),
        ("  tuned:\n", "  tuned:\n    extends: larger\n", ["stages.tuned.extends", "'larger'"]),
        ("extends: tuned", "kind: merge\n    extends: tuned", ["a merge stage has no settings to extend"]),
    ],
)
def test_a_stage_can_extend_only_an_earlier_training_stage(
    old: str, new: str, words: list[str], tmp_path: Path
) -> None:
    message = refused(tmp_path, EXTENDED.replace(old, new, 1))
    for word in words:
        assert word in message
    assert "recipe.yaml:" in message


def test_a_recipe_without_stages_has_one_stage_main(tmp_path: Path) -> None:
    text = FLIP[: FLIP.index("stages:")]
    recipe = load(tmp_path, text)
    assert list(recipe.stages) == ["main"]
    assert training(recipe, "main").train.steps == 100


def test_null_removes_a_stream_and_a_section(tmp_path: Path) -> None:
    more = FLIP + "  other:\n    data: {pairs: null, few: {batch: 8, sources: {x: y}, image: {}, text: {}}}\n"
    other = training(load(tmp_path, more + "    schedule: null\n"), "other")
    assert list(other.data) == ["few"]
    assert other.schedule.warmup.value == 0


def test_a_merge_stage_inherits_evaluation_alone(tmp_path: Path) -> None:
    text = FLIP.replace("train: {steps: 100}", "train: {steps: 100}\neval: {batch: 99}", 1)
    recipe = load(
        tmp_path, text + "  mix: {kind: merge, inputs: {masked: 0.25, tuned: 0.75}, copy_rest: tuned}\n"
    )
    mix = recipe.stages["mix"]
    assert isinstance(mix, MergeStage)
    assert mix.inputs == {"masked": 0.25, "tuned": 0.75}
    assert mix.eval.batch == 99
    assert "optimizer" not in as_plain(recipe)["stages"]["mix"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_of_the_repository_is_well_formed_and_shows_as_itself(
    path: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(path, runnable=False)
    again = load_recipe(write(tmp_path, dump(recipe)), runnable=False)
    assert again == recipe
    assert dump(again) == dump(recipe)


@pytest.mark.parametrize("path", [p for p in CONFIGS if "demo" in p.parts], ids=lambda path: path.name)
def test_the_demo_recipes_are_runnable(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.prepare == "demo"
    assert run_dir(recipe) == Path("runs/demo") / path.stem
    for stage in recipe.stages.values():
        if isinstance(stage, TrainStage):
            assert stage.train.micro_batch is None


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("flip/laion400m-l16", {"eval.zero_shot"}),
        (
            "sphinx/7b-1k",
            {
                "engine.activation_checkpointing",
                "model.vision",
                "model.views",
                "model.llm.init",
                "stages.real.data",
                "stages.synthetic.data",
                "stages.instruct.data.dialogues.text.format",
            },
        ),
    ],
)
def test_paper_recipes_name_unsupported_features(name: str, features: set[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(ROOT / "configs" / f"{name}.yaml")
    lines = str(caught.value).splitlines()
    assert all(line.endswith("is not available yet") for line in lines)
    assert {line.split(": ")[1] for line in lines} == features


# The page of agreed recipes is ahead of the schema: these keys have other values in this version.
AHEAD = {"engine.activation_checkpointing"}


def leaves(value: Any, at: str = "") -> dict[str, Any]:
    """Dotted key -> value of every scalar and list in nested maps."""
    if not isinstance(value, dict):
        return {at: value}
    found: dict[str, Any] = {}
    for key, below in value.items():
        found |= leaves(below, f"{at}.{key}" if at else str(key))
    return found


@pytest.mark.parametrize("name", ["flip/laion400m-l16", "sphinx/7b-1k"])
def test_the_paper_recipes_have_the_agreed_numbers(name: str, shared: Path) -> None:
    """Every key that the recipe shares with the agreed one has its value; most keys are shared."""
    blocks = (shared / "recipes.md").read_text().split("```yaml\n")[1:]
    agreed = leaves(yaml.safe_load(next(b.split("```")[0] for b in blocks if f"configs/{name}.yaml" in b)))
    ours = leaves(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()))
    common = (ours.keys() & agreed.keys()) - AHEAD
    assert len(common) > 0.7 * len(agreed)
    assert {key: ours[key] for key in common} == {key: agreed[key] for key in common}


def test_numbers_with_units(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "configs/flip/laion400m-l16.yaml", runnable=False)
    masked, tuned = training(recipe, "masked"), training(recipe, "tuned")
    assert masked.train.samples == 12_800_000_000
    assert masked.schedule.warmup == Length(value=51e6, unit="samples")
    assert masked.optimizer.lr_per_256 == 4e-6
    assert total_steps(masked) == math.ceil(12.8e9 / 65536)
    assert total_steps(tuned) == math.ceil(128e6 / 65536)
    assert length_steps(tuned.schedule.warmup, 65536) == math.ceil(25.6e6 / 65536)


@pytest.mark.parametrize("text", ["1234567 samples", "0.03 epochs", "25600000 samples", "7 steps"])
def test_a_length_survives_a_round_trip(text: str) -> None:
    length = parse_length(text)
    assert str(length) == text
    assert parse_length(str(length)) == length


def test_epochs_cover_every_sample(tmp_path: Path) -> None:
    tuned = training(load(tmp_path), "tuned")
    assert [total_steps(tuned, samples) for samples in (127, 128, 129, 1000)] == [1, 1, 2, 8]
    with pytest.raises(UserError, match="epoch"):
        total_steps(tuned)


def test_the_stream_with_images_measures_the_length() -> None:
    recipe = load_recipe(ROOT / "configs/demo/sphinx.yaml")
    assert main_stream(training(recipe, "real")) == "captions"
    assert main_stream(training(recipe, "lm")) == "text"


# --- overrides


def test_an_override_holds_for_every_selected_training_stage(tmp_path: Path) -> None:
    recipe = load(tmp_path, FLIP, "optimizer.lr=2e-4")
    assert [training(recipe, name).optimizer.lr for name in recipe.stages] == [2e-4, 2e-4]
    recipe = load(tmp_path, FLIP, "optimizer.lr=2e-4", stage="tuned")
    assert [training(recipe, name).optimizer.lr for name in recipe.stages] == [1e-3, 2e-4]


def test_a_stage_override_wins_in_any_order(tmp_path: Path) -> None:
    for overrides in (["tuned.train.steps=7", "train.steps=5"], ["train.steps=5", "tuned.train.steps=7"]):
        recipe = load(tmp_path, FLIP, *overrides)
        assert [training(recipe, name).train.steps for name in recipe.stages] == [5, 7]


@pytest.mark.parametrize(
    ("override", "train"),
    [
        ("train.samples=64M", {"samples": 64_000_000}),
        ("train.epochs=2", {"epochs": 2}),
        ("train=500", {"steps": 500}),
        ("train=1.5k samples", {"samples": 1500}),
        ("train={steps: 3, micro_batch: 8}", {"steps": 3, "micro_batch": 8}),
    ],
)
def test_one_length_replaces_another(override: str, train: dict[str, float], tmp_path: Path) -> None:
    for name in ("masked", "tuned"):
        found = training(load(tmp_path, FLIP, override), name).train
        assert found.model_dump(exclude_none=True, exclude={"max_skipped"}) == train


def test_a_value_replaces_the_old_one_also_a_map(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, FLIP, "data.pairs.sources={only: here}", "schedule={kind: linear}", "tuned.init=null"
    )
    masked, tuned = training(recipe, "masked"), training(recipe, "tuned")
    assert list(masked.data["pairs"].sources) == ["only"]
    assert masked.data["pairs"].batch == 64
    assert (masked.schedule.kind, masked.schedule.warmup.value) == ("linear", 0)
    assert tuned.init is None


def test_overrides_set_fields_that_the_file_does_not_write(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        FLIP,
        "engine.zero=3",
        "data.pairs.sources.digits.weight=3",
        "model.vision.head_width=32",
        "optimizer.lr_per_256=1e-5",
        "schedule.warmup=30",
    )
    stage = training(recipe, "masked")
    assert stage.engine.zero == 3
    assert stage.data["pairs"].sources["digits"].model_dump(exclude_none=True) == {
        "path": "data/digits",
        "weight": 3,
    }
    assert stage.model.vision is not None
    assert stage.model.vision[0].head_width == 32
    assert (stage.optimizer.lr, stage.optimizer.lr_per_256) == (None, 1e-5)
    assert stage.schedule.warmup == Length(value=30, unit="steps")


def test_run_and_loader_apply_to_the_run(tmp_path: Path) -> None:
    recipe = load(tmp_path, FLIP, "run.dir=elsewhere", "run.seed=9", "loader.workers=0", stage="tuned")
    assert run_dir(recipe) == Path("elsewhere")
    assert recipe.run.seed == 9
    assert [training(recipe, name).loader.workers for name in recipe.stages] == [0, 0]
    assert run_dir(load(tmp_path)) == Path("runs/small")


def test_a_stage_without_the_stream_is_skipped() -> None:
    recipe = load_recipe(ROOT / "configs/demo/sphinx.yaml", ["data.captions.batch=32"], strict=True)
    assert "captions" not in training(recipe, "lm").data
    assert training(recipe, "real").data["captions"].batch == 32
    # A rank of `lm` receives the same command line.
    load_recipe(ROOT / "configs/demo/sphinx.yaml", ["data.captions.batch=32"], "lm")


def test_a_long_warm_up_warns(tmp_path: Path) -> None:
    assert length_warnings(training(load(tmp_path), "masked")) == []
    short = training(load(tmp_path, FLIP, "train.steps=5"), "masked")
    assert "warmup (10 steps) is longer than the training (5 steps)" in length_warnings(short)[0]
    samples = training(load(tmp_path, FLIP, "train.samples=639"), "masked")
    assert length_warnings(samples) == []  # 639 samples are 10 steps of 64
    assert length_warnings(training(load(tmp_path, FLIP, "train.samples=576"), "masked")) != []


def test_max_pixels_applies_to_training_and_evaluation(tmp_path: Path) -> None:
    stage = training(load(tmp_path, FLIP, "data.pairs.image.max_pixels=50M"), "masked")
    stream = stage.data["pairs"]
    trained = stream_spec("pairs", stream, 0, "masked").image
    held_out = evaluation_spec("x", ZeroShot(path="data/test"), stream, 8).image
    assert trained is not None
    assert held_out is not None
    assert (trained.max_pixels, held_out.max_pixels) == (50_000_000, 50_000_000)
    default = training(load(tmp_path), "masked").data["pairs"].image
    assert default is not None
    assert default.max_pixels == MAX_PIXELS


# --- mistakes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=5", ["train.stepz", "unknown key", "'steps'"]),
        ("tuned.objective.imag_mask=0", ["objective.imag_mask", "'image_mask'"]),
        ("steps=5", ["'steps'", "train.steps"]),
        ("tunde.train.steps=5", ["'tunde'", "'tuned'"]),
        ("data.pair.batch=8", ["no stream 'pair'", "'pairs'"]),
        ("data.pairs.batch=0", ["data.pairs.batch", "greater than 0"]),
        ("data.pairs.batch={1: 8}", ["data.pairs.batch", "first steps are 1; they must begin with 0"]),
        ("data.pairs.batch={0: 8, 5: 0}", ["data.pairs.batch", "greater than 0"]),
        ("data.pairs.batch={0: 8, later: 9}", ["data.pairs.batch", "first steps are 0, later"]),
        ("data.pairs.batch=8.5", ["data.pairs.batch", "whole number", "8.5"]),
        ("data.pairs.share_by=root", ["data.pairs.share_by", "'root'", "size, sqrt"]),
        ("data.pairs.batch=many", ["data.pairs.batch", "whole number", "'many'"]),
        ("engine.zero=4", ["engine.zero", "0, 1, 2, 3"]),
        ("objective.kind=flip", ["'flip'", "did you mean 'contrastive'"]),
        ("objective.kind=generatif", ["'generatif'", "'generative'"]),
        ("objective.weights={a: 1}", ["objective.weights", "key of generative"]),
        ("run.sed=1", ["run.sed", "'seed'"]),
        ("run=1", ["run.KEY=VALUE"]),
        ("tuned.run.seed=1", ["run.*", "without the stage"]),
        ("train.steps", ["KEY=VALUE"]),
        ("tuned=5", ["tuned.KEY=VALUE"]),
        ("stages.tuned.train.steps=5", ["STAGE.KEY=VALUE"]),
        ("schedule.warmup=5 parsecs", ["schedule.warmup", "5 parsecs", "1000 steps"]),
        ("optimizer.lr.x=1", ["optimizer.lr", "not a section"]),
        ("optimizer.betas={", ["not YAML"]),
        ("model.vision.3.width=1", ["'3'", "list of 1"]),
        ("data.pairs.lanes=48", ["data.pairs.lanes", "32, 64"]),
        ("data.pairs.image.crop=[0, 1]", ["data.pairs.image.crop"]),
        ("data.pairs.image.size=30", ["data.pairs.image.size", "8"]),
        ("data.pairs.length=128", ["data.pairs.length", "packed text"]),
        ("data.pairs.order_as=nobody", ["data.pairs.order_as", "nobody"]),
        ("tuned.init=maskd", ["'maskd'", "'masked'"]),
        ("masked.init=tuned", ["'tuned'", "after"]),
        ("masked.init=masked", ["itself"]),
        ("optimizer.lr=null", ["optimizer.lr"]),
        ("train=null", ["train", "exactly one of steps, samples, epochs"]),
        ("objective.weights={pairs: 1}", ["objective.weights"]),
        ("model.freeze=[llm]", ["model.freeze", "contrastive has no llm"]),
        ("model.freeze=[visoin]", ["model.freeze", "'visoin' matches no parameter", "'vision'"]),
        (
            "model.freeze=[eyes]",
            ["model.freeze", "'eyes' matches no parameter", "vision, text, connector, llm"],
        ),
        ("model.freeze=['a(']", ["model.freeze", "not a valid regular expression"]),
        (
            "model.freeze=[connector]",
            ["model.freeze", "'connector' matches no parameter", "has no such part"],
        ),
        ("optimizer.groups=[{match: llm, lr: 1}]", ["optimizer.groups.0.match", "has no such part"]),
        ("optimizer.groups=[{match: '(', lr: 1}]", ["optimizer.groups.0.match", "not a valid regular"]),
        ("optimizer.groups=[{match: text}]", ["optimizer.groups.0", "changes nothing", "lr_scale"]),
        ("optimizer.groups=[{match: text, lr: 1, lr_scale: 2}]", ["optimizer.groups.0", "not both"]),
        ("optimizer.groups=[{match: text, rate: 1}]", ["optimizer.groups.0.rate", "unknown key"]),
        ("data.pairs.sources.scenes.weight=2", ["data.pairs.sources", "add up to 2", "nothing", "digits"]),
        ("data.pairs.sources.scenes.cap=9", ["data.pairs.sources.scenes", "weight sets the share", "cap"]),
        ("data.pairs.sources.scenes.weight=.inf", ["data.pairs.sources.scenes", "weight is inf"]),
        ("data.pairs.sources.digits.weight=1e12", ["data.pairs.sources", "'scenes'", "below one slot"]),
        ("data.pairs.image.max_pixels=1B", ["data.pairs.image.max_pixels", "178000000"]),
        ("run.name=a/b", ["run.name"]),
        ("engine.offload=cpu", ["engine.offload", "not available yet"]),
        ("engine.compile=true", ["engine.compile", "not available yet"]),
        ("objective.text_mask=0.1", ["objective.text_mask", "not available yet"]),
        ("eval.perplexity={x: {path: a, stream: pears}}", ["eval.perplexity.x.stream", "'pears'", "'pairs'"]),
    ],
)
def test_a_wrong_override_is_named(override: str, words: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, FLIP, override)
    for word in [*words, repr(override)]:
        assert word in message
    assert "\n" not in message or len(set(message.splitlines())) == len(message.splitlines())


def test_an_override_of_an_unselected_stage_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, FLIP, "tuned.train.steps=5", stage="masked")
    assert "'tuned' is not selected" in message
    load(
        tmp_path, FLIP, "tuned.train.steps=5", stage="masked", strict=False
    )  # a rank of one stage receives the overrides of all


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("image_mask: 0.5", "image_mas: 0.5", "objective: {kind", ["objective.image_mas", "'image_mask'"]),
        (
            "image_mask: 0}",
            "image_mask: 1}",
            "image_mask: 1}",
            ["stages.tuned.objective.image_mask", "less than 1"],
        ),
        (
            "train: {steps: 100}",
            "train: {steps: 100, epochs: 1}",
            "train: {steps",
            ["exactly one", "steps, epochs"],
        ),
        ("optimizer: {lr: 1e-3", "optimizer: {lr: 1e-3, lr_per_256: 1", "optimizer: {lr", ["not both"]),
        ("run: {name", "rum: {name", "rum: {name", ["rum", "'run'"]),
        ("batch: 64", "batch: 64\n    batch: 32", "    batch: 32", ["'batch'", "twice"]),
        (
            "sources: {digits: data/digits, scenes: {path: data/scenes, weight: 0.5}}",
            "lanes: 2",
            "pairs:",
            ["has no source"],
        ),
        (
            "weight: 0.5",
            "weight: 1",
            "sources:",
            ["data.pairs.sources.scenes.weight: weights", "add up to 1", "for digits"],
        ),
        ("weight: 0.5", "weight: 0.5, repeat: 2", "sources:", ["data.pairs.sources.scenes", "weight sets"]),
        ("    text: {tokenizer: clip-bpe, length: 16}", "", "pairs:", ["data.pairs.text", "is missing"]),
        ("objective: {kind: contrastive, image_mask: 0.5}", "", None, ["objective.kind", "is missing"]),
        ("  tuned:", "  data:", "  data:", ["stages.data", "not a valid stage name"]),
        (
            "kind: contrastive",
            "kind: generative",
            "objective:",
            ["objective.image_mask", "a key of contrastive"],
        ),
        (
            "objective: {image_mask: 0}\n    optimizer: {betas: [0.8, 0.9]}",
            "objective: {kind: generative}",
            "  text: {width",
            ["model.llm", "model.text", "is not used by generative"],
        ),
        ("init: masked", "init: masked\n    continue: masked", "    continue", ["not both"]),
        ("  masked: {}", "  masked: 5", "  masked: 5", ["stages.masked", "a map"]),
        ("stages:", "stages: {}\nold:", None, ["old", "unknown key"]),
    ],
)
def test_a_wrong_file_is_named_with_its_line(
    old: str, new: str, line: str | None, words: list[str], tmp_path: Path
) -> None:
    assert old in FLIP
    text = FLIP.replace(old, new, 1)
    message = refused(tmp_path, text)
    for word in words:
        assert word in message
    assert str(tmp_path / "recipe.yaml") in message
    if line is not None:
        number = next(
            i for i, found in enumerate(text.splitlines(), 1) if found.startswith(line) or line in found
        )
        assert f"recipe.yaml:{number}: " in message


@pytest.mark.parametrize(
    ("kind", "parts"), [("contrastive", {"vision", "text"}), ("generative", {"vision", "llm"})]
)
def test_only_a_part_that_the_model_has_can_be_frozen(kind: str, parts: set[str]) -> None:
    for part in ("vision", "text", "llm"):
        given = {"objective": {"kind": kind}, "train": {"steps": 1}, "model": {"freeze": [part]}}
        problems = [key for key, _ in KINDS[kind].check(TrainStage.model_validate(given))]
        assert (("model", "freeze") in problems) == (part not in parts)


SPHINX = """
data:
  text: {sources: {a: x}, batch: 4, text: {format: packed, length: 8}}
  captions: {sources: {b: y}, batch: 4, image: {size: 32}, text: {tokenizer: clip-bpe, length: 8}}
model: {llm: {config: {model_type: llama}}, vision: {init: flip/tuned}, connector: {}, freeze: [vision]}
objective: {kind: generative}
optimizer: {lr: 1}
train: {steps: 1}
"""


@pytest.mark.parametrize(
    ("freeze", "streams"),
    [
        ("[vision]", []),
        ("[vision, connector]", []),
        ("[vision, llm]", ["text"]),
        ("[vision, llm, connector]", ["text", "captions"]),
    ],
)
def test_a_stream_that_passes_through_frozen_parts_alone_is_named(
    freeze: str, streams: list[str], tmp_path: Path
) -> None:
    override = f"model.freeze={freeze}"
    if not streams:
        load(tmp_path, SPHINX, override)
        return
    lines = refused(tmp_path, SPHINX, override).splitlines()
    assert len(lines) == len(streams)
    for line, stream in zip(lines, streams, strict=True):
        assert f"data.{stream}: no parameter that this stream uses is trained" in line


def test_every_problem_has_exactly_one_line(tmp_path: Path) -> None:
    text = FLIP.replace("batch: 64", "batch: -1").replace(
        "width: 64, layers: 2, patch", "wdth: 64, layers: 2, patch"
    )
    lines = refused(tmp_path, text).splitlines()
    assert len(lines) == 2  # though two stages inherit both
    assert {"data.pairs.batch", "model.vision.0.wdth"} == {line.split(": ")[1] for line in lines}


def test_a_file_that_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml.*no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="folder"):
        load_recipe(tmp_path)
    assert "map of sections" in refused(tmp_path, "- 1\n")
    assert "recipe.yaml:2: " in refused(tmp_path, "run: {name: x}\ndata: [}\n")
    assert "constructor" in refused(tmp_path, "run: !!python/object/apply:os.getcwd []\n")


def test_numbers_and_keys_of_yaml(tmp_path: Path) -> None:
    values = load_yaml(write(tmp_path, "a: 1e-4\nb: -2E+3\nc: {0: zero, '1': one}\n")).values
    assert values == {"a": 1e-4, "b": -2000.0, "c": {"0": "zero", "1": "one"}}
    with pytest.raises(UserError, match=r":1: .*quotes"):
        load_yaml(write(tmp_path, "on: 1\n"))


def test_merge_stages_are_checked(tmp_path: Path) -> None:
    def mix(body: str) -> str:
        return refused(tmp_path, FLIP + f"  mix: {{kind: merge, {body}}}\n")

    assert "'tunde' is not a stage" in mix("inputs: {masked: 0.5, tunde: 0.5}")
    assert "at least 2" in mix("inputs: {masked: 0.5}")
    assert "regular expression" in mix("inputs: {masked: 0.5, tuned: 0.5}, only: '['")
    assert "stages.mix.optimizer: unknown key" in mix("inputs: {masked: 1, tuned: 1}, optimizer: {lr: 1}")
    assert "'average' is none of linear" in mix("inputs: {masked: 1, tuned: 1}, method: average")
    load(tmp_path, FLIP + "  mix: {kind: merge, inputs: {../other/stage: 0.5, tuned: 0.5}}\n")


# --- batch and world size


def test_a_schedule_of_the_batch(tmp_path: Path) -> None:
    recipe = load(tmp_path, FLIP, "data.pairs.batch={0: 64, 10: 96, 30: 256}")
    stage = training(recipe, "masked")
    assert stage.data["pairs"].batch == {0: 64, 10: 96, 30: 256}
    record = yaml.safe_load(dump_plain(stage_record(recipe, "masked")))
    assert record == stage_record(recipe, "masked")
    assert TrainStage.model_validate(record["stage"]) == stage
    assert compare_identity(record, stage_record(recipe, "masked")) == []
    samples = 64 * 10 + 96 * 20 + 256 * 5
    for length, steps in ((samples, 35), (samples + 1, 36), (640, 10), (641, 11)):
        assert total_steps(training(load(tmp_path, FLIP, "data.pairs.batch={0: 64, 10: 96, 30: 256}",
            f"train.samples={length}"), "masked")) == steps  # fmt: skip
    assert total_steps(training(load(tmp_path, FLIP, "data.pairs.batch={0: 64, 10: 96, 30: 256}",
        "train.epochs=2"), "masked"), samples_per_epoch=samples // 2) == 35  # fmt: skip
    whole = load(tmp_path, FLIP, "data.pairs.batch=512")
    assert training(whole, "masked").data["pairs"].batch == 512


def test_lanes_divide_every_batch_of_a_schedule(tmp_path: Path) -> None:
    load(tmp_path, FLIP, "data.pairs.batch={0: 64, 10: 96}", "data.pairs.lanes=32")
    message = refused(tmp_path, FLIP, "data.pairs.batch={0: 64, 10: 96}", "data.pairs.lanes=64")
    assert "a batch of {0: 64, 10: 96} cannot be divided into 64 lanes; nearest: 32" in message


def test_the_peak_rate_follows_the_largest_batch(tmp_path: Path) -> None:
    stage = training(
        load(tmp_path, FLIP, "data.pairs.batch={0: 64, 10: 1024}", "optimizer={lr_per_256: 1e-3}"), "masked"
    )
    assert peak_rate(stage.optimizer, stage.data["pairs"].batches.largest) == pytest.approx(4e-3)


def test_nearest_divisors_against_brute_force() -> None:
    for number in (1, 12, 97, 256, 360):
        for near in range(1, 400):
            if number % near:
                below = max((d for d in range(1, near) if number % d == 0), default=None)
                above = min((d for d in range(near + 1, number + 1) if number % d == 0), default=None)
                assert nearest_divisors(number, near) == [d for d in (below, above) if d is not None]


def test_another_kind_in_a_stage_starts_its_section_anew() -> None:
    """And the same kind, written again, keeps the other keys."""
    base = {"objective": {"kind": "contrastive", "image_mask": 0.5}}
    for kind, rest in (("contrastive", {"image_mask": 0.5}), ("generative", {})):
        found = merge_maps(base, {"objective": {"kind": kind}})
        assert found["objective"] == {"kind": kind} | rest
    found = merge_maps(base, {"objective": {"kind": "generative", "weights": {"a": 1}}})
    assert found["objective"] == {"kind": "generative", "weights": {"a": 1}}
    assert base["objective"]["image_mask"] == 0.5


# --- resolved.yaml


def test_the_record_of_a_stage_is_plain_yaml(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    record = yaml.safe_load(dump_plain(stage_record(recipe, "tuned")))
    assert record == stage_record(recipe, "tuned")
    assert record["name"] == "tuned"
    assert record["run"]["seed"] == 3
    assert TrainStage.model_validate(record["stage"]) == recipe.stages["tuned"]
