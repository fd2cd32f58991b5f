"""FLIP (Li et al. 2023): symmetric InfoNCE of masked images and captions over the global batch; zero-shot accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import draws, towers
from tests.support.reference.rows import Row, held_out_rows, recipe_rows, token_row

MAX_SCALE = 100.0
FROZEN = {
    "vision": ("visual.",),
    "text": ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection"),
}


class Flip:
    """The rows of all steps, and the losses of given weights on them."""

    def __init__(self, recipe: dict[str, Any], stage: str, steps: int) -> None:
        self.recipe = recipe
        (self.stream,) = recipe["data"]
        self.main = self.stream
        self.rows: dict[str, list[list[Row]]] = {self.stream: recipe_rows(recipe, stage, self.stream, steps)}
        self.settings = recipe["data"][self.stream]
        self.tower, self.text = recipe["model"]["vision"], recipe["model"]["text"]
        self.mask = recipe["objective"].get("image_mask", 0.0)

    def losses(self, weights: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of the step and its parts."""
        rows = self.rows[self.stream][step]
        images = towers.normalised([row.pixels for row in rows], self.settings["image"])
        patches = (self.settings["image"]["size"] // self.tower["patch"]) ** 2
        keep = [draws.kept_patches(row.key, patches, self.mask) for row in rows]
        image = towers.image_features(images, weights, self.tower, keep)
        text = towers.text_features([row.tokens for row in rows], weights, self.text)
        loss = contrastive(image, text, weights["logit_scale"], [row.sample for row in rows])
        return loss, {f"loss/{self.stream}": float(loss.detach())}

    def figures(self, step: int) -> dict[str, float]:
        """Equal captions cannot be told apart: the mean over rows of ln(rows with the same tokens)."""
        rows = self.rows[self.stream][step]
        counts = Counter(tuple(row.tokens) for row in rows)
        return {"loss_floor": sum(math.log(counts[tuple(row.tokens)]) for row in rows) / len(rows)}

    def is_frozen(self, name: str) -> bool:
        """Names of `model.freeze`; sine and cosine position embeddings are fixed."""
        if name == "visual.positional_embedding" and self.tower.get("positions") == "sincos":
            return True
        parts = self.recipe["model"].get("freeze", [])
        return name.startswith(tuple(prefix for part in parts for prefix in FROZEN[part]))

    def evaluate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        tasks = self.recipe.get("eval", {}).get("zero_shot", {})
        return {f"zero_shot/{name}/top1": self.accuracy(weights, task) for name, task in tasks.items()}

    def accuracy(self, weights: Mapping[str, Tensor], task: dict[str, Any]) -> float:
        """Share of the held-out images that are nearest to their class's mean prompt (Radford et al. 2021, 3.1)."""
        text, classes = self.settings["text"], []
        for name in task["classes"].values():
            prompts = [
                token_row(text["tokenizer"], template.format(name), text["length"])[0]
                for template in task["templates"]
            ]
            classes.append(towers.unit(towers.text_features(prompts, weights, self.text).mean(0)))
        held_out = held_out_rows(
            {**self.settings, "image": {**self.settings["image"], "crop": (1.0, 1.0)}}, task["path"]
        )
        images = towers.normalised([row.pixels for row in held_out], self.settings["image"])
        features = towers.image_features(images, weights, self.tower, None)
        similarity = features @ torch.stack(classes).T
        best, second = similarity.topk(2, dim=1).values.T
        assert (best - second).min() > 1e-5, "a choice that float32 may decide otherwise; change the data"
        predicted = similarity.argmax(1).tolist()
        labels = [list(task["classes"]).index(row.fields[task.get("label", "label")]) for row in held_out]
        return sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)


def contrastive(image: Tensor, text: Tensor, log_scale: Tensor, samples: list[Any]) -> Tensor:
    """Mean over rows of the two cross-entropies, row by row; other rows with the same sample are no negatives."""
    scale = log_scale.reshape(()).clamp(0, math.log(MAX_SCALE)).exp()
    logits = scale * image @ text.T
    total = logits.new_zeros(())
    for row, sample in enumerate(samples):
        rivals = [other for other in range(len(samples)) if other == row or samples[other] != sample]
        of_image, of_text = logits[row, rivals], logits[rivals, row]
        total = total + (of_image.logsumexp(0) + of_text.logsumexp(0)) / 2 - logits[row, row]
    return total / len(samples)
