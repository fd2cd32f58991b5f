"""Copies the next micro-batch to the GPU while the current one is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch, device_rows, host_tensors, to_device
from pretrain.recipe.sections.data import Image

Tensors = dict[str, Tensor]


class AsyncCopies(Protocol):
    """Copies that run while the caller computes."""

    def begin(self, tensors: Tensors) -> Any:
        """Start to copy; returns a ticket for `finish`."""
        ...

    def finish(self, ticket: Any) -> Tensors:
        """The copied tensors; kernels launched after this call may read them."""
        ...


class PinnedCopies:
    """Copies to a GPU on a CUDA stream of their own, from pinned memory: a copy from pageable memory blocks the caller.

    PyTorch's allocators may reuse a freed block only after the streams that use it are done. The pinned allocator
    records the copy by itself; for device memory, `record_stream` must be called
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#use-pinned-memory-buffers).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, tensors: Tensors) -> tuple[Tensors, torch.cuda.Event]:
        with torch.cuda.stream(self._copy_stream):
            moved = {
                name: tensor.pin_memory().to(self._device, non_blocking=True)
                for name, tensor in tensors.items()
            }
            return moved, self._copy_stream.record_event()

    def finish(self, ticket: tuple[Tensors, torch.cuda.Event]) -> Tensors:
        moved, copied = ticket
        compute_stream = torch.cuda.current_stream(self._device)
        compute_stream.wait_event(copied)
        for tensor in moved.values():
            tensor.record_stream(compute_stream)
        return moved


def copies_for(device: torch.device) -> AsyncCopies | None:
    """Asynchronous copies to `device`; None for the CPU, where the batch already is."""
    return PinnedCopies(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class StagedBatches:
    """The rows of each micro-batch on `device`, in order; may be iterated several times.

    With `copies`, the copy of the next micro-batch starts before the current one is yielded. Only these two are on the
    device.
    """

    batches: Sequence[Batch]
    image: Image | None
    device: torch.device
    copies: AsyncCopies | None

    def __len__(self) -> int:
        return len(self.batches)

    def __contains__(self, item: object) -> bool:
        return False  # a Collection must have it; rows are made anew by each iteration

    def __iter__(self) -> Iterator[DeviceBatch]:
        if self.copies is None:
            for batch in self.batches:
                yield to_device(batch, self.image, self.device)
            return
        following = self.copies.begin(host_tensors(self.batches[0])) if self.batches else None
        for number, batch in enumerate(self.batches):
            ticket, following = following, None
            if number + 1 < len(self.batches):
                following = self.copies.begin(host_tensors(self.batches[number + 1]))
            yield device_rows(self.copies.finish(ticket), batch, self.image)
