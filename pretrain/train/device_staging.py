"""Micro-batches on the device, each copied there while the one before it is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch, device_rows, host_tensors, to_device
from pretrain.recipe.data import Image

Tensors = dict[str, Tensor]


class Copies(Protocol):
    """Copies that go on while the caller does other things."""

    def begin(self, tensors: Tensors) -> Any:
        """Start to copy; a ticket."""
        ...

    def finish(self, ticket: Any) -> Tensors:
        """The copies, which whatever is launched from now on may read."""
        ...


class PinnedCopies:
    """Copies to a GPU on a stream of their own.

    Through page-locked memory, without which a copy holds up the caller. PyTorch's allocators keep a block, on either
    side, until the streams that use it have passed: the copy itself says so of the pinned side, `record_stream` of the
    device side (https://docs.pytorch.org/docs/stable/notes/cuda.html#use-pinned-memory-buffers).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, tensors: Tensors) -> tuple[Tensors, Any]:
        with torch.cuda.stream(self._side):
            moved = {
                name: tensor.pin_memory().to(self._device, non_blocking=True)
                for name, tensor in tensors.items()
            }
            return moved, self._side.record_event()

    def finish(self, ticket: tuple[Tensors, Any]) -> Tensors:
        moved, done = ticket
        now = torch.cuda.current_stream(self._device)
        now.wait_event(done)
        for tensor in moved.values():
            tensor.record_stream(now)
        return moved


def copies_for(device: torch.device) -> Copies | None:
    """How batches get to `device` beside the computation; None where they are in its memory already."""
    return PinnedCopies(device) if device.type == "cuda" else None


def staged(
    batches: Sequence[Batch], image: Image | None, device: torch.device, copies: Copies | None
) -> Iterator[DeviceBatch]:
    """The rows of each micro-batch, in order; with `copies`, the next is on its way before one is handed out."""
    if copies is None:
        for batch in batches:
            yield to_device(batch, image, device)
        return
    ahead = copies.begin(host_tensors(batches[0])) if batches else None
    for number, batch in enumerate(batches):
        ticket, ahead = ahead, None
        if number + 1 < len(batches):
            ahead = copies.begin(host_tensors(batches[number + 1]))
        yield device_rows(copies.finish(ticket), batch, image)
