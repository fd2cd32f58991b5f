"""The held-out figures of weights at an address, outside of training."""

from __future__ import annotations

from typing import Any

from pretrain.build.objective import load_trained, stage_tokenizer
from pretrain.evaluate.suite import ALONE, evaluate


def evaluate_weights(address: str, shuffle: bool = False) -> dict[str, Any]:
    """What the stage that made the weights asks for in `eval`; `shuffle` as in `suite.evaluate`.

    Raises UserError when the address is no stage of a run, or has not finished.
    """
    objective, stage = load_trained(address)
    return evaluate(objective, objective.model, stage, stage_tokenizer(stage), ALONE, shuffle=shuffle)
