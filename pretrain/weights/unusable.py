"""Weights that cannot be averaged, recognised by tensor names, dtypes and shapes: adapters, codes, empty parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from data_pipeline.errors import UserError
from pretrain.weights.dtypes import FLOATS, TensorInfo


class Tensors(Protocol):
    """Anything with named tensors: a source or one file."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...


# Components of the names that peft, diffusers, kohya and OpenDelta give to parts of adapters.
ADAPTER = re.compile(
    r"(^|[._])(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector|up|down|mid)|base_layer|ia3_l|hada_w[12]_[ab]"
    r"|lokr_(w[12]|t2)(_[ab])?|loha_w[12]_[ab]|vera_lambda_[bd]|oft_[rR]|boft_[RS]|modules_to_save|original_module)"
    r"(\.|$)"
)
# Last components of the names of packed codes: GPTQ and AWQ, compressed-tensors, bitsandbytes, AQLM, QuIP#, HQQ, MXFP4.
CODES = re.compile(
    r"(^|\.)(qweight|qzeros|weight_packed|weight_zero_point|SCB|weight\.(absmax|quant_map|nested_absmax)|codes|Qidxs"
    r"|W_q|\w+_blocks)$"
)
CODE_DTYPES = (
    "U8",
    "I8",
    "I16",
    "I32",
    "U16",
    "U32",
)  # of packed codes; positions and other counters are I64
SCALES = re.compile(r"(^|\.)(weight_scale(_inv)?|weight_scales|SCB|scales|qzeros|weight\.absmax)$")
PARAMETER = re.compile(r"(^|\.)(weight|bias|kernel|embedding)$")
QUANTISED = "quantisation codes cannot be averaged; name the weights before quantisation"


def adapter_problem(tensors: Tensors) -> str | None:
    """What is wrong if the weights are an adapter, or a model whose adapter is not merged; None if they are neither."""
    found = [name for name in tensors.names() if ADAPTER.search(name)]
    if not found:
        return None
    whole = any("base_layer" in name or "modules_to_save" in name for name in found)
    what = "a model with an adapter that is not merged" if whole else "an adapter, or a model with one"
    return (
        f"{what} ({found[0]}{_more(found)}): the mean of its factors is not the mean of their products; merge the "
        "adapter into its model (peft: merge_and_unload), save that, then name it"
    )


def quantised_problem(tensors: Tensors) -> str | None:
    """What is wrong if a tensor holds packed codes; None if none does. Needs no quantization_config."""
    names = tensors.names()
    for name in names:
        dtype, shape = tensors.info(name)
        codes = dtype in CODE_DTYPES and (
            CODES.search(name) or (len(shape) > 1 and name.rpartition(".")[2] == "weight")
        )
        if codes:
            return f"{name} is {dtype}; {QUANTISED}"
        if dtype.startswith("F8_E8M0"):
            return f"{name} is {dtype}, a scale of block-wise codes; {QUANTISED}"
    if any(tensors.info(name)[0].startswith("F8") for name in names):
        scale = next((name for name in names if SCALES.search(name)), None)
        if scale is not None:
            return f"{scale} scales its 8-bit floats; {QUANTISED}"
    return None


def empty_problem(infos: Mapping[str, TensorInfo]) -> str | None:
    """What is wrong if parameters have shape [0]: a ZeRO-3 model that was saved without gathering them; else None."""
    empty = [name for name, (dtype, shape) in infos.items() if shape == (0,) and dtype in FLOATS]
    parameters = [name for name in empty if PARAMETER.search(name)] or (
        empty if len(empty) == len(infos) else []
    )
    if not parameters:
        return None
    return (
        f"{len(empty)} of {len(infos)} tensors are empty, such as {parameters[0]} of shape [0]: a ZeRO-3 model that "
        "was saved without gathering its parameters; name its DeepSpeed checkpoint, or save it again with "
        "stage3_gather_16bit_weights_on_model_save"
    )


def refuse_empty(address: str, tensors: Tensors) -> None:
    """Raises UserError if the parameters at `address` are empty."""
    if (problem := empty_problem({name: tensors.info(name) for name in tensors.names()})) is not None:
        raise UserError(f"{address}: {problem}")


def _more(found: list[str]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
