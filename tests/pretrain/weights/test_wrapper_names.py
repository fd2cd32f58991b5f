"""Names that compiled, parallel and checkpointed modules store: read and written under the model's own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from pretrain.merge import merge, plan
from pretrain.merge.diff.compare import diff, lines
from pretrain.merge.verify.check_output import verify
from pretrain.weights.source import open_weights
from pretrain.weights.wrapper_names import unwrapped
from tests.support.merge_inputs import floats, write

torch = pytest.importorskip("torch")

NAMES = ("layers.0.w", "layers.1.w", "head.weight")


def tensors(seed: int, name: Any) -> dict[str, Any]:
    return {name(n): floats(seed + i, 3, 2) for i, n in enumerate(NAMES)}


PREFIXES = {
    "_orig_mod.": lambda n: f"_orig_mod.{n}",
    "module._orig_mod.": lambda n: f"module._orig_mod.{n}",
    "_orig_mod.module.": lambda n: f"_orig_mod.module.{n}",
    "module.": lambda n: f"module.{n}",
    "inside": lambda n: n.replace("layers.0", "layers.0._orig_mod"),
    "fsdp": lambda n: "_fsdp_wrapped_module." + n.replace("layers.0", "layers.0._checkpoint_wrapped_module"),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", PREFIXES)
def test_wrappers_are_removed_and_said(tmp_path: Path, kind: str, pickled: bool) -> None:
    inputs = []
    for seed, folder in enumerate("ab"):
        held = tensors(seed * 10, PREFIXES[kind])
        if pickled:
            inputs.append(str(tmp_path / f"{folder}.pt"))
            torch.save({"state_dict": {n: torch.from_numpy(t) for n, t in held.items()}}, inputs[-1])
        else:
            inputs.append(str(write(tmp_path / folder, held)))
    notes = plan(inputs, beta=0.5).notes
    assert sum("in the names of its tensors" in note for note in notes) == 2
    merge(inputs, tmp_path / "out", beta=1.0)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert set(merged) == set(NAMES)
    for i, name in enumerate(NAMES):
        assert merged[name].tobytes() == floats(i, 3, 2).tobytes()
    assert not verify(tmp_path / "out").wrong
    assert any("in the names of its tensors" in line for line in lines(diff(*inputs), 2, 2))


def test_a_wrapped_and_a_plain_model_merge(tmp_path: Path) -> None:
    a = write(tmp_path / "a", tensors(0, lambda n: n))
    b = write(tmp_path / "b", tensors(9, PREFIXES["module._orig_mod."]))
    merge([str(a), str(b)], tmp_path / "out", beta=0.5)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(NAMES)


def test_names_that_only_look_wrapped_stay() -> None:
    assert unwrapped(["module.a", "b"]) == ({}, None)
    assert unwrapped(["_orig_mod.a", "a"]) == ({}, None)
    assert unwrapped(["submodule.a", "x_orig_mod.b"]) == ({}, None)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    shared = torch.ones(4, 2)
    torch.save({"module.embed_tokens.weight": shared, "module.lm_head.weight": shared}, tmp_path / "x.pt")
    source = open_weights(str(tmp_path / "x.pt"))
    assert (source.names(), source.tied) == (
        ["embed_tokens.weight"],
        {"lm_head.weight": "embed_tokens.weight"},
    )
