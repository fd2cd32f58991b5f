"""Opens the inputs of a request; refuses quantised ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import letter
from pretrain.weights.companions import read_config
from pretrain.weights.source import WeightSource, open_weights

CODES = ("U8", "I8", "I16", "I32")
"""dtypes of packed codes; positions and other counters are I64"""


@dataclass(frozen=True)
class OpenedInputs:
    """The sources of a merge: its inputs first, then whatever else it names.

    named: as it was written -> index. notes: what the plan should say of the sources.
    """

    sources: list[WeightSource]
    inputs: int
    named: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_inputs(
    inputs: Sequence[str], others: Sequence[str | None] = (), run_dir: Path | None = None
) -> OpenedInputs:
    """Open every address; each of `others` may be one of the inputs, their letter (A, B, ...), or another address."""
    addresses, named = list(inputs), {}
    for other in others:
        if other is None:
            continue
        number = ord(other) - ord("A") if len(other) == 1 else -1
        if other not in addresses and 0 <= number < len(inputs):
            named[other] = number
            continue
        if 0 <= number < 26 and other not in addresses and not Path(other).exists():
            last = letter(len(inputs) - 1)
            raise UserError(
                f"{other}: no such input; they are A to {last}, and there is nothing of that name"
            )
        if other not in addresses:
            addresses.append(other)
        named[other] = addresses.index(other)
    return OpenedInputs([open_weights(address, run_dir) for address in addresses], len(inputs), named)


def quantised(source: WeightSource) -> str | None:
    """What is quantised in a source, in words: its config says how, and a tensor of codes shows it; else None.

    A config alone is not enough: weights that were brought back to 16 bits often keep it.
    """
    config = read_config(source.companions)
    said = config.get("quantization_config") if config is not None else None
    if not isinstance(said, dict):
        return None
    for name in source.names():
        dtype = source.info(name)[0]
        if dtype in CODES or dtype.startswith(("F8", "F6", "F4")):
            return f"{source.address}: quantised ({said.get('quant_method', 'by its config')}): {name} is {dtype}"
    return None


def quantised_inputs(sources: Sequence[WeightSource]) -> list[str]:
    """One line for every source that cannot be mixed because it is quantised."""
    advice = (
        "a mean of codes is no model; name the weights before quantisation, or bring them back to 16 bits"
    )
    return [f"{found}; {advice}" for source in sources if (found := quantised(source)) is not None]
