"""The linear merge of bf16 tensors in one pass, by a small compiled function; numpy's passes give the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from data_pipeline.compiled import function
from pretrain.merge.blocks import Block
from pretrain.merge.plan import TensorJob
from pretrain.merge.sources import WeightSource

WIDER = 4
"""times the elements of a block that numpy's passes work on: nothing but the result is held, and writes are dearer
than the arithmetic (four times 128 KiB: 0.5 s where 128 KiB take 0.85 s; sixteen times take 1.5 s)"""


@cache
def kernel() -> Any:
    """The function of linear.c, or None."""
    found = function(__file__, "_linear", "dromos_linear_bf16")
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p]
        found.restype = None
    return found


def takes(job: TensorJob, sources: Sequence[WeightSource]) -> bool:
    """Whether `linear` computes this job: bf16 from bf16, and the function was built."""
    if job.method != "linear" or job.dtype != "BF16" or kernel() is None:
        return False
    return all(sources[term.source].info(term.name)[0] == "BF16" for term in job.terms)


def linear(job: TensorJob, block: Block, out: np.ndarray) -> bool:
    """The block's elements of `job`, as stored, into `out`; False where it does not take the job."""
    if not takes(job, block.sources):
        return False
    stored = [block.stored(term) for term in job.terms]
    if not all(one.flags.c_contiguous for one in (*stored, out)):
        return False
    places = (ctypes.c_void_p * len(stored))(*(one.ctypes.data for one in stored))
    weights = np.array([term.weight for term in job.terms], np.float64).astype(np.float32)
    kernel()(places, weights.ctypes.data, len(stored), len(out), out.ctypes.data)
    return True
