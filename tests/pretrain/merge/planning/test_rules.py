"""Terms of each tensor of a plan: rules, curves, exclusions, bases, zero weights; and replanning from a record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge import merge, plan
from pretrain.merge.merge_plan import TensorJob
from pretrain.merge.planning.describe import cost
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import Rule, make_request
from pretrain.merge.planning.rules import interpolate, split_layer
from pretrain.merge.spec import replan
from tests.support.merge_inputs import floats, read_bytes, write, write_bf16

LAYERS = 5


def names() -> list[str]:
    inside = [f"m.layers.{i}.{part}" for i in range(LAYERS) for part in ("attn.q", "mlp.up")]
    return ["m.embed", *inside, "m.norm"]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [
        str(write(tmp_path / x, {name: floats(31 * k + i, 3, 2) for i, name in enumerate(names())}))
        for k, x in enumerate("abc")
    ]


def jobs(inputs: list[str], **asked: Any) -> dict[str, TensorJob]:
    return {job.name: job for job in plan(inputs, **asked).jobs}


def weights(job: TensorJob) -> tuple[float, ...]:
    return tuple(term.weight for term in job.terms)


def test_the_first_rule_that_matches_wins(models: list[str]) -> None:
    rules = [
        Rule(r"layers\.0\.mlp", weights=(0.9, 0.1)),
        Rule("mlp", weights=(2, 6)),  # shares, divided by their sum
        Rule("embed", copy_from="B"),
        Rule("norm", copy_from=models[2]),
        Rule(r"layers\.4", weights=(1, 0)),
        Rule(r"layers\.4\.attn", weights=(0, 1)),  # never reached
    ]
    made = jobs(models[:2], beta=0.5, rules=rules)
    assert weights(made["m.layers.0.mlp.up"]) == (0.9, 0.1)
    assert weights(made["m.layers.1.mlp.up"]) == (0.25, 0.75)
    assert weights(made["m.layers.4.mlp.up"]) == (0.25, 0.75)
    assert weights(made["m.layers.1.attn.q"]) == (0.5, 0.5)
    last = made["m.layers.4.attn.q"]
    assert (last.method, [t.source for t in last.terms], last.treatment) == ("copy", [0], "mixed")
    assert [(made[n].method, made[n].terms[0].source, made[n].treatment) for n in ("m.embed", "m.norm")] == [
        ("copy", 1, "rule"),
        ("copy", 2, "rule"),
    ]


def test_a_curve_spans_its_layers(models: list[str]) -> None:
    made = jobs(models[:2], beta=0.5, rules=[Rule("", layers=(1, 5), curve=(0.2, 0.8, 0.5))])
    betas = [weights(made[f"m.layers.{i}.attn.q"])[0] for i in range(LAYERS)]
    assert betas == pytest.approx(
        [0.5, *np.interp([0, 1 / 3, 2 / 3, 1], [0, 0.5, 1], [0.2, 0.8, 0.5])], abs=1e-15
    )
    assert weights(made["m.embed"]) == (0.5, 0.5)
    only_mlp = jobs(models[:2], beta=0.5, rules=[Rule("mlp", layers=(0, 5), curve=(0.0, 1.0))])
    assert weights(only_mlp["m.layers.1.mlp.up"]) == (0.25, 0.75)
    assert weights(only_mlp["m.layers.1.attn.q"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rules": [Rule("mlq", weights=(1, 2))]}, "rule 'mlq' matches no tensor"),
        ({"rules": [Rule("bias", copy_from="A")]}, "rule 'bias' matches no tensor"),
        ({"exclude": "bias"}, "exclude 'bias' matches no tensor"),
        (
            {"rules": [Rule("", layers=(0, 32), curve=(0.2, 0.8))]},
            "is for layers 0:32, but the model has layers 0:5",
        ),
        (
            {"rules": [Rule("mlp", layers=(5, 8), weights=(1, 2))]},
            "is for layers 5:8, but the model has layers 0:5",
        ),
        (
            {"rules": [Rule("norm", layers=(0, 5), weights=(1, 2))]},
            "is for layers 0:5, but no name has a layer",
        ),
    ],
)
def test_what_matches_nothing_is_told(models: list[str], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plan(models[:2], beta=0.5, **asked)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_interpolation_is_numpy_s(count: int) -> None:
    points = list(floats(3, count))
    for at in np.linspace(0, 1, 23):
        want = np.interp(at, np.linspace(0, 1, count), points) if count > 1 else points[0]
        assert interpolate(points, float(at)) == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj.weight")),
        ("transformer.h.11.attn.bias", ("transformer.h", 11, "attn.bias")),
        ("visual.transformer.resblocks.0.ln_1.weight", ("visual.transformer.resblocks", 0, "ln_1.weight")),
        ("layers.2.experts.7.w1", ("layers", 2, "experts.7.w1")),
        ("encoder.layer.1.output", ("encoder.layer", 1, "output")),
        ("lm_head.weight", None),
        ("players.3.x", None),
    ],
)
def test_layers_of_names(name: str, parts: tuple[str, int, str] | None) -> None:
    assert split_layer(name) == parts


def test_excluded_tensors_need_a_name_or_to_be_the_same(models: list[str]) -> None:
    for asked in ({"exclude": "norm"}, {"rules": [Rule("norm", exclude=True)]}):
        with pytest.raises(UserError, match=r"m\.norm: is excluded, but differs between A .* and B"):
            plan(models[:2], beta=0.5, **asked)
        job = jobs(models[:2], beta=0.5, copy_rest="B", **asked)["m.norm"]
        assert (job.method, job.terms[0].source, job.treatment) == ("copy", 1, "excluded")


def test_what_a_rule_copies_must_be_there(models: list[str], tmp_path: Path) -> None:
    other = str(write(tmp_path / "other", {"x": floats(0, 2)}))
    with pytest.raises(
        UserError, match=r"2 mismatches(?s:.)*m\.norm: a rule copies it from C .*which does not have it"
    ):
        plan(models[:2], beta=0.5, rules=[Rule("norm|embed", copy_from=other)])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_methods_with_a_base(models: list[str], method: str) -> None:
    density = {} if method == "task_arithmetic" else {"density": [0.5, 0.25]}
    made = jobs(models[:2], method=method, base=models[2], weights=[0.6, 0.3], scale=1.5, **density)
    job = made["m.norm"]
    assert job.method == method
    assert job.base is not None
    assert (job.base.source, job.base.name) == (2, "m.norm")
    assert weights(job) == (0.6, 0.3)
    assert [t.density for t in job.terms] == ([0.5, 0.25] if density else [1.0, 1.0])
    assert job.option("lambda", 0) == 1.5
    options = {"lambda"} | ({"normalize"} if "ties" in method else set())
    options |= {"rescale", "seed"} if "dare" in method else set()
    assert {name for name, _ in job.options} == options
    if method == "ties":
        assert job.option("normalize", False) is True


def test_a_mean_of_differences_divides_by_the_weights(models: list[str]) -> None:
    made = jobs(models[:2], method="task_arithmetic", base=models[2], weights=[1, 3], normalize=True)
    assert weights(made["m.norm"]) == (0.25, 0.75)


def test_weights_of_zero_are_not_read(models: list[str]) -> None:
    job = jobs(models[:2], method="ties", base=models[2], weights=[0, 1])["m.norm"]
    assert [t.source for t in job.terms] == [1]
    for asked in ({"weights": [0, 0]}, {"weights": [1, 1], "scale": 0.0}):
        job = jobs(models[:2], method="task_arithmetic", base=models[2], **asked)["m.norm"]  # type: ignore[arg-type]
        assert (job.method, [t.source for t in job.terms], job.base) == ("copy", [2], None)
    for t, source in ((0.0, 0), (1.0, 1)):
        job = jobs(models[:2], method="slerp", t=t)["m.norm"]
        assert (job.method, [x.source for x in job.terms]) == ("copy", [source])


def test_slerp_says_both_shares(models: list[str]) -> None:
    job = jobs(models[:2], method="slerp", beta=0.7)["m.norm"]
    assert (job.method, weights(job)) == ("slerp", (0.7, 1 - 0.7))
    assert job.option("t", 0) == 1 - 0.7
    job = jobs(models[:2], method="slerp", beta=0.7, rules=[Rule("norm", t=0.25)])["m.norm"]
    assert (weights(job), job.option("t", 0)) == ((0.75, 0.25), 0.25)


def test_unnormalized_shares_are_taken_as_they_are(models: list[str]) -> None:
    made = jobs(models[:2], weights=[1, 1], normalize=False, rules=[Rule("norm", weights=(2, -1))])
    assert weights(made["m.embed"]) == (1, 1)
    assert weights(made["m.norm"]) == (2, -1)


def test_a_base_with_other_tensors_is_a_mismatch(models: list[str], tmp_path: Path) -> None:
    tensors = {name: floats(9, 3, 2) for name in names()[1:-1]} | {"m.norm": floats(9, 4)}
    base = str(write(tmp_path / "base", tensors))
    with pytest.raises(UserError) as error:
        plan(models[:2], method="ties", base=base)
    assert "2 mismatches" in str(error.value)
    assert "m.embed: only in A" in str(error.value)
    assert "missing in base" in str(error.value)
    assert "[4] in base" in str(error.value)


def test_one_input_and_a_base(models: list[str], tmp_path: Path) -> None:
    merge(models[:1], tmp_path / "out", method="task_arithmetic", base=models[2], weights=[0.5])
    a, base, got = (
        read_bytes(Path(p) / "model.safetensors") for p in (models[0], models[2], tmp_path / "out")
    )
    for name in names():
        x, b, y = (np.frombuffer(t[name], np.float32).astype(np.float64) for t in (a, base, got))
        np.testing.assert_array_equal(y.astype(np.float32), (b + 0.5 * (x - b)).astype(np.float32))


def test_fp64_and_the_config_s_dtype(tmp_path: Path) -> None:
    import json

    inputs = [str(write_bf16(tmp_path / x, {"w": floats(i, 9)})) for i, x in enumerate("ab")]
    for folder in inputs:
        (Path(folder) / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "x": 1}))
    merge(inputs, tmp_path / "out", beta=0.3, dtype="fp64")
    assert len(read_bytes(tmp_path / "out/model.safetensors")["w"]) == 72
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"torch_dtype": "float64", "x": 1}


def test_a_plan_comes_back_from_what_it_says(models: list[str]) -> None:
    rules = [Rule("norm", copy_from=models[2]), Rule("", layers=(0, 5), curve=(0.1, 0.9))]
    first = plan(models[:2], beta=0.5, rules=rules, max_shard_size=100)
    again, _ = replan(first.request)
    assert again == first
    assert len(first.files) > 1


def test_cost_is_counted_from_sizes(models: list[str]) -> None:
    (made,), opened = prepare(make_request(models[:2], beta=0.5, rules=[Rule("norm", weights=(1, 0))]))
    tensors = 24 * len(names())  # bytes of a model
    found = cost(made, opened.sources)
    assert found.read == 2 * tensors - 24
    assert found.written == made.size > tensors
    (based,), opened = prepare(make_request(models[:2], method="ties", base=models[2]))
    assert cost(based, opened.sources).read == 3 * tensors
