"""mergekit's YAML compared with the results of mergekit itself (make_mergekit_fixtures.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain.merge import open_weights
from pretrain.merge.execute import execute
from pretrain.merge.merge_plan import Plan, TensorJob
from pretrain.merge.mergekit.parameters import evaluate
from pretrain.merge.mergekit.plan import open_mergekit, plan_mergekit
from pretrain.merge.mergekit.yaml_file import MERGEKIT_BASE_METHODS, is_mergekit, parse
from pretrain.merge.planning import describe
from pretrain.merge.spec import load_spec
from pretrain.merge.verify.check_output import verify
from pretrain.recipe.yaml_file import load_yaml

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.stem for path in FIXTURES.glob("*.yml"))
COMPUTED = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)


def planned(case: str) -> tuple[Plan, Any]:
    values = load_yaml(f"{case}.yml").values
    assert is_mergekit(values)
    file = parse(f"{case}.yml", values)
    opened = open_mergekit(file)
    return plan_mergekit(file, opened, 10**9), opened


def expected(method: str, base: str | None, shared: dict[str, Any], inputs: list[Any]) -> tuple[Any, ...]:
    """Expected terms of a job from mergekit's own parameters: {(model, name): (weight, density)}."""
    if method == "slerp":
        weights = {model: (1 - shared["t"] if model == base else shared["t"]) for model, _, _ in inputs}
    elif method in ("karcher", "model_stock", "sce"):
        weights = {model: 1.0 for model, _, _ in inputs if method == "karcher" or model != base}
    elif method == "nuslerp":
        (_, first), (_, second) = ((m, own["weight"]) for m, _, own in inputs if m != base)
        t = second / (first + second)
        weights = dict(zip([m for m, _, _ in inputs if m != base], (1 - t, t), strict=True))
    elif method == "passthrough":
        weights = {model: own.get("scale", 1.0) for model, _, own in inputs}
    else:
        weights = {model: own["weight"] for model, _, own in inputs if "weight" in own}
    if method in ("linear", "task_arithmetic", "dare_linear", "breadcrumbs") and shared["normalize"]:
        total = math.fsum(weights.values())
        weights = {model: weight / total for model, weight in weights.items()}
    if method == "multislerp" and shared["normalize_weights"]:
        total = math.fsum(weights.values())
        weights = {model: weight / total for model, weight in weights.items()}
    found = {
        (model, name): (
            weights[model],
            own.get("density", 1.0) if method not in ("task_arithmetic",) else 1.0,
        )
        for model, name, own in inputs
        if weights.get(model)
    }
    return found, shared


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_resolves_to_what_mergekit_resolves(case: str) -> None:
    made, opened = planned(case)
    truth = json.loads(Path(f"{case}.json").read_text())
    jobs: dict[str, TensorJob] = {job.name: job for job in made.jobs}
    assert set(jobs) == set(truth["tensors"])
    models = [source.address for source in opened.sources]
    for name, (base, shared, inputs) in truth["tensors"].items():
        job = jobs[name]
        want, shared = expected(made.method, base, shared, [(m, n or name, own) for m, n, own in inputs])
        if made.method in MERGEKIT_BASE_METHODS and want:
            assert job.base is not None
            assert (models[job.base.source], job.base.name) == (
                base, next(n or name for m, n, _ in inputs if m == base),
            )  # fmt: skip
            assert job.option("lambda", 0.0) == shared["lambda"]
            if job.method.endswith("ties"):
                assert job.option("normalize", 0) == shared["normalize"]
            if job.method.startswith("dare"):
                assert bool(job.option("rescale", 0)) == shared["rescale"]
        if not want:  # nothing is added to the base, or everything is scaled by nothing
            (term,) = job.terms if job.terms else [None]
            if term is not None:
                assert models[term.source] == (base or models[term.source])
            continue
        if made.method == "slerp":
            assert job.method in ("slerp", "copy")
            assert job.method == "copy" or job.option("t", -1.0) == pytest.approx(shared["t"], abs=1e-15)
        got = {(models[t.source], t.name): (t.weight, t.density) for t in job.terms}
        assert set(got) == set(want), name
        for key, (weight, density) in want.items():
            assert got[key] == (pytest.approx(weight, rel=1e-14), pytest.approx(density, rel=1e-14)), name


@pytest.mark.parametrize("case", COMPUTED)
def test_results_are_mergekit_s_within_1e_6(case: str, tmp_path: Path) -> None:
    made, opened = planned(case)
    execute([made], opened, [tmp_path / "out"])
    want = open_weights(f"{case}.safetensors")
    got = open_weights(str(tmp_path / "out"))
    assert set(got.names()) == set(want.names())
    bound = 1e-6 if case != "out_dtype" else 2**-8
    truth = json.loads(Path(f"{case}.json").read_text())
    for name in want.names():
        assert got.info(name) == want.info(name)
        theirs, mine = want.array(name), got.array(name)
        if "tokens" in truth and name in EMBEDDINGS:
            mine = numbered_as(truth["tokens"], mine, tmp_path / "out/tokenizer.json")
        np.testing.assert_allclose(mine, theirs, rtol=bound, atol=bound, err_msg=name)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == truth["num_hidden_layers"]
    assert config["vocab_size"] == len(want.array("lm_head.weight"))


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def numbered_as(theirs: dict[str, int], rows: np.ndarray, path: Path) -> np.ndarray:
    """Our rows in mergekit's order: in a union, mergekit orders the other models at random."""
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(str(path)).get_vocab()
    assert set(ours) == set(theirs)
    order = [ours[token] for token in sorted(theirs, key=lambda token: theirs[token])]
    return np.concatenate([rows[order], rows[len(order) :]])


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_verified(case: str, tmp_path: Path) -> None:
    """merge.json alone reproduces the same bytes, for all row and token rules."""
    made, opened = planned(case)
    execute([made], opened, [tmp_path / "out"])
    report = verify(tmp_path / "out", full=True)
    assert [finding.text for finding in report.findings if finding.level == "wrong"] == []
    assert report.recomputed


def test_several_documents_in_one_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.yml"
    path.write_text("merge_method: linear\n---\nmerge_method: slerp\n")
    with pytest.raises(UserError, match=r"m\.yml:2: a second YAML document begins here"):
        load_spec(path)


def test_passthrough_copies_bytes_and_renumbers_layers(tmp_path: Path) -> None:
    made, opened = planned("passthrough")
    execute([made], opened, [tmp_path / "out"])
    got, a, b = (load_file(Path(p) / "model.safetensors") for p in (tmp_path / "out", "a", "b"))
    for layer, (source, number) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        name = "mlp.up_proj.weight"
        assert np.array_equal(got[f"model.layers.{layer}.{name}"], source[f"model.layers.{number}.{name}"])
    assert np.array_equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert np.array_equal(got["lm_head.weight"], b["lm_head.weight"])


def test_lists_of_the_config_follow_the_layers(tmp_path: Path) -> None:
    from pretrain.weights.companions import with_layers

    lists = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
    config = json.dumps({"num_hidden_layers": 3, "eos": [1, 2, 3]} | {key: ["x", "y", "z"] for key in lists})
    made = with_layers({"config.json": config.encode()}, [0, 1, 1, 2])
    wanted = {"num_hidden_layers": 4, "eos": [1, 2, 3]} | {key: ["x", "y", "y", "z"] for key in lists}
    assert json.loads(made["config.json"]) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "name", "at", "value"),
    [
        (0.3, "x", 0.5, 0.3),
        ("1e-3", "x", 0.5, 1e-3),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 1.0, 0.0),
        ([0.5], "x", 0.7, 0.5),
        ([True, False], "x", 0.9, True),
        ([True, False], "x", 1.0, False),
        ([{"filter": "mlp", "value": 1}, {"value": [0, 2]}], "self_attn", 0.5, 1.0),
        ([{"filter": "mlp", "value": 1}, {"filter": "*", "value": 4}], "self_attn", 0.5, 4.0),
        ({"filter": "mlp", "value": 1}, "self_attn", 0.5, None),
        ([], "x", 0.5, None),
    ],
)
def test_parameters(setting: Any, name: str, at: float, value: float | None) -> None:
    assert evaluate(setting, name, at) == value


BASE = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"merge_method": "arcee_fusion"}, "merge_method 'arcee_fusion' is not supported"),
        ({"merge_method": "sce"}, "sce needs base_model"),
        ({"merge_method": "della"}, "merge_method 'della' is not supported"),
        ({"modules": {"x": {"models": []}}}, "write exactly one of models, slices and modules"),
        ({"modules": {"x": {}}, "models": None}, "modules: write exactly one of models and slices"),
        ({"modules": {"text": {}, "vision": {}}, "models": None}, "several modules are not supported"),
        ({"modules": [], "models": None}, "modules must be a map"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "have the same purpose"),
        ({"tokenizer": "base"}, "tokenizer must be a map"),
        ({"tokenizer": {"padding": 8}}, "tokenizer: padding not supported"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of 0"),
        ({"tokenizer": {"tokens": {"x": {}}}}, "x: needs a source"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "mean"}}}}},
            "x: kind 'mean': must be zero or model_token",
        ),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}}, "either token"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"chat_template": 3}, "chat_template 3 is not a template"),
        ({"models": [{"model": "a", "revision": "v1"}]}, "write a@v1"),
        ({"slices": []}, "write exactly one of models, slices and modules"),
        ({"merge_method": "ties"}, "ties needs base_model"),
        ({"merge_method": "slerp", "base_model": "a"}, "one other model, but 1 models are given"),
        ({"merge_method": "nuslerp"}, "nuslerp merges two models besides base_model, but 1 are given"),
        (
            {"merge_method": "model_stock", "base_model": "b"},
            "at least two models besides base_model, but 1 are given",
        ),
        ({"merge_method": "passthrough", "base_model": "b"}, "passthrough needs one source"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "occurs twice"),
        ({"models": [{"model": {"model": {"path": None}}}]}, "model None is not a path"),
        ({"models": [{"model": "nobody/x+lora"}]}, r"adapters \(LoRA\) are not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse("x.yml", BASE | change)


def test_what_mergekit_passes_over_is_passed_over_with_a_note() -> None:
    made, _ = planned("passed_over")
    for key in ("dype", "random_seed", "models: density"):
        assert any(f"{key} is not a key of mergekit" in note for note in made.notes), key
    for key in ("embed_slerp", "gamma"):
        assert any(f"{key} has no effect" in note for note in made.notes), key
    assert any("residual_weight" in note for note in planned("passthrough_whole")[0].notes)


@pytest.mark.parametrize("case", CASES)
def test_every_plan_can_be_read(case: str) -> None:
    made, _ = planned(case)
    told = describe.lines(made)
    assert sum(
        job.name in line for job, line in zip(made.jobs, told[len(made.addresses) + 1 :], strict=False)
    ) == len(made.jobs)
    if case == "ties_rescale":
        assert any("rescale l1" in line for line in told)


def test_what_is_passed_through_counts_as_copied() -> None:
    from pretrain.merge.planning.describe import summary

    assert summary(planned("passthrough_whole")[0]).startswith("0 tensors mixed, 57 copied (layer)")
    scaled = planned("passthrough")[0]
    mixed = sum(not job.copy for job in scaled.jobs)
    assert 0 < mixed < len(scaled.jobs)
    assert summary(scaled).startswith(f"{mixed} tensors mixed, {len(scaled.jobs) - mixed} copied (layer)")


def test_dare_in_a_mergekit_file_keeps_the_l1_norm() -> None:
    """mergekit's rescale: the kept part of a difference has the L1 norm of the whole difference."""
    from pretrain.merge.methods.blocks import Workers
    from pretrain.merge.methods.compute import prepare

    values = {"merge_method": "dare_linear", "base_model": "a", "models": [{"model": "b"}], "dtype": "float32",
              "parameters": {"weight": 1, "density": 0.4}}  # fmt: skip
    file = parse("x.yml", values)
    opened = open_mergekit(file)
    made = plan_mergekit(file, opened, 10**9)
    assert any("draw depends on --seed" in note for note in made.notes)
    job = next(job for job in made.jobs if job.name.endswith("0.mlp.up_proj.weight"))
    base, other = (source.array(job.name).ravel().astype(np.float64) for source in opened.sources)
    with Workers(opened.sources) as workers:
        total = prepare(job, workers)
        (block,) = workers.blocks(0, len(base))
        got = np.array(getattr(total, "total", total)(block)) - base
    kept = got != 0
    assert 0 < kept.sum() < len(kept)
    whole = np.abs(other - base).sum()
    assert np.abs(got).sum() == pytest.approx(whole, rel=1e-12)
    ratio = whole / np.abs(other - base)[kept].sum()
    np.testing.assert_allclose(got[kept], (other - base)[kept] * ratio, rtol=1e-12)


def test_a_chat_template_of_no_known_name_is_refused() -> None:
    file = parse("x.yml", BASE | {"chat_template": "alpaca"})
    with pytest.raises(UserError, match="unknown name 'alpaca'; write auto, chatml, llama3"):
        open_mergekit(file)


def test_the_tokenizer_of_a_model_that_is_not_merged() -> None:
    """Its rows are not read; tokens that the other models lack are zeros."""
    models = [{"model": "d", "parameters": {"weight": 0.5}}, {"model": "e", "parameters": {"weight": 0.5}}]
    file = parse("x.yml", {"merge_method": "linear", "models": models, "tokenizer_source": "model:f"})
    opened = open_mergekit(file)
    made = plan_mergekit(file, opened, 10**9)
    assert (made.inputs, len(opened.sources)) == (2, 3)
    assert all(term.source < 2 for job in made.jobs for term in job.terms)
    d, e = (open_weights(x).array("lm_head.weight") for x in "de")
    for source, own in zip(opened.sources[:2], (d, e), strict=True):
        rows = source.array("lm_head.weight")
        assert rows.shape == (6, 4)
        assert not rows[4].any()  # <pad>
        ours = (
            {"<unk>": 0, "sun": 1, "moon": 2, "<s>": 3}
            if own is d
            else {"<unk>": 0, "moon": 1, "sky": 2, "sun": 3}
        )
        for token, row in ours.items():
            number = {"<unk>": 0, "sun": 1, "moon": 2, "sky": 3, "<pad>": 4, "<s>": 5}[token]
            assert np.array_equal(rows[number], own[row])


def test_a_repository_of_the_hub_is_an_address() -> None:
    models = [{"model": "org/name"}, {"model": {"model": {"path": "org/name", "revision": "v1"}}}]
    assert parse("x.yml", BASE | {"models": models}).models() == ["hf://org/name", "hf://org/name@v1"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (
            {"merge_method": "linear", "models": [{"model": "a"}]},
            r"1 mismatch:\n  model.embed_tokens.weight and 38 more tensors: parameter weight is missing for a\n",
        ),
        (
            {
                "merge_method": "breadcrumbs",
                "base_model": "a",
                "models": [{"model": "b", "parameters": {"weight": 1, "density": 0}}],
                "parameters": {"normalize": True},
            },
            "density 0 of a model with a weight cannot be normalized",
        ),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [2, 6]}]}]},
            "a has no model.layers.4; it has 4 layers",
        ),
        (
            {
                "merge_method": "passthrough",
                "slices": [{"sources": [{"model": "a", "layer_range": [0, 10**30]}]}],
            },
            "a has no model.layers.4; it has 4 layers",
        ),
    ],
)
def test_what_the_models_cannot_give(values: dict[str, Any], why: str) -> None:
    file = parse("x.yml", values)
    with pytest.raises(UserError, match="(?s)" + why):
        plan_mergekit(file, open_mergekit(file), 10**9)
