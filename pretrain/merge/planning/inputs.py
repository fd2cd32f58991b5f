"""Opens the inputs of a request, and detects quantised ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import letter
from pretrain.weights.companions import read_config
from pretrain.weights.source import WeightSource, open_weights

# Dtypes of packed quantisation codes. Positions and other counters are I64.
CODE_DTYPES = ("U8", "I8", "I16", "I32")


@dataclass(frozen=True)
class OpenedInputs:
    """The sources of a merge: first its inputs, then the base and other named models.

    inputs: number of inputs.
    named:  address or letter of another model, as written -> index into `sources`.
    notes:  about the sources, for the plan.
    """

    sources: list[WeightSource]
    inputs: int
    named: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_inputs(
    inputs: Sequence[str], others: Sequence[str | None] = (), run_dir: Path | None = None
) -> OpenedInputs:
    """Open every address. Each of `others` is the address or letter (A, B, ...) of an input, or another address."""
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
            raise UserError(f"{other}: no such input; the inputs are A to {last}, and no file has this name")
        if other not in addresses:
            addresses.append(other)
        named[other] = addresses.index(other)
    return OpenedInputs([open_weights(address, run_dir) for address in addresses], len(inputs), named)


def quantised(source: WeightSource) -> str | None:
    """A description of the quantisation of a source; None if it is not quantised.

    Requires both a quantization_config and a tensor of codes, because weights that were converted back to 16 bits
    often keep the config.
    """
    config = read_config(source.companions)
    settings = config.get("quantization_config") if config is not None else None
    if not isinstance(settings, dict):
        return None
    for name in source.names():
        dtype = source.info(name)[0]
        if dtype in CODE_DTYPES or dtype.startswith(("F8", "F6", "F4")):
            return f"{source.address}: quantised ({settings.get('quant_method', 'by its config')}): {name} is {dtype}"
    return None


def quantised_inputs(sources: Sequence[WeightSource]) -> list[str]:
    """One error line per quantised source; quantised weights cannot be mixed."""
    advice = "quantisation codes cannot be averaged; name the weights before quantisation, or convert them to 16 bits"
    return [
        f"{description}; {advice}" for source in sources if (description := quantised(source)) is not None
    ]
