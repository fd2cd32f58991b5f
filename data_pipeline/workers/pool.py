"""`Pool`: the protocol of the thread pool, the process pool and the Ray pool."""

from __future__ import annotations

from typing import Protocol

from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import WorkItem


class Pool(Protocol):
    """Builds work items in the background. `ahead`: number of steps after the current one for which to submit items."""

    ahead: int

    def submit(self, item: WorkItem, slices: int = 1) -> int:
        """Start to build an item, in at most `slices` slices in parallel. Returns a ticket for its batch."""
        ...

    def result(self, ticket: int) -> Batch:
        """Wait for a batch. Raises the error that building it raised."""
        ...

    def cancel(self) -> None:
        """Drop all tickets."""
        ...

    def close(self) -> None:
        """Cancel and stop all processes and threads."""
        ...
