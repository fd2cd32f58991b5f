"""A language model that sees: encoder, connector, image delimiters, next-token loss, greedy decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.losses.language import next_token_nll, valid_targets
from pretrain.models.encoders.base import Encoder
from pretrain.models.language_models import LanguageModel


class VisionLanguageModel(nn.Module):
    """SPHINX's language model: `[start token][start_image][visual tokens][end_image][text]`.

    Without an encoder it is a plain language model for text: it has no connector and no delimiters. An encoder without
    trainable parameters stays in eval mode and runs without gradients.

    connector: module, visual tokens `[rows, n, encoder.width]` -> `[rows, n, language_model.width]`; with `encoder`
    """

    def __init__(
        self,
        language_model: LanguageModel,
        encoder: Encoder | None = None,
        connector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.llm = language_model.module
        self.encoder = encoder
        if encoder is not None:
            assert connector is not None, "visual tokens need a connector"
            self.vision = nn.ModuleList([encoder.module])
            self.connector = nn.ModuleList([connector])
            deviation, width = language_model.initial_deviation, language_model.width
            self.start_image = nn.Parameter(torch.randn(1, 1, width) * deviation)
            self.end_image = nn.Parameter(torch.randn(1, 1, width) * deviation)

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
        text = self.language_model.embed(tokens)
        if features is None:
            return text
        assert self.encoder is not None, "visual tokens need a model with an encoder"
        rows = len(tokens)
        # Cast to the language model's dtype: fp32 features would promote the whole sequence to fp32.
        visual = self.connector[0](features.to(text.dtype))
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
        hidden = self.language_model.hidden(self.embed(tokens, features))
        prefix = 0 if features is None else features.shape[1] + 2
        length = tokens.shape[1]
        logits = self.language_model.logits(hidden[:, prefix : prefix + length - 1])
        return next_token_nll(logits, tokens[:, 1:], valid_targets(used, length))

    def next_logits(self, tokens: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits `[rows, vocabulary]` of the token after the last one; rows must have no padding."""
        hidden = self.language_model.hidden(self.embed(tokens, features))
        return self.language_model.logits(hidden[:, -1])


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
