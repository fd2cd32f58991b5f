"""Updates of every ZeRO stage and dtype against torch's AdamW on fp32 weights, also after `continue:` changed its options.

Gradients are exact in bf16 (adamw_ranks.py), so that weights and moments agree to the rounding of fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import adamw_ranks as toy
from tests.support.reference.weights import load, stage_3, stages_1_and_2

pytestmark = pytest.mark.dist
JOBS = [(zero, dtype) for zero in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
WORLD = 2
Values = dict[str, dict[str, Tensor]]  # name of the parameter -> fp32 weights and moments


@pytest.fixture(scope="module")
def root(ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adamw")
    jobs = [(*job, str(folder / "-".join(map(str, job)))) for job in JOBS]
    ranks("tests.dist.adamw_ranks", jobs, WORLD, folder)
    return folder


def reference(dtype: str) -> list[Values]:
    """After each step: torch's AdamW in one process, on the sum of the ranks' gradients, clipped."""
    model = toy.Sums()
    if dtype == "bf16":  # the fp32 weights start as those of the model
        model.to(torch.bfloat16).float()
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    found = []
    for step in range(2 * toy.STEPS):
        options = toy.FIRST if step < toy.STEPS else toy.SECOND
        for group, decay in zip(optimizer.param_groups, (options.weight_decay, 0.0), strict=True):
            group |= {"lr": toy.rate(step), "betas": options.betas, "eps": options.eps, "weight_decay": decay}
        pairs = [pair for rank in range(WORLD) for pair in toy.inputs(step, rank)]
        model.weight.grad, model.bias.grad = (
            torch.stack([pair[number] for pair in pairs]).sum(0).float() for number in (0, 1)
        )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        assert norm > 2 * options.clip  # so that the limit matters
        optimizer.step()
        found.append(
            {
                name: {"weights": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state[p].items()}}
                for name, p in model.named_parameters()
            }
        )
    return found


def saved(folder: Path, zero: int, dtype: str) -> Values:
    """fp32 weights and moments in a checkpoint."""
    model = load(min(folder.glob("*model_states.pt")))
    found: Values = {"weight": {}, "bias": {}}
    if zero == 0:
        state: dict[str, Any] = model["optimizer"]
        weights = [model["module"]["weight"], model["module"]["bias"]]
        if dtype == "bf16":
            weights = [tensor.detach() for group in state["fp32_groups"] for tensor in group]
            state = state["optimizer_state_dict"]
        for number, name in enumerate(found):
            found[name] = {"weights": weights[number], **state["state"][number]}
        return found
    ranks = [load(path)["optimizer_state_dict"] for path in sorted(folder.glob("*_optim_states.pt"))]
    is_3 = zero == 3
    flat = [rank["fp32_flat_groups" if is_3 else "single_partition_of_fp32_groups"] for rank in ranks]
    base = [rank["optimizer_state_dict" if is_3 else "base_optimizer_state"]["state"] for rank in ranks]
    states = [
        {number: {**state[number], "weights": weights[number].detach()} for number in range(2)}
        for state, weights in zip(base, flat, strict=True)
    ]
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        into: dict[str, Tensor] = {}
        (stage_3 if is_3 else stages_1_and_2)(groups, states, key, into)
        for name, tensor in into.items():
            found[name][key] = tensor
    return found


@pytest.mark.parametrize(("zero", "dtype"), JOBS)
def test_every_update_is_that_of_adamw_with_the_options_of_the_recipe(
    root: Path, zero: int, dtype: str
) -> None:
    for step, expected in enumerate(reference(dtype)):
        found = saved(root / f"{zero}-{dtype}" / f"step-{step}", zero, dtype)
        for name, values in expected.items():
            for key in ("weights", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    found[name][key],
                    values[key],
                    rtol=1e-5,
                    atol=1e-7,
                    msg=lambda text: f"{name} {key}, step {step}: {text}",
                )
