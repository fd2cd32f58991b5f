"""mergekit's YAML, unmodified, beside what mergekit itself resolved and computed (make_mergekit_fixtures.py)."""

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
from pretrain.merge.mergekit_parameters import evaluate
from pretrain.merge.mergekit_plan import open_mergekit, plan_mergekit
from pretrain.merge.mergekit_yaml import is_mergekit, parse
from pretrain.merge.plan import Plan, TensorJob
from pretrain.merge.tool import execute
from pretrain.yaml_file import load_yaml

FIXTURES = Path(__file__).parent / "mergekit"
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
    """What the terms of a job should be, from mergekit's own parameters: {(model, name): (weight, density)}."""
    if method == "slerp":
        weights = {model: (1 - shared["t"] if model == base else shared["t"]) for model, _, _ in inputs}
    elif method == "passthrough":
        weights = {model: own.get("scale", 1.0) for model, _, own in inputs}
    else:
        weights = {model: own["weight"] for model, _, own in inputs if "weight" in own}
    if method in ("linear", "task_arithmetic", "dare_linear") and shared["normalize"]:
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
        if made.method in ("ties", "task_arithmetic", "dare_ties", "dare_linear") and want:
            assert job.base is not None
            assert (models[job.base.source], job.base.name) == (
                base, next(n or name for m, n, _ in inputs if m == base),
            )  # fmt: skip
            assert job.option("lambda", 0.0) == shared["lambda"]
            if job.method in ("ties", "dare_ties"):
                assert job.option("normalize", 0) == shared["normalize"]
            if job.method.startswith("dare"):
                assert job.option("rescale", 0) == shared["rescale"]
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
    for name in want.names():
        assert got.info(name) == want.info(name)
        theirs, mine = want.array(name), got.array(name)
        np.testing.assert_allclose(mine, theirs, rtol=bound, atol=bound, err_msg=name)
    layers = json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"]
    assert layers == json.loads(Path(f"{case}.json").read_text())["num_hidden_layers"]


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
    from pretrain.merge.model_config import with_layers

    config = json.dumps({"num_hidden_layers": 3, "layer_types": ["x", "y", "z"]}).encode()
    made = with_layers({"config.json": config}, [0, 1, 1, 2])
    assert json.loads(made["config.json"]) == {"num_hidden_layers": 4, "layer_types": ["x", "y", "y", "z"]}  # type: ignore[arg-type]


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
        ({"merge_method": "model_stock"}, "merge_method 'model_stock' is not supported"),
        ({"merge_method": "della"}, "merge_method 'della' is not supported"),
        ({"modules": {}}, "modules not supported"),
        ({"tokenizer": {"source": "union"}}, "tokenizer not supported"),
        ({"parameters": {"embed_slerp": True}}, "embed_slerp not supported"),
        ({"parameters": {"gamma": 0.1}}, "gamma not supported"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"chat_template": "chatml"}, "chat_template is not supported"),
        ({"slices": []}, "exactly one of models and slices"),
        ({"merge_method": "ties"}, "ties needs base_model"),
        ({"merge_method": "slerp", "base_model": "a"}, "one other model, here are 1"),
        ({"merge_method": "passthrough", "base_model": "b"}, "passthrough takes one source"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "stands twice"),
        ({"models": [{"model": "nobody/x+lora"}]}, r"adapters \(LoRA\) are not supported"),
        ({"models": [{"model": "a", "weight": 1}]}, "models: weight not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse("x.yml", BASE | change)


def test_a_repository_of_the_hub_is_an_address() -> None:
    models = [{"model": "org/name"}, {"model": {"model": {"path": "org/name", "revision": "v1"}}}]
    assert parse("x.yml", BASE | {"models": models}).models() == ["hf://org/name", "hf://org/name@v1"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (
            {"merge_method": "linear", "models": [{"model": "a"}]},
            "39 mismatches.*parameter weight is missing for a",
        ),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [2, 6]}]}]},
            "a has no model.layers.4; it has 4 layers",
        ),
    ],
)
def test_what_the_models_cannot_give(values: dict[str, Any], why: str) -> None:
    file = parse("x.yml", values)
    with pytest.raises(UserError, match="(?s)" + why):
        plan_mergekit(file, open_mergekit(file), 10**9)
