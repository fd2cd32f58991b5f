"""Limits on the failures of workers, and the errors and descriptions that all pools share."""

from __future__ import annotations

import time

from data_pipeline.activity import Activity, Sample
from data_pipeline.batches.work_items import BuilderSetup, WorkItem
from data_pipeline.errors import ReadError, WorkerError
from data_pipeline.workers.watchdog import Stall

POLL_SECONDS = 1.0  # between two checks of a process whose result is awaited
# Deaths per slice before its rows are rebuilt in isolation. One death proves nothing: the kernel, for example, kills
# workers when memory is short.
MAX_SLICE_DEATHS = 2
MAX_SLICE_STALLS = 2  # stalls per slice before an error is raised
MAX_SAMPLE_CRASHES = 2  # crashes in isolation before a sample counts as bad and is replaced
MAX_ROW_STALLS = 2  # stalls in isolation per row before an error is raised
MAX_ROW_DEATHS = 3  # other deaths in isolation per row before an error is raised


def startup_activity() -> Activity:
    """Activity of a process that starts now, used until the process reports that it is ready."""
    return Activity("its program files and the source indexes at start-up", time.monotonic())


def describe_sample(setups: list[BuilderSetup], sample: Sample) -> str:
    """A sample's index and shard URL, as text."""
    source, shard, index = sample
    for setup in setups:
        if source in setup.manifests:
            return f"sample {index} of {setup.manifests[source].url(shard)}"
    return f"sample {index} of shard {shard} of {source}"


def stall_error(item: WorkItem, stall: Stall) -> OSError:
    """The error for rows at which two processes stalled: ReadError for a read, WorkerError for a decode."""
    stalled = (
        f"{describe_rows(item)}: two workers, one after the other, stalled: {stall} "
        "(limit: loader.stall_error; in Python: StallLimits.error)"
    )
    if stall.is_read:
        return ReadError(f"{stalled}. No sample was replaced; run again once this can be read")
    return WorkerError(
        f"{stalled}. A time-out does not prove that a sample is bad, so no sample was replaced; inspect that sample, "
        "or raise the limit"
    )


def death_error(item: WorkItem, deaths: list[str]) -> WorkerError:
    """The error for a row whose processes died for another reason than a decoder crash."""
    return WorkerError(
        f"{describe_rows(item)}: {len(deaths)} loader processes died while building it alone ({', '.join(deaths)}). "
        "No sample was replaced. SIGKILL usually means out of memory: lower loader.workers, train.micro_batch or "
        "data.STREAM.image.max_pixels (in Python: workers, batch, ImageSpec.max_pixels), or request more memory"
    )


def describe_rows(item: WorkItem) -> str:
    """Step, rows and stream of an item, as text."""
    rows = f"row {item.start}" if item.stop == item.start + 1 else f"rows {item.start} to {item.stop - 1}"
    return f"step {item.step}, {rows} of stream {item.stream}"
