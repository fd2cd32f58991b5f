"""One pass over a held-out source in manifest order, split over ranks; left-out samples are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import largest_share, rows_of
from data_pipeline.errors import UserError
from data_pipeline.storage.cache import CacheSettings
from pretrain.distributed.collectives import gather
from pretrain.distributed.engine import Runtime
from pretrain.objectives.device_batch import DeviceBatch, to_device
from pretrain.recipe.sections.data import Image

T = TypeVar("T")


class HeldOutError(UserError):
    """A held-out source cannot be evaluated; raised by every rank at the same place."""


def together(action: Callable[[], T]) -> T:
    """The result of `action`, which reads held-out data; collective.

    If it fails on any rank, every rank raises HeldOutError with the text of the first one: a rank that went on would
    wait for the failed one in its next collective.
    """
    cause: Exception | None = None
    try:
        result = action()
    except (OSError, UserError) as error:
        cause = error
    texts = [text for text in gather(_text(cause)) if text]
    if texts:
        raise HeldOutError(texts[0]) from cause
    return result


def _text(error: Exception | None) -> str | None:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or type(error).__name__}"
    return None if error is None else str(error) or type(error).__name__


def open_pass(spec: StreamSpec, cache: CacheSettings | None) -> EvaluationPass:
    """A pass over the held-out source of `spec`; collective. Raises HeldOutError, also if ranks see other samples."""
    own: list[EvaluationPass] = []

    def open_own() -> EvaluationPass:
        own.append(EvaluationPass(spec, cache=cache))
        return own[0]

    try:
        opened = together(open_own)
    except HeldOutError:  # this rank may have opened what another one cannot
        for each in own:
            each.close()
        raise
    samples = gather(opened.samples)
    if len(set(samples)) > 1:
        opened.close()
        raise HeldOutError(f"ranks see different numbers of samples: {', '.join(map(str, samples))}")
    return opened


def rank_slices(
    evaluation_pass: EvaluationPass, spec: StreamSpec, image: Image | None, runtime: Runtime
) -> Iterator[tuple[DeviceBatch, Batch]]:
    """This rank's slice of every batch, on the device and as the loader's Batch.

    Every rank gets the same number of slices, because the forwards of ZeRO-3 are collective, and dummy rows if another
    rank has more rows: a model need not compute a batch without rows. Raises HeldOutError.
    """
    start, stop = rows_of(runtime.rank, runtime.world_size, spec.largest)
    dummies = largest_share(runtime.world_size, spec.largest) - (stop - start)
    for number in range(len(evaluation_pass)):
        batch = together(partial(evaluation_pass.make, number, start, stop, dummies))
        yield to_device(batch, image, runtime.device), batch


def count_unusable(batch: Batch) -> int:
    """Number of samples of a held-out batch that were left out because of their content."""
    return sum(sum(reasons.values()) for reasons in batch.skipped.values())


def report_left_out(path: str, counted: float, left_out: float, runtime: Runtime) -> None:
    """Print on rank 0 how many samples were left out. Raises HeldOutError if nothing was `counted`."""
    if not counted:
        raise HeldOutError(
            f"eval: {path}: no usable sample ({left_out:.0f} unusable); inspect it with: dromos data show {path}"
        )
    if left_out and runtime.rank == 0:
        print(f"dromos: evaluation of {path}: {left_out:.0f} unusable samples were left out", flush=True)


def shuffled_images(rows: DeviceBatch) -> DeviceBatch:
    """The same captions, each with the image of another row: images are rolled by one among rows of weight > 0.

    If only one row has weight > 0, it keeps its image.
    """
    assert rows.images is not None
    order = torch.arange(len(rows), device=rows.weights.device)
    used_rows = torch.nonzero(rows.weights > 0)[:, 0]
    order[used_rows] = torch.roll(used_rows, 1)
    return replace(rows, fields={**rows.fields, "images": rows.fields["images"][order]})
