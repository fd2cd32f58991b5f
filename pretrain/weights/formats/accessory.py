"""Checkpoints of LLaMA2-Accessory, SPHINX's own trainer, read as one model.

Every tensor-parallel rank writes one file, `consolidated.NN-of-MM.model.pth`.
"""

from __future__ import annotations

import re

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import elements
from pretrain.weights.folder import Folder
from pretrain.weights.formats.chunked_tensor import ChunkedTensor, ChunkedTensors, Part
from pretrain.weights.formats.state_dict import select
from pretrain.weights.formats.torch_file import TorchFile
from pretrain.weights.formats.torch_tensor import Tensor

FILE = re.compile(r"consolidated\.(\d{2})-of-(\d{2})\.model\.pth")
# Dimension along which a rank holds its part: fairscale's ColumnParallelLinear and RowParallelLinear, and the
# embedding, whose width is split.
COLUMN = re.compile(r"(^|\.)(wq|wk|wv|w1|w3|output)\.(weight|bias)$")
ROW = re.compile(r"(^|\.)((wo|w2|tok_embeddings)\.weight)$")
COMPARED = 4096  # elements of a matrix that are compared to see that all ranks hold the same


def is_accessory(folder: Folder) -> bool:
    """True if LLaMA2-Accessory wrote this folder."""
    return any(FILE.fullmatch(name) for name in folder.names)


class AccessoryCheckpoint(ChunkedTensors):
    """The weights of all tensor-parallel ranks. Raises UserError if a rank's file is missing or does not fit."""

    def __init__(self, folder: Folder, key: str | None = None) -> None:
        found = {name: match for name in folder.names if (match := FILE.fullmatch(name))}
        count = max(int(match[2]) for match in found.values())
        names = [f"consolidated.{rank:02d}-of-{count:02d}.model.pth" for rank in range(count)]
        missing = [name for name in names if name not in found]
        if missing or len(found) != count:
            problem = f"{missing[0]} is missing" if missing else "files of several world sizes"
            raise UserError(f"{folder.url}: {problem}; copy the files of all ranks of one checkpoint")
        self.files: list[ByteFile] = [folder.open(name) for name in names]
        ranks = [select(TorchFile(file).content, key, file.name) for file in self.files]
        everything = dict.fromkeys(name for rank in ranks for name in rank)
        super().__init__(
            {
                name: _joined(folder.url, name, [rank[name] for rank in ranks if name in rank], count)
                for name in everything
            }
        )


def _joined(url: str, name: str, held: list[Tensor], count: int) -> ChunkedTensor:
    """The whole tensor from its parts in the order of the ranks; a replicated one from the first rank."""
    first = held[0]
    split = 0 if COLUMN.search(name) else 1 if ROW.search(name) else None
    if len(held) < count or count == 1 or split is None:  # of one rank (an expert), or the same on all ranks
        if len(held) > 1 and not all(_same(first, other) for other in held[1:]):
            raise UserError(
                f"{url}: {name} differs between the ranks, and this version does not know how it is split; save the "
                "checkpoint with a tensor-parallel size of 1"
            )
        return ChunkedTensor(first.dtype, first.shape, (_part(first, (0,) * len(first.shape)),))
    shapes = {(t.dtype, len(t.shape), t.shape[:split], t.shape[split + 1 :]) for t in held}
    if len(shapes) > 1 or len(first.shape) <= split:
        raise UserError(f"{url}: {name} has parts that do not fit together; copy the files of one checkpoint")
    parts, at = [], 0
    for tensor in held:
        parts.append(_part(tensor, tuple(at if d == split else 0 for d in range(len(tensor.shape)))))
        at += tensor.shape[split]
    shape = tuple(at if d == split else side for d, side in enumerate(first.shape))
    return ChunkedTensor(first.dtype, shape, tuple(parts))


def _part(tensor: Tensor, offsets: tuple[int, ...]) -> Part:
    return Part(offsets, tensor.shape, tensor.read)


def _same(a: Tensor, b: Tensor) -> bool:
    """True if shapes are equal and, for matrices, the first elements too; norms may drift apart by roundings."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    count = min(COMPARED, elements(a.shape)) if len(a.shape) > 1 else 0
    return bool(np.array_equal(a.read(0, count).view(np.uint8), b.read(0, count).view(np.uint8)))
