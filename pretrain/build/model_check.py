"""What only the model of a stage tells, from a model without numbers: for `dromos recipe check --model`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from pretrain.build.freezing import check_streams_train, training_table
from pretrain.build.module_weights import compare
from pretrain.build.objective import build
from pretrain.recipe.schema import TrainStage
from pretrain.weights.source import open_weights


def check_model(stage: TrainStage, name: str, run_dir: Path, peak: float) -> Iterator[str]:
    """Build the model of stage `name` on the meta device, yield the table of what trains, and then check `init`.

    Reads the tokenizer and, of the weights of `init`, names and shapes; no data, no other weights. `peak` is the peak
    learning rate. Raises UserError for an expression that matches nothing, a group without effect, a stream without a
    trained parameter, and weights that do not fit; StageNotReady where a stage that it needs has not run.
    """
    with torch.device("meta"):
        objective, _, pretrained = build(stage, name, 0, run_dir)
    check_streams_train(objective, stage)
    yield from training_table(objective, stage, peak)
    if stage.init is not None:
        weights = open_weights(stage.init, run_dir)
        shapes = {tensor: tuple(weights.info(tensor)[1]) for tensor in weights.names()}
        own = {name: tuple(t.shape) for name, t in objective.model.state_dict().items() if name in pretrained}
        if any(shapes.get(name) != shape for name, shape in own.items()):
            # What the model has from elsewhere, such as model.vision.init, is not taken from `init` then.
            shapes = {tensor: shape for tensor, shape in shapes.items() if tensor not in own}
        compare(objective.model, shapes, stage.init, stage.init_allow or [])
