"""A rank that dies of SIGKILL at its evaluation after a given step: line and checkpoint are written by then."""

from __future__ import annotations

import os
import signal
from typing import Any

from pretrain.train import main as entry
from pretrain.train.trainer import Trainer


def main(recipe: str, step: int) -> int:
    def killed(trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        evaluate_into(trainer, row)

    evaluate_into = Trainer.evaluate_into
    Trainer.evaluate_into = killed  # type: ignore[method-assign]
    return entry.main(recipe, "main")
