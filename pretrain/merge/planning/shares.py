"""Weights and densities of a merge's inputs, from what a person gives: resolved, or refused in their words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import BASED

SUMMED = ("task_arithmetic", "dare_linear")
"""methods with a base whose weights --normalize divides by their sum; the others divide entry by entry"""


def weights_of(
    count: int,
    method: str,
    beta: float | None,
    weights: Sequence[float] | None,
    t: float | None,
    normalize: bool,
) -> tuple[float, ...]:
    given = [
        name for name, value in (("--beta", beta), ("--weights", weights), ("--t", t)) if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"say how much of each input once, not with {' and '.join(given)}")
    if method == "soup":
        if given:
            raise UserError(
                f"--method soup takes every input alike; leave {given[0]} out, or take --method linear"
            )
        return (1.0 / count,) * count
    if method in BASED:
        if beta is not None:
            raise UserError(
                "--beta is for linear and slerp; write --weights with a factor for each difference"
            )
        factors = finite_weights(count, weights) if weights is not None else (1.0,) * count
        if normalize and method in SUMMED and abs(math.fsum(factors)) < 1e-8:
            raise UserError(
                f"--normalize divides by the sum of the weights, which is 0 for "
                f"{', '.join(f'{w:g}' for w in factors)}; leave it out, or write other --weights"
            )
        return factors
    if t is not None:
        if not 0 <= t <= 1:
            raise UserError(f"--t {t:g}: between 0 and 1, the share of the second input")
        return (1.0 - float(t), float(t))
    if weights is not None and not normalize:
        return finite_weights(count, weights)
    return resolve_weights(count, beta, weights)


def densities_of(count: int, density: float | Sequence[float] | None) -> tuple[float, ...]:
    listed = (
        [1.0 if density is None else float(density)] if not isinstance(density, Sequence) else list(density)
    )
    if len(listed) == 1:
        listed *= count
    if len(listed) != count:
        raise UserError(
            f"--density: {len(listed)} numbers for {count} inputs; write one for all, or one for each"
        )
    if not all(0 < value <= 1 for value in listed):
        raise UserError(f"--density {', '.join(f'{v:g}' for v in listed)}: above 0, up to 1")
    return tuple(float(value) for value in listed)


def finite_weights(count: int, weights: Sequence[float], where: str = "--weights") -> tuple[float, ...]:
    """One finite number for each input, as given."""
    if len(weights) != count:
        raise UserError(f"{where}: {len(weights)} weights for {count} inputs; write one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"{where}: weights {', '.join(f'{w:g}' for w in weights)}: finite numbers")
    return tuple(float(weight) for weight in weights)


def resolve_weights(count: int, beta: float | None, weights: Sequence[float] | None) -> tuple[float, ...]:
    """fp64 weights of `count` inputs: (beta, 1 - beta) for two, or shares divided by their sum.

    Shares that add up to 1 within 1e-9 are taken as they are.
    """
    if (beta is None) == (weights is None):
        raise UserError(
            "say how much of each input: --beta for two inputs, or --weights with one number for each "
            "(--method soup takes all alike)"
        )
    if beta is not None:
        if count != 2:
            raise UserError(
                f"--beta is for two inputs, here are {count}; write --weights with {count} numbers"
            )
        if not 0 <= beta <= 1:
            raise UserError(
                f"--beta {beta:g}: between 0 and 1; to extrapolate write --weights {beta:g},{1 - beta:g}"
            )
        return (float(beta), 1.0 - float(beta))
    shares = [float(weight) for weight in weights or ()]
    if len(shares) != count:
        raise UserError(f"{len(shares)} weights for {count} inputs; write one for each")
    return normalized(shares)


def normalized(shares: Sequence[float], where: str = "weights") -> tuple[float, ...]:
    """Shares divided by their sum; those that add up to 1 within 1e-9 as they are."""
    total = math.fsum(shares)
    if not all(math.isfinite(share) for share in shares) or abs(total) < 1e-9:
        raise UserError(f"{where} {', '.join(f'{s:g}' for s in shares)}: finite numbers whose sum is not 0")
    return tuple(shares) if abs(total - 1) <= 1e-9 else tuple(share / total for share in shares)
