"""Models of other versions and settings: renamed tensors, buffers no longer stored, other dtypes and activations."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain.merge import merge, plan
from pretrain.merge.diff.compare import diff
from pretrain.merge.execute import execute
from pretrain.merge.spec import load_spec, prepare_spec
from pretrain.merge.verify.check_output import verify
from tests.support.merge_inputs import floats, write, write_bf16
from tests.support.zero_runs import finish, recipe, training

CORE = ("embed_tokens.weight", "layers.0.q.weight", "layers.1.q.weight", "norm.weight")


def vlm(seed: int, language: str, vision: str, head: str) -> dict[str, np.ndarray]:
    names = [*(f"{language}{name}" for name in CORE), f"{vision}blocks.0.w", head]
    return {name: floats(seed + i, 4, 4) for i, name in enumerate(names)}


VERSIONS = {
    "qwen_before": ("model.", "visual.", "lm_head.weight"),
    "qwen_after": ("model.language_model.", "model.visual.", "lm_head.weight"),
    "llava_before": ("language_model.model.", "visual.", "language_model.lm_head.weight"),
}


@pytest.mark.parametrize("how", ["flags", "mergekit"])
@pytest.mark.parametrize(
    ("a", "b"),
    [("qwen_before", "qwen_after"), ("qwen_after", "qwen_before"), ("llava_before", "qwen_after")],
)
def test_the_same_model_of_two_versions(tmp_path: Path, a: str, b: str, how: str) -> None:
    inputs = [
        str(write(tmp_path / "a", vlm(0, *VERSIONS[a]))),
        str(write(tmp_path / "b", vlm(50, *VERSIONS[b]))),
    ]
    if how == "flags":
        notes = plan(inputs, beta=0.5).notes
        merge(inputs, tmp_path / "out", beta=0.5)
    else:
        models = [{"model": path, "parameters": {"weight": 0.5}} for path in inputs]
        (tmp_path / "m.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
        made, opened = prepare_spec(load_spec(tmp_path / "m.yml"))
        notes = made.notes
        execute([made], opened, [tmp_path / "out"])
    assert any("read under other names" in note for note in notes)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert sorted(merged) == sorted(vlm(0, *VERSIONS[a]))
    for i, name in enumerate(vlm(0, *VERSIONS[a])):
        mean = (floats(i, 4, 4).astype(np.float64) + floats(50 + i, 4, 4)) / 2
        np.testing.assert_array_equal(merged[name], mean.astype(np.float32))
    report = verify(tmp_path / "out")
    assert not report.wrong, report.lines()
    assert report.recomputed
    compared = diff(*inputs)
    assert not compared.only_a
    assert not compared.only_b


def test_a_language_model_into_the_vlm_that_has_it(tmp_path: Path) -> None:
    """The names are those of the model that gives the config, here B."""
    llm = {f"model.{name}": floats(i, 4, 4) for i, name in enumerate(CORE)}
    inputs = [
        str(write(tmp_path / "a", llm)),
        str(write(tmp_path / "b", vlm(50, *VERSIONS["qwen_after"]))),
    ]
    merge(inputs, tmp_path / "out", beta=0.5, copy_rest="B")
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(vlm(0, *VERSIONS["qwen_after"]))


def test_names_that_differ_otherwise_are_not_taken_for_each_other(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"model.w": floats(0, 3), "x.w": floats(1, 3)})
    b = write(
        tmp_path / "b", {"model.language_model.w": floats(0, 3), "model.w": floats(2, 3), "x.w": floats(1, 3)}
    )
    with pytest.raises(UserError, match=r"model\.language_model\.w: only in B"):
        merge([str(a), str(b)], tmp_path / "out", beta=0.5)
    c = write(tmp_path / "c", {"model.language_model.w": floats(0, 4), "x.w": floats(1, 3)})
    with pytest.raises(UserError, match=r"model\.w: only in A"):
        merge([str(a), str(c)], tmp_path / "out", beta=0.5)


@pytest.mark.parametrize("layers", [3, 40])
def test_mismatches_are_listed_by_pattern(tmp_path: Path, layers: int) -> None:
    parts = [f"part{chr(97 + k)}" for k in range(14)]
    a = {f"layers.{i}.{part}.w": floats(0, 1) for i in range(layers) for part in parts}
    inputs = [
        str(write(tmp_path / "a", a | {"x": floats(0, 2)})),
        str(write(tmp_path / "b", {"x": floats(1, 2)})),
    ]
    with pytest.raises(UserError) as error:
        merge(inputs, tmp_path / "out", beta=0.5)
    text = str(error.value)
    assert f"{14 * layers} mismatches" in text
    assert f"layers.*.parta.w: only in A ({inputs[0]}), missing in B ({inputs[1]}) ({layers} tensors)" in text
    assert f"and {4 * layers} more" in text
    assert len(text.splitlines()) < 15


@pytest.mark.parametrize("how", ["flags", "mergekit"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "text_model.embeddings.position_ids",
        "model.layers.0.attn.masked_bias",
    ],
)
@pytest.mark.parametrize("holder", [0, 1])
def test_buffers_that_one_version_stored(tmp_path: Path, name: str, holder: int, how: str) -> None:
    inputs = []
    for i in range(2):
        held = {"model.layers.0.w": floats(i, 3)} | ({name: floats(9, 2)} if i == holder else {})
        inputs.append(str(write(tmp_path / str(i), held)))
    if how == "flags":
        made = plan(inputs, beta=0.5)
    else:
        models = [{"model": path, "parameters": {"weight": 0.5}} for path in inputs]
        (tmp_path / "m.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
        made, _ = prepare_spec(load_spec(tmp_path / "m.yml"))
    assert [job.name for job in made.jobs] == ["model.layers.0.w"]
    assert any(note.startswith(f"{name}: not in all inputs, left out") for note in made.notes)


def config(folder: Path, **settings: Any) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize(
    ("stored", "said", "flag", "expected"),
    [
        ("F32", "bfloat16", None, "float32"),
        ("BF16", "float32", None, "bfloat16"),
        ("BF16", "bfloat16", None, "bfloat16"),
        ("F32", "float32", "bf16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_stored_dtype(
    tmp_path: Path, key: str, stored: str, said: str, flag: str | None, expected: str
) -> None:
    put = write if stored == "F32" else write_bf16
    inputs = [
        config(
            put(tmp_path / n, {"w": floats(s, 8)}),
            **{key: said, "text_config": {key: said}, "other": {"x": 1}},
        )
        for s, n in enumerate("ab")
    ]
    merge(inputs, tmp_path / "out", beta=0.5, dtype=flag)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {key: expected, "text_config": {key: expected}, "other": {"x": 1}}


@pytest.mark.parametrize(
    ("a", "b", "key"),
    [
        ({"model_type": "llama"}, {"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_theta": 1e4}, {"rope_theta": 5e5}, "rope_theta"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            {"rope_parameters": {"rope_theta": 5e5}},
            "rope_parameters",
        ),
        (
            {"text_config": {"hidden_act": "silu"}},
            {"text_config": {"hidden_act": "relu"}},
            "text_config.hidden_act",
        ),
        ({"num_attention_heads": 4}, {"num_attention_heads": 8}, "num_attention_heads"),
    ],
)
def test_settings_that_no_tensor_shows_are_noted(
    tmp_path: Path, a: dict[str, Any], b: dict[str, Any], key: str
) -> None:
    inputs = [
        config(write(tmp_path / n, {"w": floats(s, 8)}), vocab_size=3, **settings)
        for s, (n, settings) in enumerate({"a": a, "b": b}.items())
    ]
    assert any(note.startswith(f"{key} differs: ") for note in plan(inputs, beta=0.5).notes)
    config(tmp_path / "b", vocab_size=3, **a)
    assert not any("differs" in note for note in plan(inputs, beta=0.5).notes)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_umask_decides_who_reads_the_output(tmp_path: Path, umask: int) -> None:
    inputs = [str(write(tmp_path / n, {"w": floats(s, 8)})) for s, n in enumerate("ab")]
    before = os.umask(umask)
    try:
        merge(inputs, tmp_path / "out", beta=0.5)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_merge_of_clip_stages_says_how_open_clip_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = recipe(tmp_path / "r", a=training(), b=training())
    stages = [finish(made, n, tmp_path / "r", {"visual.w": floats(s, 3)}) for s, n in enumerate("ab")]
    notes = plan([str(stage) for stage in stages], beta=0.5).notes
    assert sum("dromos export OUT --format open_clip" in note for note in notes) == 1
    plain = [str(write(tmp_path / n, {"visual.w": floats(s, 3)})) for s, n in enumerate("cd")]
    assert not any("open_clip" in note for note in plan(plain, beta=0.5).notes)
