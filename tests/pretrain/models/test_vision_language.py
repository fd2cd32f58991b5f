"""The language model with images against transformers' own forward, row by row, without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.connectors.projector import Projector
from pretrain.models.encoders.open_clip_vit import OpenClipVit
from pretrain.models.language_models import causal_model
from pretrain.models.vision_language import VisionLanguageModel, greedy_captions
from tests.support.tiny_models import LENGTH, LLAMA, ROWS, clip, multimodal, pictures, sentences

USED = [3, 4, 5, 6, 7]


def visual(rows: int = ROWS, tokens: int = 3, width: int = 16) -> Tensor:
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(4)).double()


def by_hand(model: VisionLanguageModel, ids: list[int], seen: Tensor | None) -> Tensor:
    """Embeddings of one row: start token, image between its delimiters, the other tokens."""
    table = model.llm.get_input_embeddings().weight
    words = [table[token] for token in ids]
    if seen is None:
        return torch.stack(words)
    linear, norm = model.connector[0].linear, model.connector[0].norm
    image = []
    for token in seen:
        x = linear.weight @ token + linear.bias
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        image.append(x * norm.weight + norm.bias)
    start, end = model.start_image.flatten(), model.end_image.flatten()
    return torch.stack([words[0], start, *image, end, *words[1:]])


def plain_nll(model: VisionLanguageModel, ids: list[int], seen: Tensor | None) -> float:
    """One forward of the language model per token: nothing later can have an influence."""
    total = 0.0
    for position in range(1, len(ids)):
        logits = model.llm(inputs_embeds=by_hand(model, ids[:position], seen)[None]).logits[0, -1]
        total -= F.log_softmax(logits, 0)[ids[position]].item()
    return total


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_a_row_s_nll_is_that_of_its_tokens_one_after_the_other(images: bool, tied: bool) -> None:
    model = multimodal(tie_word_embeddings=tied)
    seen = visual() if images else None
    with torch.no_grad():
        found = model(tokens=sentences(), used=torch.tensor(USED), images=seen)
        expected = [
            plain_nll(model, sentences()[row, : USED[row]].tolist(), seen[row] if seen is not None else None)
            for row in range(ROWS)
        ]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_padding_and_columns_of_padding_change_nothing() -> None:
    model = multimodal()
    used = torch.tensor([3, 4, 5, 2, 3])
    with torch.no_grad():
        whole = model(tokens=sentences(), used=used, images=visual())
        cut = model(tokens=sentences()[:, :5], used=used, images=visual())
        noisy = sentences()
        noisy[torch.arange(LENGTH)[None, :] >= used[:, None]] = 9
        changed = model(tokens=noisy, used=used, images=visual())
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(changed, whole, rtol=1e-6, atol=0)


def test_rows_are_independent_and_see_their_own_image() -> None:
    model = multimodal()
    tokens = sentences()[[4, 4, 4]]
    with torch.no_grad():
        together = model(tokens=tokens, used=torch.tensor([7, 7, 7]), images=visual(3))
        alone = [
            model(tokens=tokens[:1], used=torch.tensor([7]), images=visual(3)[n : n + 1]) for n in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)
    assert len({round(value, 4) for value in together.tolist()}) == 3


def test_every_part_gets_a_gradient_from_images_and_none_of_the_new_parts_from_text() -> None:
    for seen, reached in ((visual(), True), (None, False)):
        model = multimodal()
        model(tokens=sentences(), used=torch.tensor(USED), images=seen).sum().backward()
        for name, parameter in model.named_parameters():
            got = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert got == (reached or name.startswith("llm.")), name


def test_features_take_the_type_of_the_language_model() -> None:
    """fp32 features of a frozen tower must not turn the whole sequence into fp32; the losses are fp32."""
    model = multimodal().bfloat16()
    assert model.embed(sentences(), visual().float()).dtype == torch.bfloat16
    for delimiter in (model.start_image, model.end_image):
        delimiter.data = delimiter.data.float()
        assert model.embed(sentences(), visual()).dtype == torch.bfloat16
        delimiter.data = delimiter.data.bfloat16()
    found = model(tokens=sentences(), used=torch.tensor(USED), images=visual().float())
    assert found.dtype == torch.float32
    with torch.no_grad():
        exact = multimodal()(tokens=sentences(), used=torch.tensor(USED), images=visual())
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0.1)


def test_a_linear_connector_ends_with_a_layer_norm_if_it_is_asked_for() -> None:
    torch.manual_seed(3)
    plain = Projector(16, 24, norm=False).double()
    expected = visual() @ plain.linear.weight.T + plain.linear.bias
    torch.testing.assert_close(plain(visual()), expected, rtol=1e-12, atol=1e-12)
    out = Projector(16, 24, norm=True).double()(visual())
    assert out.shape == (ROWS, 3, 24)
    torch.testing.assert_close(out.mean(-1), torch.zeros(ROWS, 3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(out.var(-1, unbiased=False), torch.ones(ROWS, 3).double(), rtol=0, atol=1e-3)


def test_a_text_model_has_neither_connector_nor_delimiters() -> None:
    assert {name.split(".")[0] for name, _ in multimodal(None).named_parameters()} == {"llm"}
    names = {name.split(".")[0] for name, _ in multimodal().named_parameters()}
    assert names == {"llm", "connector", "start_image", "end_image"}


def test_a_new_model_has_the_vocabulary_and_the_ids_of_the_tokenizer_unless_its_config_says_otherwise() -> (
    None
):
    specials = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 4}
    model: Any = causal_model(LLAMA, 11, specials).module
    assert model.get_input_embeddings().weight.shape == (11, 24)
    assert {name: getattr(model.config, name) for name in specials} == specials
    other: Any = causal_model(LLAMA | {"vocab_size": 16, "pad_token_id": 3}, 11, specials).module
    assert (other.config.vocab_size, other.config.pad_token_id, other.config.bos_token_id) == (16, 3, 5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_greedy_captions_are_those_of_each_image_alone(limit: int) -> None:
    """Rows end at different lengths; what a row says after its end does not count."""
    model, images = multimodal(), visual(12)
    expected = []
    with torch.no_grad():
        for seen in images:
            ids = [1]
            while len(ids) <= limit:
                logits = model.llm(inputs_embeds=by_hand(model, ids, seen)[None]).logits[0, -1]
                ids.append(int(logits.argmax()))
                if ids[-1] == 2:
                    break
            expected.append([token for token in ids[1:] if token != 2])
        found = greedy_captions(model, 1, 2, images, limit)
    assert found == expected
    lengths = {len(caption) for caption in found}
    assert limit == 1 or len(lengths) > 1, lengths


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_stays_in_eval_mode_and_gets_no_gradient(frozen: bool) -> None:
    tower = clip({}).visual.requires_grad_(not frozen)
    model = multimodal(OpenClipVit(tower)).train()
    assert model.training
    assert model.llm.training
    assert {module.training for module in tower.modules()} == {not frozen}
    model(tokens=sentences(), used=torch.tensor(USED), images=pictures()).sum().backward()
    reached = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert bool(reached) != frozen
    assert model.visual_tokens(pictures()).requires_grad != frozen
    with torch.no_grad():
        assert not model.visual_tokens(pictures()).requires_grad
    registered = dict(model.named_parameters())
    assert all(registered[f"vision.0.{name}"] is parameter for name, parameter in tower.named_parameters())
