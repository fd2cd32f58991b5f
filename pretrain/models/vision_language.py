"""A language model that sees: encoder, projector, image delimiters, next-token loss, greedy decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.losses.language import next_token_nll, valid_targets
from pretrain.models.encoders.base import Encoder


class Projector(nn.Sequential):
    """Linear layer and LayerNorm from the width of the towers to that of the language model (SPHINX)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.LayerNorm(hidden))


class VisionLanguageModel(nn.Module):
    """SPHINX's language model: `[start token][start_image][visual tokens][end_image][text]`.

    Without an encoder it is a plain language model for text: it has no projector and no delimiters. An encoder without
    trainable parameters stays in eval mode and runs without gradients.
    """

    def __init__(self, llm: Any, encoder: Encoder | None) -> None:
        super().__init__()
        self.llm = llm  # Any: its methods are those of transformers, not of torch.nn.Module
        hidden = llm.config.hidden_size
        self.projector: Projector | None = None
        self.encoder = encoder
        if encoder is not None:
            self.vision = nn.ModuleList([encoder.module])
            self.projector = Projector(encoder.width, hidden)
            std = float(getattr(llm.config, "initializer_range", 0.02))
            self.start_image = nn.Parameter(torch.randn(1, 1, hidden) * std)
            self.end_image = nn.Parameter(torch.randn(1, 1, hidden) * std)

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """As nn.Module, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.encoder is not None and not self._trains_vision():
            self.encoder.module.eval()
        return self

    def _trains_vision(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision.parameters())

    def visual_tokens(self, images: Tensor) -> Tensor:
        """Normalised images `[rows, 3, size, size]` -> the encoder's tokens `[rows, visual, width]`."""
        assert self.encoder is not None, "images need a model with an encoder"
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains_vision()):
            return self.encoder.tokens(images)

    def embed(self, tokens: Tensor, features: Tensor | None) -> Tensor:
        """Input embeddings `[rows, length, hidden]`; with `features`, `[rows, length + visual + 2, hidden]`.

        The visual tokens and their two delimiters come after the start token.
        """
        text = self.llm.get_input_embeddings()(tokens)
        if features is None:
            return text
        assert self.projector is not None, "visual tokens need a model with an encoder"
        rows = len(tokens)
        # Cast to the language model's dtype: fp32 features would promote the whole sequence to fp32.
        visual = self.projector(features.to(text.dtype))
        delimiters = self.start_image.to(text.dtype), self.end_image.to(text.dtype)
        first, last = (part.expand(rows, -1, -1) for part in delimiters)
        return torch.cat([text[:, :1], first, visual, last, text[:, 1:]], dim=1)

    def forward(self, tokens: Tensor, used: Tensor, images: Tensor | None = None) -> Tensor:
        """Summed negative log-likelihood of each row's tokens after the first, fp32 `[rows]`, in nats.

        `tokens`: int64 `[rows, length]`; `used`: int64 `[rows]`, tokens before padding; `images`: normalised
        `[rows, 3, size, size]`. Padding is at the end of a row, so the causal mask hides it from all other tokens and
        no attention mask is needed.
        """
        features = None if images is None else self.visual_tokens(images)
        hidden = self._hidden(self.embed(tokens, features))
        prefix = 0 if features is None else features.shape[1] + 2
        length = tokens.shape[1]
        logits = self.llm.get_output_embeddings()(hidden[:, prefix : prefix + length - 1])
        return next_token_nll(logits, tokens[:, 1:], valid_targets(used, length))

    def next_logits(self, tokens: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits `[rows, vocabulary]` of the token after the last one; rows must have no padding."""
        return self.llm.get_output_embeddings()(self._hidden(self.embed(tokens, features))[:, -1])

    def _hidden(self, embedded: Tensor) -> Tensor:
        out: Any = self.llm.base_model(inputs_embeds=embedded, use_cache=False)
        return out.last_hidden_state


def new_llm(config: dict[str, Any], vocabulary: int, specials: dict[str, int]) -> nn.Module:
    """A new fp32 language model from a transformers config, initialised from torch's global random generator.

    vocabulary: number of tokens; specials: token ids such as pad_token_id. `config` overrides both.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": vocabulary, **specials, **config}
    kind = settings.pop("model_type")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)


def greedy_captions(
    model: VisionLanguageModel, start: int, end: int, images: Tensor, max_tokens: int
) -> list[list[int]]:
    """Greedy captions of normalised images, at most `max_tokens` tokens each, without start and end tokens.

    `start` and `end`: token ids.
    """
    with torch.no_grad():
        features = model.visual_tokens(images)
    rows = len(features)
    tokens = torch.full((rows, 1), start, dtype=torch.long, device=features.device)
    done = torch.zeros(rows, dtype=torch.bool, device=features.device)
    with torch.no_grad():
        for _ in range(max_tokens):
            following = model.next_logits(tokens, features).argmax(dim=-1)
            following = torch.where(done, torch.full_like(following, end), following)
            tokens = torch.cat([tokens, following[:, None]], dim=1)
            done |= following == end
            if bool(done.all()):
                break
    captions = []
    for row in tokens[:, 1:].tolist():
        captions.append(row[: row.index(end)] if end in row else row)
    return captions
