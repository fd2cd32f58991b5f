"""Exported folders, loaded by open_clip and transformers: equal features, tokens and logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.errors import UserError
from pretrain.build.objective import load_trained
from pretrain.build.streams import stage_specs
from pretrain.export import open_clip
from pretrain.export.write_folder import export
from pretrain.objectives.device_batch import DeviceBatch, to_device

CAPTIONS = [
    "a red square number 7",
    "a blue square",
    "a white square number 31 and a word longer than the row " * 3,
]


def some_rows(objective: object, stage: object, stream: str) -> DeviceBatch:
    spec = {s.name: s for s in stage_specs(stage, 3, "main", objective.streams)}[stream]  # type: ignore[attr-defined,arg-type]
    return to_device(BatchBuilder(spec).make(0, 0, 4), stage.data[stream].image, torch.device("cpu"))  # type: ignore[attr-defined]


def test_open_clip_computes_the_same_features(tiny_runs: Path, tmp_path: Path) -> None:
    import open_clip

    address = str(tiny_runs / "runs" / "flip" / "main")
    folder = export(address, "open_clip", tmp_path / "clip")
    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    peer.eval()
    objective, stage = load_trained(address)
    rows = some_rows(objective, stage, "pairs")
    with torch.no_grad():
        ours = objective.model(images=rows.images, tokens=rows.tokens)
        image, text = (
            peer.encode_image(rows.images, normalize=True),
            peer.encode_text(rows.tokens, normalize=True),
        )
    torch.testing.assert_close(ours["image"], image, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["text"], text, rtol=0, atol=1e-6)
    assert peer.logit_scale.shape == ()
    assert peer.logit_scale.exp().item() == pytest.approx(ours["scale"].item(), rel=1e-6)
    settings = stage.data["pairs"].image
    assert tuple(preprocess.transforms[-1].mean) == settings.mean
    assert tuple(preprocess.transforms[-1].std) == settings.std


def test_open_clip_tokenizes_as_the_training_did(tiny_runs: Path, tmp_path: Path) -> None:
    import open_clip

    from data_pipeline.transforms.tokenizers import caption_row
    from pretrain.build.tokenizer import stage_tokenizer

    address = str(tiny_runs / "runs" / "flip" / "main")
    folder = export(address, "open_clip", tmp_path / "clip")
    _, stage = load_trained(address)
    tokenizer, length = stage_tokenizer(stage), stage.data["pairs"].text.length
    peer = open_clip.get_tokenizer(f"local-dir:{folder}", context_length=length)
    ours = np.stack([caption_row(tokenizer, caption, length)[0] for caption in CAPTIONS])
    assert peer(CAPTIONS).tolist() == ours.tolist()


def test_transformers_computes_the_same_logits(tiny_runs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    address = str(tiny_runs / "runs" / "sphinx" / "main")
    folder = export(address, "transformers", tmp_path / "llm")
    peer = AutoModelForCausalLM.from_pretrained(folder)
    peer.eval()
    objective, stage = load_trained(address)
    rows = some_rows(objective, stage, "text")
    with torch.no_grad():
        logits = peer(rows.tokens).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), rows.tokens[:, 1:].reshape(-1), reduction="none"
        )
        found = objective.model(tokens=rows.tokens, used=rows.used)
        last = objective.model.next_logits(rows.tokens)
    torch.testing.assert_close(found, expected.view(4, -1).sum(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(last, logits[:, -1], rtol=0, atol=1e-6)
    others = {name: t for name, t in objective.model.state_dict().items() if not name.startswith("llm.")}
    written = load_file(folder / "multimodal.safetensors")
    assert (
        written.keys()
        == others.keys()
        > {"start_image", "end_image", "connector.0.linear.weight", "vision.0.proj"}
    )
    assert all(torch.equal(written[name], others[name]) for name in others)

    from pretrain.build.tokenizer import stage_tokenizer

    tokenizer = stage_tokenizer(stage)
    peer_tokenizer = AutoTokenizer.from_pretrained(folder)
    for caption in CAPTIONS:
        assert peer_tokenizer(caption).input_ids == [tokenizer.start_id, *tokenizer.encode(caption)]
    assert peer_tokenizer.pad_token_id == tokenizer.pad_id


def test_the_wrong_format_and_an_existing_folder_are_refused(tiny_runs: Path, tmp_path: Path) -> None:
    flip = str(tiny_runs / "runs" / "flip" / "main")
    with pytest.raises(UserError, match="--format open_clip"):
        export(flip, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "used").mkdir()
    with pytest.raises(UserError, match="already exists"):
        export(flip, "open_clip", tmp_path / "used")


def test_a_user_folder_beside_the_export_is_not_touched(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip = str(tiny_runs / "runs" / "flip" / "main")
    (tmp_path / "clip.tmp").mkdir()
    (tmp_path / "clip.tmp/notes.txt").write_text("keep me")
    with monkeypatch.context() as patch:
        patch.setattr(
            open_clip, "save_tensors", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        with pytest.raises(UserError, match="clip: cannot be written: No space left"):
            export(flip, "open_clip", tmp_path / "clip")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.tmp"]
    export(flip, "open_clip", tmp_path / "clip")
    assert (tmp_path / "clip.tmp/notes.txt").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "clip.tmp"]
