"""Staging of micro-batches: the same rows in order; the next one is copied while the current one is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch, to_device
from pretrain.recipe.sections.data import Image
from pretrain.train.device_staging import PinnedCopies, StagedBatches, Tensors, copies_for
from tests.support.samples import SIZE, pairs, write_source

CPU = torch.device("cpu")
IMAGE = Image(size=SIZE)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    root = tmp_path_factory.mktemp("staging")
    builder = BatchBuilder(pairs(root, batch=8, a=write_source(root / "a", [9, 7])))
    return [builder.make(0, start, start + 2) for start in range(0, 8, 2)]


def equal(a: DeviceBatch, b: DeviceBatch) -> bool:
    names = ("weights", "sample_ids", "keys")
    found = [(getattr(a, name), getattr(b, name)) for name in names]
    found += [(a.fields[name], b.fields[name]) for name in ("images", "tokens", "used")]
    same = (a.longest, a.fields.keys()) == (b.longest, b.fields.keys())
    return same and all(torch.equal(one, other) for one, other in found)


class Recorded:
    """Copies on the CPU that record when each begins and finishes."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.begun = 0

    def begin(self, tensors: Tensors) -> tuple[int, Tensors]:
        self.events.append(f"begin {self.begun}")
        self.begun += 1
        return self.begun - 1, {name: tensor.clone() for name, tensor in tensors.items()}

    def finish(self, ticket: tuple[int, Tensors]) -> Tensors:
        self.events.append(f"finish {ticket[0]}")
        return ticket[1]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_next_copy_begins_before_the_current_batch_is_computed(batches: list[Batch], count: int) -> None:
    copies = Recorded()
    for number, (rows, batch) in enumerate(
        zip(StagedBatches(batches[:count], IMAGE, CPU, copies), batches[:count], strict=True)
    ):
        assert equal(rows, to_device(batch, IMAGE, CPU))
        copies.events.append(f"compute {number}")
    want = []
    for number in range(count):
        want += [f"begin {0}"] * (number == 0) + [f"begin {number + 1}"] * (number + 1 < count)
        want += [f"finish {number}", f"compute {number}"]
    assert copies.events == want


def test_on_the_cpu_rows_are_moved_one_by_one(batches: list[Batch]) -> None:
    assert copies_for(CPU) is None
    for rows, batch in zip(StagedBatches(batches, IMAGE, CPU, None), batches, strict=True):
        assert equal(rows, to_device(batch, IMAGE, CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_copies_are_right_while_the_gpu_is_busy(batches: list[Batch]) -> None:
    """Long kernels on the main stream, and memory that is freed and reused at once on host and device."""
    device = torch.device("cuda", torch.cuda.current_device())
    copies = copies_for(device)
    assert isinstance(copies, PinnedCopies)
    found = []
    for _ in range(50):
        for rows in StagedBatches(batches, IMAGE, device, copies):
            torch.cuda._sleep(2_000_000)
            assert rows.images is not None
            found.append((rows.images.double().sum(), rows.tokens.sum(), rows.keys.clone()))
            del rows
    want = [to_device(batch, IMAGE, CPU) for batch in batches] * 50
    for (images, tokens, keys), rows in zip(found, want, strict=True):
        assert rows.images is not None
        torch.testing.assert_close(images.cpu(), rows.images.double().sum())
        assert torch.equal(tokens.cpu(), rows.tokens.sum())
        assert torch.equal(keys.cpu(), rows.keys)


def test_memory_of_a_pinned_copy_is_kept_for_the_stream_that_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: the calls that torch needs before memory of one stream is used in another."""
    calls: list[Any] = []

    class Stream:
        def wait_event(self, event: str) -> None:
            calls.append(("wait", event))

    class Copied:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_stream(self, stream: Stream) -> None:
            calls.append(("record", self.name, stream))

    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    copies = PinnedCopies.__new__(PinnedCopies)
    copies._device = CPU
    moved = {name: Copied(name) for name in ("tokens", "pixels")}
    assert copies.finish((moved, "copied")) is moved  # type: ignore[arg-type, comparison-overlap]
    assert calls == [("wait", "copied"), ("record", "tokens", stream), ("record", "pixels", stream)]
