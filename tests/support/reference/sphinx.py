"""SPHINX (Lin et al. 2023): next-token loss on text and on captioned images; held-out NLL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.support.reference import towers
from tests.support.reference.rows import END, PAD, START, Row, held_out_rows, recipe_rows, tokenizer


class Sphinx:
    """The rows of all steps, and the losses of given weights on them.

    `tower`: open_clip's parameters of the frozen vision transformer, by name (None: text only); `tower_settings`: its
    section of the recipe that trained it. A row is [start token][start_image][visual tokens][end_image][caption], where
    the visual tokens are Linear and LayerNorm of all tokens of the tower. Every token of the text but the first is a
    target, also the end token.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        stage: str,
        steps: int,
        tower: Mapping[str, Tensor] | None = None,
        tower_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe = recipe
        data = recipe["data"]
        with_images = [name for name in data if "image" in data[name]]
        self.main = (with_images or list(data))[0]
        self.rows = {name: recipe_rows(recipe, stage, name, steps) for name in data}
        self.weight = {name: recipe["objective"].get("weights", {}).get(name, 1.0) for name in data}
        self.tower, self.tower_settings = tower, tower_settings or {}
        self.llm = language_model(recipe["model"]["llm"])

    def losses(self, weights: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum over streams of the mean NLL per target of the global batch, and the means."""
        total, parts = torch.zeros((), dtype=torch.float64), {}
        for name, steps in self.rows.items():
            nll, targets = self.nll(weights, steps[step], self.recipe["data"][name])
            total = total + self.weight[name] * nll / targets
            parts[f"loss/{name}"] = float(nll.detach()) / targets
        return total, parts

    def figures(self, step: int) -> dict[str, float]:
        return {}

    def is_frozen(self, name: str) -> bool:
        return name.startswith("llm.") and "llm" in self.recipe["model"].get("freeze", [])

    def nll(
        self, weights: Mapping[str, Tensor], rows: list[Row], settings: Mapping[str, Any]
    ) -> tuple[Tensor, int]:
        """Summed NLL of all targets, row by row without padding, and their number."""
        total, targets = torch.zeros((), dtype=torch.float64), 0
        llm = {
            name.removeprefix("llm."): tensor for name, tensor in weights.items() if name.startswith("llm.")
        }
        for row in rows:
            ids = row.tokens[: row.used]
            text = llm["model.embed_tokens.weight"][torch.tensor(ids)]
            labels = [-1, *ids[1:]]
            if row.pixels is not None:
                visual = self.visual(weights, row, settings)
                text = torch.cat([text[:1], visual, text[1:]])
                labels = [-1] * (1 + len(visual)) + ids[1:]
            logits = functional_call(self.llm, llm, kwargs={"inputs_embeds": text[None]}).logits[0].double()
            for position, label in enumerate(labels[1:]):  # position i predicts token i + 1
                if label >= 0:
                    total = total - logits[position].log_softmax(0)[label]
                    targets += 1
        return total, targets

    def visual(self, weights: Mapping[str, Tensor], row: Row, settings: Mapping[str, Any]) -> Tensor:
        assert self.tower is not None
        with torch.no_grad():
            images = towers.normalised([row.pixels], settings["image"])
            tokens = towers.vision_tokens(images, self.tower, self.tower_settings)[0]
        projected = towers.norm(
            towers.linear(tokens, weights, "connector.0.linear"), weights, "connector.0.norm"
        )
        return torch.cat([weights["start_image"][0], projected, weights["end_image"][0]])

    def evaluate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        found = {}
        for name, task in self.recipe.get("eval", {}).get("perplexity", {}).items():
            settings = dict(self.recipe["data"][task["stream"]]) if "stream" in task else {}
            if "image" in settings:
                settings["image"] = {**settings["image"], "crop": (1.0, 1.0)}
            nll, targets = self.nll(weights, held_out_rows(settings, task["path"]), settings)
            found[f"perplexity/{name}/nll"] = float(nll) / targets
        return found


def language_model(llm: Mapping[str, Any]) -> Any:
    """transformers' model of the recipe's config in float64; the vocabulary is the tokenizer's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(llm["config"])
    specials = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    size = tokenizer(llm["tokenizer"]).get_vocab_size()
    config = AutoConfig.for_model(settings.pop("model_type"), vocab_size=size, **specials, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
