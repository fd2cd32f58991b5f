"""Samples that crash the decoder are found in isolation and replaced; any other death of a worker replaces nothing."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import BuilderSetup, WorkItem
from data_pipeline.errors import ReadError, WorkerError
from data_pipeline.loader.loader import LocalLoader
from data_pipeline.workers.isolation import CRASHED, Isolation, PoolClosed
from data_pipeline.workers.watchdog import StallLimits
from data_pipeline.workers.worker_handle import SetupFile
from tests.fault.crashing import install, marked
from tests.support.samples import pairs, write_source

COUNTS = [9, 12, 7]
BATCH = 14
STEPS = 4


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path / "hook", monkeypatch)


def spec_with(tmp_path: Path, *places: tuple[int, int, str], times: int | None = None) -> StreamSpec:
    replaced = {(shard, index): marked(shard, index, what, times) for shard, index, what in places}
    return pairs(tmp_path, batch=BATCH, web=write_source(tmp_path / "web", COUNTS, replaced))


def total(batches: list[Batch]) -> tuple[int, int, Counter[str], list[tuple[int, str, str]]]:
    skipped = sum((Counter(batch.skipped.get("web", {})) for batch in batches), Counter())
    bad = [(line["row"], line["key"], line["reason"]) for batch in batches for line in batch.bad]
    return (
        sum(batch.batch_digest for batch in batches) % 2**64,
        sum(batch.order_digest for batch in batches) % 2**64,
        skipped,
        bad,
    )


def test_a_sample_that_crashes_the_decoder_is_replaced_alike_everywhere(tmp_path: Path, marks: Path) -> None:
    """The reference is a builder in this process that has the bad samples in `known_bad`."""
    spec = spec_with(tmp_path, (0, 3, "SIGSEGV"), (1, 5, "SIGABRT"), (2, 2, "SIGILL"))
    builder = BatchBuilder(spec)
    builder.known_bad = {("web", 0, 3): CRASHED, ("web", 1, 5): CRASHED, ("web", 2, 2): CRASHED}
    truth = [builder.make(step, 0, BATCH) for step in range(STEPS)]
    assert sum(sum(batch.skipped.get("web", {}).values()) for batch in truth) >= 4
    # One worker from the start, and two ranks of two workers each that go on in the middle. A crash of a sample costs
    # four processes, so there are no more loaders than that; each of them meets at least one.
    for workers, world_size, first in ((1, 1, 0), (2, 2, 2)):
        for rank in range(world_size):
            met = 0
            with LocalLoader([spec], rank, world_size, workers, micro_batch=5) as loader:
                for number, step in enumerate(loader.steps(first, STEPS), first):
                    rows = slice(step["pairs"][0].start, step["pairs"][-1].stop)
                    whole = builder.make(number, rows.start, rows.stop)
                    assert total(step["pairs"]) == total([whole])
                    met += sum("web" in batch.skipped for batch in step["pairs"])
                    for name in ("pixels", "tokens", "row_keys", "sample_ids"):
                        found = np.concatenate([getattr(batch, name) for batch in step["pairs"]])
                        np.testing.assert_array_equal(found, getattr(whole, name))
                        np.testing.assert_array_equal(found, getattr(truth[number], name)[rows])
            assert met
    assert {"SIGSEGV", "SIGABRT", "SIGILL"} <= set(marks.read_text().split())


def test_a_known_bad_sample_is_not_decoded_again_by_any_worker(tmp_path: Path, marks: Path) -> None:
    """Every second step has the sample. After the first one, no worker decodes it: nobody is replaced."""
    spec = spec_with(tmp_path, (1, 5, "SIGSEGV"))
    with LocalLoader([spec], 0, 1, 2) as loader:
        met = sum("web" in step["pairs"][0].skipped for step in loader.steps(0, 4))
        pids, before = loader.worker_pids, marks.read_text()
        met += sum("web" in step["pairs"][0].skipped for step in loader.steps(4, 16))
        assert met == 8
        assert len(before.split()) >= 4  # two workers and two isolated processes
        assert (loader.worker_pids, marks.read_text()) == (pids, before)


@pytest.mark.parametrize(("what", "times"), [("SIGSEGV", 1), ("SIGSEGV", 3), ("SIGKILL", 2), ("SIGKILL", 4)])
def test_a_failure_that_does_not_repeat_changes_nothing(
    tmp_path: Path, marks: Path, what: str, times: int
) -> None:
    """One crash in isolation proves nothing; two workers and two isolated processes may be killed without an error."""
    spec = spec_with(tmp_path, (1, 5, what), times=times)
    reference = BatchBuilder(spec)
    with LocalLoader([spec], 0, 1, 2) as loader:
        for number, step in enumerate(loader.steps(0, STEPS)):
            assert total(step["pairs"]) == total([reference.make(number, 0, BATCH)])
            assert not step["pairs"][0].skipped
    assert len(marks.read_text().split()) > times


@pytest.mark.parametrize(("what", "expected_exit"), [("SIGKILL", "signal SIGKILL"), ("EXIT", "exit code 7")])
def test_other_deaths_are_an_error_that_names_the_row(
    tmp_path: Path, marks: Path, what: str, expected_exit: str
) -> None:
    spec = spec_with(tmp_path, (1, 5, what))
    builder = BatchBuilder(spec)
    refs = [builder.order.refs(step) for step in range(STEPS)]
    step, row = next(
        (step, int(at.row[i]))
        for step, at in enumerate(refs)
        for i in range(BATCH)
        if (at.shard[i], at.index[i]) == (1, 5)
    )
    with LocalLoader([spec], 0, 1, 2) as loader:
        made = loader.steps(0, STEPS)
        for number in range(step):
            assert total(next(made)["pairs"]) == total([builder.make(number, 0, BATCH)])
        expected = rf"step {step}, row {row} of stream pairs.*{expected_exit}.*memory"
        with pytest.raises(WorkerError, match=expected) as error:
            next(made)
        assert isinstance(error.value, OSError)  # so that a rank saves before it stops
    assert len(marks.read_text().split()) == 5  # two workers, and three tries alone


def test_a_crash_at_a_known_bad_sample_is_an_error_and_not_a_loop(tmp_path: Path, marks: Path) -> None:
    """The source name is too long for the status memory, so that the builder does not recognise the bad sample."""
    web = write_source(tmp_path / "web", [8], {(0, 3): marked(0, 3, "SIGSEGV")})
    spec = pairs(tmp_path, batch=8, **{"w" * 600: web})
    with (
        LocalLoader([spec], 0, 1, 1) as loader,
        pytest.raises(WorkerError, match=r"step 0, row \d of .*SIGSEGV"),
    ):
        list(loader.steps(0, 1))
    assert len(marks.read_text().split()) == 7  # two workers, two isolated crashes, three more


def test_isolation_ends_between_rows_when_the_pool_is_closed(tmp_path: Path) -> None:
    setups = [BuilderSetup.of(BatchBuilder(spec_with(tmp_path)))]
    file, answers = SetupFile(setups), iter([False, False, True])
    isolation = Isolation(setups, file, StallLimits(), lambda: next(answers))
    with pytest.raises(PoolClosed):
        isolation.make(WorkItem("pairs", 0, 0, BATCH))
    assert not list(answers)
    file.close()


def test_an_isolated_process_whose_start_stalls_is_named_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    setups = [BuilderSetup.of(BatchBuilder(spec_with(tmp_path)))]
    file = SetupFile(setups)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(
        ReadError, match=r"row 3 of .* stalled: reading its program files and the source indexes"
    ):
        Isolation(setups, file, StallLimits(0.1, 0.3)).make(WorkItem("pairs", 0, 3, 5))
    file.close()


def test_a_decode_that_hangs_is_named_and_then_an_error(
    tmp_path: Path, marks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_with(tmp_path, (1, 5, "HANG"))
    with (
        caplog.at_level(logging.WARNING, "dromos.loader"),
        LocalLoader([spec], 0, 1, 2, limits=StallLimits(0.2, 2.5)) as loader,
        pytest.raises(
            WorkerError, match=r"stalled: decoding sample 5 of .*00001\.tar for \d+ s .*does not prove"
        ),
    ):
        list(loader.steps(0, STEPS))
    messages = [record.getMessage() for record in caplog.records]
    assert any("has been decoding sample 5 of " in line and "worker " in line for line in messages)
    assert marks.read_text().split() == ["HANG", "HANG"]


def test_a_read_that_stalls_is_named_retried_and_then_an_error(
    tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hook = marks.parent / "sitecustomize.py"
    hook.write_text(STALL)
    spec = spec_with(tmp_path)
    monkeypatch.setenv("STALLS", "1")
    builder = BatchBuilder(spec)
    limits = StallLimits(0.2, 2.5)
    with caplog.at_level(logging.WARNING, "dromos.loader"):
        with LocalLoader([spec], 0, 1, 2, limits=limits) as loader:
            for number, step in enumerate(loader.steps(0, STEPS)):
                assert total(step["pairs"]) == total([builder.make(number, 0, BATCH)])
        messages = [record.getMessage() for record in caplog.records]
        assert any("has been reading s3://far/away.tar for" in line for line in messages)
        monkeypatch.setenv("STALLS", "9")
        with (
            LocalLoader([spec], 0, 1, 2, limits=limits) as loader,
            pytest.raises(ReadError, match=r"two workers, .* stalled: reading s3://far/away\.tar for \d+ s"),
        ):
            list(loader.steps(0, STEPS))


STALL = """
import os, sys, time
if "data_pipeline.workers.worker" in sys.orig_argv:
    from data_pipeline import activity
    from data_pipeline.batches.row_builder import RowBuilder
    make = RowBuilder.make

    def stalling(self, source, shard, index, *given, **named):
        if (shard, index) == (1, 5):
            with open(os.environ["CRASHES"], "a") as file:
                file.write("stall\\n")
            with open(os.environ["CRASHES"]) as file:
                met = len(file.readlines())
            if met <= int(os.environ["STALLS"]):
                with activity.reading("s3://far/away.tar"):
                    time.sleep(600)
        return make(self, source, shard, index, *given, **named)

    RowBuilder.make = stalling
"""
