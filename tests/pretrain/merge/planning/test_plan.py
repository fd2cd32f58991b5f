"""Tensors that are mixed, copied, left out or refused; decided before any data are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.errors import UserError
from pretrain.merge import merge, open_weights, plan
from pretrain.merge.planning.request import resolve_weights
from tests.support.merge_inputs import floats, read_bytes, write


def whys(made: object) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {job.name: (job.treatment, tuple(t.source for t in job.terms)) for job in made.jobs}  # type: ignore[attr-defined]


def stage_output(folder: Path, tensors: dict[str, np.ndarray], frozen: dict[str, np.ndarray]) -> str:
    """A folder as `dromos merge` writes it for a run: weights, frozen.safetensors, resolved.yaml."""
    write(folder, tensors)
    (folder / "merge.json").write_text("{}")
    (folder / "resolved.yaml").write_text("stage: {kind: train}\n")
    if frozen:
        save_file(frozen, folder / "frozen.safetensors", metadata={"format": "pt", "towers": "{}"})
    return str(folder)


def test_all_mismatches_are_listed_together(tmp_path: Path) -> None:
    a = {"same": floats(0, 2), "shape": floats(1, 3, 2), "only_a": floats(2, 2), "dtype": floats(3, 2)}
    b = {
        "same": floats(4, 2),
        "shape": floats(5, 2, 3),
        "only_b": floats(6, 2),
        "dtype": floats(7, 2).astype(np.float16),
    }
    with pytest.raises(UserError) as error:
        plan([str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b))], beta=0.5)
    text = str(error.value)
    assert "4 mismatches" in text
    assert "shape: shape [3, 2] in A" in text
    assert "[2, 3] in B" in text
    assert "only_a: only in A" in text
    assert "only_b: only in B" in text
    assert "dtype: dtype F32 in A" in text
    assert "same" not in text


def test_only_narrows_and_copy_rest_says_from_whom(tmp_path: Path) -> None:
    a = {"llm.w": floats(0, 4), "vision.w": floats(1, 4), "only_a": floats(2, 4)}
    b = {"llm.w": floats(3, 4), "vision.w": floats(4, 4), "only_b": floats(5, 4)}
    inputs = [str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b))]
    with pytest.raises(UserError, match=r"vision\.w: does not match --only, but differs between A .* and B"):
        plan(inputs, beta=0.5, only=r"^llm\.")
    for named in ("B", inputs[1]):
        made = plan(inputs, beta=0.5, only=r"^llm\.", copy_rest=named)
        assert whys(made) == {
            "llm.w": ("mixed", (0, 1)),
            "vision.w": ("rest", (1,)),
            "only_b": ("rest", (1,)),
        }
        assert made.left_out == ("only_a",)
    merge(inputs, tmp_path / "out", beta=0.5, only=r"^llm\.", copy_rest="B")
    got = read_bytes(tmp_path / "out/model.safetensors")
    assert got["vision.w"] == b["vision.w"].tobytes()
    assert got["only_b"] == b["only_b"].tobytes()
    assert got["llm.w"] not in (a["llm.w"].tobytes(), b["llm.w"].tobytes())


def test_rest_that_is_the_same_everywhere_needs_no_name(tmp_path: Path) -> None:
    a = {"llm.w": floats(0, 4), "vision.w": floats(1, 4)}
    b = {"llm.w": floats(3, 4), "vision.w": a["vision.w"]}
    made = plan([str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b))], beta=0.5, only=r"^llm\.")
    assert whys(made) == {"llm.w": ("mixed", (0, 1)), "vision.w": ("rest", (0,))}


def test_rest_from_a_third_source(tmp_path: Path) -> None:
    folders = {
        x: str(write(tmp_path / x, {"llm.w": floats(i, 4), "head": floats(i + 9, 4)}))
        for i, x in enumerate("abc")
    }
    inputs = [folders["a"], folders["b"]]
    made = plan(inputs, beta=0.5, only="^llm", copy_rest=folders["c"])
    assert whys(made) == {"llm.w": ("mixed", (0, 1)), "head": ("rest", (2,))}
    merge(inputs, tmp_path / "out", beta=0.5, only="^llm", copy_rest=folders["c"])
    assert read_bytes(tmp_path / "out/model.safetensors")["head"] == floats(11, 4).tobytes()


@pytest.mark.parametrize(
    ("only", "why"), [("nothing_like_it", "no tensor matches"), ("(", "not a valid regular expression")]
)
def test_only_that_says_nothing(tmp_path: Path, only: str, why: str) -> None:
    inputs = [str(write(tmp_path / x, {"w": floats(0, 4)})) for x in "ab"]
    with pytest.raises(UserError, match=why):
        plan(inputs, beta=0.5, only=only)


def test_frozen_tensors_are_shared_when_identical(tmp_path: Path) -> None:
    tower = {"vision.0.w": floats(7, 5)}
    inputs = [stage_output(tmp_path / x, {"llm.w": floats(i, 4)}, tower) for i, x in enumerate("ab")]
    merge(inputs, tmp_path / "out", beta=0.5)
    made = tmp_path / "out/frozen.safetensors"
    assert made.samefile(tmp_path / "a/frozen.safetensors")
    assert set(read_bytes(tmp_path / "out/model.safetensors")) == {"llm.w"}
    source = open_weights(str(tmp_path / "out"))
    assert set(source.names()) == {"llm.w", "vision.0.w"}
    assert source.frozen == {"vision.0.w"}
    assert (tmp_path / "out/resolved.yaml").exists()


def test_frozen_tensors_that_differ_need_a_name(tmp_path: Path) -> None:
    inputs = [
        stage_output(tmp_path / x, {"llm.w": floats(i, 4)}, {"vision.0.w": floats(i + 5, 5)})
        for i, x in enumerate("ab")
    ]
    with pytest.raises(UserError, match=r"vision\.0\.w: is frozen, but differs between A"):
        plan(inputs, beta=0.5)
    merge(inputs, tmp_path / "out", beta=0.5, copy_rest="B")
    assert (tmp_path / "out/frozen.safetensors").samefile(tmp_path / "b/frozen.safetensors")


def test_a_tensor_frozen_in_one_input_alone_is_mixed(tmp_path: Path) -> None:
    a = stage_output(tmp_path / "a", {"llm.w": floats(0, 4)}, {"vision.0.w": floats(5, 5)})
    b = stage_output(tmp_path / "b", {"llm.w": floats(1, 4), "vision.0.w": floats(6, 5)}, {})
    made = plan([a, b], beta=0.5)
    assert whys(made)["vision.0.w"] == ("mixed", (0, 1))
    assert made.frozen is None


def test_tied_weight_against_an_untied_one(tmp_path: Path) -> None:
    a = stage_output(tmp_path / "a", {"embed": floats(0, 4)}, {})
    (tmp_path / "a/merge.json").write_text('{"tied": {"head": "embed"}}')
    b = write(tmp_path / "b", {"embed": floats(1, 4), "head": floats(2, 4)})
    with pytest.raises(UserError, match=r"head: only in B .*missing in A .*\(tied to embed there\)"):
        plan([a, str(b)], beta=0.5)


@pytest.mark.parametrize(
    ("count", "beta", "weights", "expected"),
    [
        (2, 0.4, None, (0.4, 0.6)),
        (2, None, [3, 7], (0.3, 0.7)),
        (3, None, [1, 2, 1], (0.25, 0.5, 0.25)),
        (2, None, [1.5, -0.5], (1.5, -0.5)),
        (3, None, [0.1, 0.2, 0.7], (0.1, 0.2, 0.7)),
    ],
)
def test_weights(
    count: int, beta: float | None, weights: list[float] | None, expected: tuple[float, ...]
) -> None:
    assert resolve_weights(count, beta, weights) == expected


@pytest.mark.parametrize(
    ("count", "beta", "weights", "why"),
    [
        (2, None, None, "set the weights"),
        (2, 0.5, [1, 1], "set the weights"),
        (3, 0.5, None, "for two inputs"),
        (2, 1.2, None, "between 0 and 1"),
        (2, float("nan"), None, "between 0 and 1"),
        (3, None, [1, 1], "2 weights for 3"),
        (2, None, [1, -1], "not 0"),
        (2, None, [1, float("inf")], "finite"),
    ],
)
def test_weights_that_are_refused(
    count: int, beta: float | None, weights: list[float] | None, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        resolve_weights(count, beta, weights)


def test_one_input_is_no_merge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two inputs or more"):
        plan([str(write(tmp_path / "a", {"w": floats(0, 4)}))], weights=[1])


@pytest.mark.parametrize(
    ("b", "options", "advice"),
    [
        ({"w": floats(1, 3, 2)}, {}, ["tensors of different shapes cannot be mixed"]),
        ({"w": floats(1, 2, 3).astype(np.float16)}, {}, ["--dtype sets the output dtype"]),
        ({"w": floats(1, 2, 3), "x": floats(2, 2)}, {}, ["--only limits what is mixed; --copy-rest names"]),
        ({"w": floats(1, 2, 3)}, {"exclude": "w"}, ["--copy-rest names the model whose tensors are copied"]),
        ({"w": floats(1, 2, 3)}, {"only": "nothing", "copy_rest": "A"}, ["--only, --exclude and the rules"]),
    ],
)  # fmt: skip
def test_the_last_lines_advise_on_what_is_wrong(
    tmp_path: Path, b: dict[str, np.ndarray], options: dict[str, str], advice: list[str]
) -> None:
    inputs = [str(write(tmp_path / "a", {"w": floats(0, 2, 3)})), str(write(tmp_path / "b", b))]
    with pytest.raises(UserError) as error:
        plan(inputs, beta=0.5, **options)
    lines = [line for line in str(error.value).splitlines()[1:] if not line.startswith("  ")]
    assert len(lines) == len(advice)
    for line, start in zip(lines, advice, strict=True):
        assert line.startswith(start)


CODES = {"q.qweight": np.ones((2, 2), np.int32), "q.scales": floats(1, 2)}


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (
            '{"quantization_config": {"quant_method": "gptq"}}',
            CODES,
            r"quantised \(gptq\): q\.qweight is I32",
        ),
        ('{"quantization_config": {}}', {"w": np.ones(2, np.uint8)}, r"quantised \(by its config\): w is U8"),
        ('{"quantization_config": {"quant_method": "fp8"}}', {"w": floats(1, 2)}, None),
        ("{}", CODES, r"quantised: q\.qweight is I32"),
    ],
)
def test_quantised_models_are_refused(
    tmp_path: Path, config: str, tensors: dict[str, np.ndarray], said: str | None
) -> None:
    folders = [write(tmp_path / name, tensors) for name in "ab"]
    for folder in folders:
        (folder / "config.json").write_text(config)
    inputs = list(map(str, folders))
    if said is None:
        assert plan(inputs, beta=0.5).jobs
        return
    tensors = tensors | {"more": floats(2, 2)}
    for folder in folders:
        write(folder, tensors)
    for merging in (inputs, [str(write(tmp_path / "plain", tensors)), inputs[1]]):
        with pytest.raises(UserError, match=said + ".*name the weights before quantisation"):
            plan(merging, beta=0.5)
    with pytest.raises(UserError, match=said):
        plan(inputs, method="ties", base=str(tmp_path / "plain"), density=0.5)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_stands_beside_the_weights_belongs_to_the_plan(tmp_path: Path, name: str) -> None:
    """A merge after a correction of a config is not reported as already done."""
    inputs = [str(write(tmp_path / one, {"w": floats(seed, 2)})) for seed, one in enumerate("ab")]
    beside = tmp_path / "a" / name
    beside.write_text('{"model": {"vocab": {}}}')
    before = merge(inputs, tmp_path / "out", beta=0.5)["plan"]
    assert merge(inputs, tmp_path / "out", beta=0.5)["plan"] == before
    beside.write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(UserError, match="another merge, or the inputs changed since"):
        merge(inputs, tmp_path / "out", beta=0.5)
