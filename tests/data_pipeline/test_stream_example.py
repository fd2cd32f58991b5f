"""The example of docs/stream.md: open_clip's training step with batches of Stream, killed and resumed."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import ImageSpec, Stream, TextSpec
from tests.support.samples import write_source

open_clip = pytest.importorskip("open_clip")
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "open_clip_train.py"
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
BATCH, EPOCHS = 8, 3


class Killed(BaseException):
    pass


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "tiny-for-stream.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-for-stream.json")
    broken = {(0, 3): {"png": b"no picture", "txt": b"a red dot"}}
    return write_source(tmp_path / "tars", [11, 14], broken)


def run(
    tars: Path, checkpoint: Path, workers: int, patch: pytest.MonkeyPatch, saves: int | None = None
) -> Any:
    """Run the example; kill it right after `saves` saves. Returns its checkpoint."""
    flags = f"--model tiny-for-stream --batch-size {BATCH} --epochs {EPOCHS} --lr 0.01 --warmup 2 --workers {workers}"
    save, done = torch.save, []

    def saving(content: Any, path: Path) -> None:
        save(content, path)
        done.append(path)
        if len(done) == saves:
            raise Killed

    with patch.context() as patched:
        patched.setattr(sys, "argv", [str(EXAMPLE), str(tars), str(checkpoint), *flags.split()])
        patched.setattr(torch, "save", saving)
        try:
            runpy.run_path(str(EXAMPLE))
        except Killed:
            assert len(done) == saves
    return torch.load(checkpoint)


def test_a_killed_training_ends_as_one_that_was_not(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tars, tmp_path / "whole.pt", 0, monkeypatch)
    first = run(tars, tmp_path / "parts.pt", 2, monkeypatch, saves=1)
    assert (first["epoch"], first["stream"]["step"]) == (1, 3)
    parts = run(tars, tmp_path / "parts.pt", 1, monkeypatch)
    assert whole["epoch"] == parts["epoch"] == EPOCHS
    assert whole["stream"] == parts["stream"]
    for name, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], value, rtol=0, atol=0)
        assert value.numel() == 1 or not torch.equal(first["model"][name], value)  # it has trained


def test_the_example_sees_what_open_clip_s_own_preprocessing_makes(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens equal those of open_clip's tokenizer, pixels those of its normalisation."""
    from open_clip_train import train

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recording(model: Any, data: Any, *rest: Any) -> None:
        seen.extend(data["train"].dataloader)

    monkeypatch.setattr(train, "train_one_epoch", recording)
    run(tars, tmp_path / "seen.pt", 1, monkeypatch)
    assert len(seen) == 3 * EPOCHS
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    visual = open_clip.create_model("tiny-for-stream").visual
    normalise = open_clip.image_transform(16, is_train=False, mean=visual.image_mean, std=visual.image_std)
    *_, tensor, normalised = normalise.transforms
    captions = {
        tuple(tokenizer([f"a {'red' if i % 2 else 'blue'} dot of number {i}"])[0].tolist()) for i in range(14)
    }
    stream = Stream(str(tars), BATCH, image=ImageSpec(16, (0.9, 1.0)), text=TextSpec("clip-bpe", 12), seed=0)
    for images, tokens in seen:
        batch = next(stream)
        want = torch.stack([normalised(tensor(np.ascontiguousarray(pixels))) for pixels in batch.pixels])
        torch.testing.assert_close(images, want)
        assert {tuple(row) for row in tokens.tolist()} <= captions
    stream.close()
