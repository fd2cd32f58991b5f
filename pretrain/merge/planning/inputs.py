"""Opens the inputs of a request, and detects quantised ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import letter
from pretrain.weights.companions import read_config
from pretrain.weights.renamed import described, renamings
from pretrain.weights.source import WeightSource, open_weights
from pretrain.weights.unusable import CODE_DTYPES, QUANTISED, adapter_problem, quantised_problem

# Buffers that models compute when they are built; older versions of transformers stored them, newer ones do not.
RECOMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|rope\.freqs|embeddings\.position_ids"
    r"|attn\.masked_bias|attention\.masked_bias)$"
)
LEFT_OUT = "not in all inputs, left out: a model computes it when it is built"


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
    inputs: Sequence[str],
    others: Sequence[str | None] = (),
    run_dir: Path | None = None,
    key: str | None = None,
    main: str | None = None,
) -> OpenedInputs:
    """Open every address. Each of `others` is the address or letter (A, B, ...) of an input, or another address.

    key:  of the state dict to read in torch files (pretrain.weights.source.open_weights).
    main: the one of `others` that gives the config, and so the names of the tensors; default: the first input.
    """
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
    sources = open_all(addresses, run_dir, key)
    refuse_adapters(sources)
    align_names(sources, named[main] if main is not None else 0)
    return OpenedInputs(sources, len(inputs), named)


def open_all(addresses: Sequence[str], run_dir: Path | None, key: str | None) -> list[WeightSource]:
    """Open every address. Raises UserError if `key` is given and none of them is a torch file."""
    sources = [open_weights(address, run_dir, key) for address in addresses]
    if key is not None and all(source.key is None for source in sources):
        raise UserError(
            f"--key {key}: chooses a state dict in a torch file (.pt, .pth, .bin), but none of the inputs is one; "
            "leave it out"
        )
    return sources


def align_names(sources: Sequence[WeightSource], reference: int) -> None:
    """Read every source under the tensor names of sources[reference], whose config the output has."""
    for source in sources:
        if source is not sources[reference] and (renamed := renamings(source, sources[reference])):
            source.rename(renamed)
            source.reading.append(
                f"{source.address}: {described(renamed)}, as in {sources[reference].address}"
            )


def refuse_adapters(sources: Sequence[WeightSource]) -> None:
    """Raises UserError for sources that are adapters, or hold adapters that are not merged."""
    problems = [(source, adapter_problem(source)) for source in sources]
    if lines := [f"{source.address}: {problem}" for source, problem in problems if problem is not None]:
        raise UserError("\n".join(lines))


def quantised(source: WeightSource) -> str | None:
    """What is wrong with a quantised source; None if it is not quantised.

    Codes are recognised by the names and dtypes of their tensors. A quantization_config alone is not enough, because
    weights that were converted back to 16 bits often keep it; it makes any tensor of a code's dtype count.
    """
    config = read_config(source.companions)
    settings = config.get("quantization_config") if config is not None else None
    if (problem := quantised_problem(source)) is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        return f"{source.address}: quantised{f' ({method})' if method else ''}: {problem}"
    if not isinstance(settings, dict):
        return None
    for name in source.names():
        dtype = source.info(name)[0]
        if dtype in CODE_DTYPES or dtype.startswith(("F8", "F6", "F4")):
            method = settings.get("quant_method", "by its config")
            return f"{source.address}: quantised ({method}): {name} is {dtype}; {QUANTISED}"
    return None


def quantised_inputs(sources: Sequence[WeightSource]) -> list[str]:
    """One error line per quantised source; quantised weights cannot be mixed."""
    return [problem for source in sources if (problem := quantised(source)) is not None]
