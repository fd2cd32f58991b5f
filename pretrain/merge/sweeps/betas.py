"""The betas of a sweep, as a person writes them and as folders are named after them."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from data_pipeline.errors import UserError


def parse_betas(text: str) -> list[float]:
    """`0:1:0.1` -> 0, 0.1, ... 1, both ends included; `0,0.25,1` -> as listed. Exact decimals, ascending."""
    try:
        if ":" not in text:
            listed = [Decimal(part) for part in text.split(",")]
            if any(beta.is_nan() for beta in listed):
                raise ValueError
            betas = set(listed)
        else:
            first, last, step = (Decimal(part) for part in text.split(":"))
            if not step.is_finite() or step <= 0 or not last >= first:
                raise UserError(
                    f"--betas {text}: START:STOP:STEP with a step above 0 and STOP not below START"
                )
            if (last - first) / step > 10_000:
                raise UserError(f"--betas {text}: more than 10000 betas; take a larger step")
            betas = {last} | {first + step * i for i in range(int((last - first) / step) + 1)}
    except (InvalidOperation, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--betas {text}: write START:STOP:STEP, such as 0:1:0.1, or a list, 0,0.5,1"
        ) from None
    wrong = [beta for beta in betas if not 0 <= beta <= 1]
    if wrong:
        raise UserError(f"--betas {text}: {wrong[0]} is not between 0 and 1")
    return [float(beta) for beta in sorted(betas)]


def folder_names(betas: Sequence[float]) -> list[str]:
    """`beta-0.30`: two decimals, more where a beta needs them to be told apart."""
    places = max(2, *(-int(Decimal(repr(beta)).normalize().as_tuple().exponent) for beta in betas))
    return [f"beta-{beta:.{places}f}" for beta in betas]
