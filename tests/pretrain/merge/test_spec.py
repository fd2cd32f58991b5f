"""A spec file gives the same request as flags; contradictory options give one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.merge.mergekit.yaml_file import MergekitFile
from pretrain.merge.planning.output_layout import parse_size
from pretrain.merge.planning.request import Request, Rule, make_request
from pretrain.merge.spec import MergeSpec, load_spec, prepare_spec
from tests.support.merge_inputs import floats, write


def asked(text: str, folder: Path) -> Request:
    (folder / "spec.yaml").write_text(text)
    spec = load_spec(folder / "spec.yaml")
    assert isinstance(spec, MergeSpec)
    return spec.to_request()


FULL = r"""
method: ties
inputs:
  - {path: a, weight: 0.6, density: 0.5}
  - {path: b, weight: 0.4, density: 1}
base: c
lambda: 0.7
normalize: false
only: ^llm\.
copy_rest: B
dtype: bf16
max_shard_size: 2GB
rules:
  - {match: mlp, weights: [1, 0]}
  - {match: head, copy_from: A}
  - {match: norm, layers: 0:8, exclude: true}
"""


def test_every_key_of_a_spec(tmp_path: Path) -> None:
    assert asked(FULL, tmp_path) == Request(
        inputs=("a", "b"),
        weights=(0.6, 0.4),
        method="ties",
        base="c",
        densities=(0.5, 1.0),
        scale=0.7,
        normalize=False,
        only=r"^llm\.",
        copy_rest="B",
        dtype="BF16",
        max_shard_size=2 * 10**9,
        rules=(
            Rule("mlp", weights=(1.0, 0.0)),
            Rule("head", copy_from="A"),
            Rule("norm", layers=(0, 8), exclude=True),
        ),
    )


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("{inputs: [a, b], beta: 0.4}", make_request(["a", "b"], beta=0.4)),
        ("{inputs: [{path: a, weight: 1}, {path: b, weight: 3}]}", make_request(["a", "b"], weights=[1, 3])),
        ("{inputs: [a, b, c], weights: [1, 2, 1]}", make_request(["a", "b", "c"], weights=[1, 2, 1])),
        ("{inputs: [a, b, c], method: soup}", make_request(["a", "b", "c"], weights=[1, 1, 1])),
        ("{inputs: [a, b], method: slerp, t: 0.25}", make_request(["a", "b"], method="slerp", beta=0.75)),
        (
            "{inputs: [a, b], base: c, method: task_arithmetic}",
            make_request(["a", "b"], base="c", method="task_arithmetic", weights=[1, 1]),
        ),
        (
            "{inputs: [a], base: c, method: dare_linear, density: 1e-1, seed: 7, rescale: false}",
            make_request(["a"], base="c", method="dare_linear", density=0.1, seed=7, rescale=False),
        ),
        (
            "{inputs: [a, b], beta: 0.5, rules: [{layers: '0:4', curve: [0.2, 0.8]}]}",
            make_request(["a", "b"], beta=0.5, rules=[Rule("", layers=(0, 4), curve=(0.2, 0.8))]),
        ),
        (
            "{inputs: [a, b], beta: 0.5, rules: [{match: mlp, beta: 0.3}]}",
            make_request(["a", "b"], beta=0.5, rules=[Rule("mlp", weights=(0.3, 0.7))]),
        ),
    ],
)
def test_a_spec_says_what_python_says(text: str, same: Request, tmp_path: Path) -> None:
    assert asked(text, tmp_path) == same


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{inputs: [a, b], beta: 0.5, lamda: 1}", r"spec.yaml:1: lamda: unknown key; did you mean 'lambda'"),
        ("{inputs: [{path: a, wieght: 1}, b]}", r"inputs.0.wieght: unknown key"),
        ("{inputs: [a, b], method: karcher}", "'karcher' is none of linear"),
        ("{inputs: [a, b], beta: 0.5, max_shard_size: lots}", "write a size such as 5GB"),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: x, layers: 3, exclude: true}]}", "rules.0.layers"),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: x, layers: 0-3, exclude: true}]}", "write FIRST:LAST"),
        ("[a, b]", "a spec must be a map of keys"),
        ("{inputs: [a, b], inputs: [c]}", "written twice"),
        ("!!python/object/apply:os.system [ls]", "spec.yaml"),
        ("{inputs: [a, b], beta: 0.5, weights: [1, 1]}", "--beta and --weights"),
        ("{inputs: [{path: a, weight: 1}, b]}", "weight is set at 1 of 2 inputs"),
        (
            "{inputs: [{path: a, weight: 1}, {path: b, weight: 1}], weights: [1, 2]}",
            "both at the inputs and for the merge",
        ),
        ("{inputs: [a, b], beta: 0.5, base: c}", "--base is for"),
        ("{inputs: [a, b], beta: 0.5, lambda: 2}", "--lambda is for"),
        ("{inputs: [a, b], beta: 0.5, t: 0.5}", "--t is for slerp"),
        ("{inputs: [a, b], beta: 0.5, density: 0.5}", "--density is for ties, dare_linear, dare_ties"),
        ("{inputs: [a, b], beta: 0.5, seed: 3}", "--seed is for"),
        ("{inputs: [a, b], beta: 0.5, rescale: true}", "--rescale is for"),
        ("{inputs: [a, b], method: ties}", "name it with --base"),
        ("{inputs: [a, b], method: ties, base: c, beta: 0.5}", "--beta is for linear and slerp"),
        ("{inputs: [a, b], method: ties, base: B}", "is also an input"),
        ("{inputs: [a, b], method: ties, base: c, density: 0}", "above 0 and at most 1"),
        ("{inputs: [a, b], method: ties, base: c, density: [0.1, 0.2, 0.3]}", "3 numbers for 2 inputs"),
        ("{inputs: [a, b], method: task_arithmetic, base: c, lambda: .inf}", "a finite number"),
        ("{inputs: [a, b, c], method: slerp, weights: [1, 1, 1]}", "slerp merges two inputs"),
        ("{inputs: [a, b], method: slerp, t: 2}", "between 0 and 1"),
        ("{inputs: [a, b], method: slerp, t: 0.5, normalize: true}", "slerp takes --t or --beta"),
        ("{inputs: [a, b], method: soup, beta: 0.5}", "weighs all inputs equally"),
        (
            "{inputs: [a, c], base: b, method: task_arithmetic, weights: [1, -1], normalize: true}",
            "sum of the weights, which is 0 for 1, -1",
        ),
        ("{inputs: [a, b]}", "set the weights of the inputs"),
        ("{inputs: [a], beta: 0.5}", "two inputs or more"),
        ("{inputs: [a, b], beta: 0.5, only: '('}", "not a valid regular expression"),
        ("{inputs: [a, b], beta: 0.5, exclude: '('}", "not a valid regular expression"),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: '('}]}", "not a valid regular expression"),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: x}]}", "has no action"),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: x, beta: 1, exclude: true}]}", "weights and exclude"),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: x, beta: 1, weights: [1, 1]}]}", "beta or weights"),
        (
            "{inputs: [a, b], beta: 0.5, rules: [{match: x, beta: 1.7}]}",
            "to extrapolate, write weights 1.7 and -0.7",
        ),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: x, t: 0.5}]}", "t is only for slerp"),
        ("{inputs: [a, b], beta: 0.5, rules: [{match: x, weights: [1]}]}", "1 weights for 2 inputs"),
        ("{inputs: [a, b], beta: 0.5, rules: [{curve: [0, 1]}]}", "a curve needs layers"),
        ("{inputs: [a, b], beta: 0.5, rules: [{layers: '0:4', curve: [0, 2]}]}", "betas between 0 and 1"),
        ("{inputs: [a, b], beta: 0.5, rules: [{layers: '4:4', curve: [0, 1]}]}", "is empty"),
        (
            "{inputs: [a, b], beta: 0.5, vocabulary: concat}",
            "'concat' is none of first, intersect, pad, union",
        ),
        ("{inputs: [a, b], beta: 0.5, dtype: int4}", "bf16, fp16, fp32, fp64"),
    ],
)
def test_what_a_spec_cannot_say(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        asked(text, tmp_path)


def test_mergekit_s_files_are_told_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text("{merge_method: linear, models: [{model: a, parameters: {weight: 1}}]}")
    assert isinstance(load_spec(tmp_path / "m.yml"), MergekitFile)
    with pytest.raises(UserError, match="no such spec"):
        load_spec(tmp_path / "absent.yml")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("200", 200), (7, 7), ("3m", 3 * 10**6)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5 apples", "1e9"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write a size such as 5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        FULL,
        "{inputs: [a, b], beta: 0.5, rules: [{layers: '0:4', curve: [0.2, 0.8]}]}",
        "{inputs: [a, b, c], weights: [1, 2, 4]}",
        "{inputs: [a, b], weights: [1, 1], normalize: false}",
        "{inputs: [a, b], method: slerp, t: 0.3, rules: [{match: x, t: 0.1}]}",
        "{inputs: [a, b], method: task_arithmetic, base: c, normalize: true, vocabulary: union}",
        "{inputs: [a, b], method: dare_ties, base: c, seed: 3, rescale: false, density: 0.5, dtype: fp64}",
    ],
)
def test_a_request_comes_back_from_its_record_and_its_record_is_a_spec(text: str, tmp_path: Path) -> None:
    first = asked(text, tmp_path)
    plain = json.loads(json.dumps(first.to_dict()))
    assert Request.from_dict(plain) == first
    assert asked(yaml.safe_dump(plain), tmp_path) == first


def test_seed_and_shard_size_stand_once(tmp_path: Path) -> None:
    folders = [str(write(tmp_path / x, {"w": floats(i, 40)})) for i, x in enumerate("ab")]
    spec = MergeSpec(inputs=list(folders), beta=0.5, max_shard_size=1000)
    with pytest.raises(UserError, match="max_shard_size: also set in the spec"):
        prepare_spec(spec, 100)
    assert (
        prepare_spec(MergeSpec(inputs=list(folders), beta=0.5), 10**6)[0].files[0].name == "model.safetensors"
    )


def test_the_spec_of_the_docs_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/merge.md").read_text()
    shown = page.partition("`--spec FILE` is YAML")[2].partition("\n\n")[2].partition("\n\n")[0]
    (tmp_path / "own.yml").write_text("\n".join(line.removeprefix("    ") for line in shown.splitlines()))
    weights = {f"layers.{i}.{part}.w": floats(i, 2) for i in range(32) for part in ("mlp", "attn")}
    for seed, name in enumerate("AB"):
        write(
            tmp_path / name, {n: w + seed for n, w in weights.items()} | {"embed_tokens.w": floats(seed, 2)}
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        plan, _ = prepare_spec(load_spec("own.yml"))
    terms = {job.name: {term.source: term.weight for term in job.terms} for job in plan.jobs}
    assert terms["layers.3.mlp.w"][0] == 0.7
    assert (terms["layers.0.attn.w"][0], terms["layers.31.attn.w"][0]) == (0.2, 0.8)
    assert [(job.copy, job.terms[0].source) for job in plan.jobs if job.name == "embed_tokens.w"] == [
        (True, 0)
    ]
