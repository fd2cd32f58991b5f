"""Collectives: all_sum, all_rows, gather, broadcast from rank 0, barrier. With one process each is the identity."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place; returns `values`."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_rows(local: Tensor) -> Tensor:
    """Concatenate `[rows, ...]` of every rank to `[world_size * rows, ...]`, in rank order; not differentiable.

    Every rank must hold the same number of rows.
    """
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def gather(value: T) -> list[T]:
    """The values of all ranks in rank order, on every rank. Values are pickled. Also a barrier."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: T) -> T:
    """Rank 0's value on every rank, for example what it read from a shared folder that may change."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Wait until every rank has called it."""
    gather(None)
