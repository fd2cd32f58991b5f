"""Models whose stored numbers are quantised: a mean of codes and a mean of scales is no model, so they are refused."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.weights.companions import read_config
from pretrain.weights.source import WeightSource

CODES = ("U8", "I8", "I16", "I32")
"""dtypes of packed codes; positions and other counters are I64"""


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
