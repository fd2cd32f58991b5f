"""Batches from Ray actors on a real cluster of two nodes on this machine equal those of the local loader."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import BuilderSetup, WorkItem
from data_pipeline.errors import UserError, WorkerError
from data_pipeline.loader.loader import LocalLoader
from data_pipeline.workers import ray_pool
from data_pipeline.workers.isolation import CRASHED
from data_pipeline.workers.watchdog import StallLimits
from tests.data_pipeline.loader.test_loader import wait_until
from tests.fault.deadly import Deadly
from tests.support.reference.rows import Row, stream_rows
from tests.support.reference_batches import check_batch
from tests.support.samples import members, pairs, write_source

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
STORE = 100 * 2**20
STEPS = 6


@pytest.fixture
def cluster(running: Any) -> Any:
    """The cluster with both nodes; adds the second again if a test removed it."""
    if not running.worker_nodes:
        add_node(running, num_cpus=1, object_store_memory=STORE)
    return running


def add_node(cluster: Any, **settings: Any) -> None:
    """Ray gives a node a fixed 30 s to start, which a busy machine may exceed."""
    for attempt in range(3):
        try:
            cluster.add_node(**settings)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == 2:
                raise


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """Two nodes of one CPU each, at RAY_ADDRESS, as in a job."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'dromos[ray]'")
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    # Socket paths may have 107 characters, which pytest's own folders use up.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    # Cluster writes its address to /tmp/ray/ray_current_cluster whatever temp_dir is, and does not create the folder.
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "temp_dir": folder}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # replaced by each node that starts in this process
    cluster = Cluster()
    try:
        add_node(cluster, **head)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
        patch.undo()
        signal.signal(signal.SIGTERM, on_sigterm)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    root = tmp_path_factory.mktemp("ray")
    bad = {(0, i): {"png": b"broken", "txt": b"a"} for i in (1, 2, 3)}
    return pairs(
        root, batch=8, first=write_source(root / "first", [5, 9], bad), second=write_source(root / "b", [4])
    )


def reference_rows(spec: StreamSpec) -> list[list[Row]]:
    assert spec.image is not None
    assert spec.text is not None
    settings = {
        "sources": {name: source.path for name, source in spec.sources.items()},
        "batch": spec.largest,
        "image": {"size": spec.image.size, "crop": spec.image.crop, "flip": spec.image.flip},
        "text": {"tokenizer": spec.text.tokenizer, "length": spec.text.length},
    }
    return list(stream_rows(settings, spec.name, spec.seed, STEPS))


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_two_nodes_make_the_local_batches_though_one_actor_is_killed(cluster: Any, spec: StreamSpec) -> None:
    """They are also those of the reference, which shares no code with the loaders."""
    from data_pipeline.loader.loader import RayLoader

    rows = reference_rows(spec)
    skipped = 0
    for rank in (0, 1):
        with LocalLoader([spec], rank, 2, 0, micro_batch=2) as local:
            want = list(local.steps(0, STEPS))
        with RayLoader([spec], rank, 2, 2, micro_batch=2) as loader:
            before = loader.actor_locations
            assert len({node for node, _ in before}) == 2
            found = []
            for number, step in enumerate(loader.steps(0, STEPS)):
                found.append(step)
                if number == 1:
                    victim = before[rank][1]
                    os.kill(victim, signal.SIGKILL)
                    wait_until(partial(gone, victim))
            after = loader.actor_locations
            assert len(set(before) & set(after)) == 1
        assert len(found) == STEPS
        for step, (ours, theirs) in enumerate(zip(found, want, strict=True)):
            assert len(ours["pairs"]) == len(theirs["pairs"]) == 2
            for number, batch in enumerate(ours["pairs"]):
                start = 4 * rank + 2 * number
                check_batch(batch, rows[step][start : start + 2])
            for a, b in zip(ours["pairs"], theirs["pairs"], strict=True):
                for field in ("pixels", "tokens", "used", "weights", "sample_ids", "row_keys"):
                    np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
                    assert getattr(a, field).flags.writeable
                assert (a.batch_digest, a.order_digest) == (b.batch_digest, b.order_digest)
                assert (a.skipped, a.bad, a.samples) == (b.skipped, b.bad, b.samples)
        skipped += sum(bool(batch.skipped) for step in found for batch in step["pairs"])
    assert skipped


def test_actors_need_no_file_but_the_shards(cluster: Any, tmp_path: Path) -> None:
    """The loader's process reads the tokenizer and the statistics, and sends them to the actors."""
    from data_pipeline.loader.loader import RayLoader

    source = write_source(tmp_path / "a", [6])
    stats = source / "00000_stats.json"
    stats.write_text(json.dumps({"successes": 6}))
    spec = pairs(tmp_path, batch=2, a=source)
    with LocalLoader([spec], 0, 1, 0) as local:
        want = [step["pairs"][0].batch_digest for step in local.steps(0, 3)]
    with RayLoader([spec], 0, 1, 1) as loader:
        stats.unlink()
        shutil.rmtree(tmp_path / "tokenizer")
        assert [step["pairs"][0].batch_digest for step in loader.steps(0, 3)] == want


def test_relative_paths_start_at_the_rank_s_folder(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.loader.loader import RayLoader

    write_source(tmp_path / "a", [6])
    spec = pairs(tmp_path, batch=2, a=Path("a"))
    monkeypatch.chdir(tmp_path)  # Ray's nodes were started elsewhere
    with LocalLoader([spec], 0, 1, 0) as local, RayLoader([spec], 0, 1, 2) as remote:
        for here, there in zip(local.steps(0, 3), remote.steps(0, 3), strict=True):
            assert there["pairs"][0].batch_digest == here["pairs"][0].batch_digest


def test_a_users_mistake_in_an_actor_keeps_its_type(cluster: Any, tmp_path: Path) -> None:
    from data_pipeline.loader.loader import RayLoader

    source = write_source(tmp_path / "a", [4, 4])
    for shard, successes in enumerate((4, 5)):
        (source / f"0000{shard}_stats.json").write_text(json.dumps({"successes": successes}))
    with (
        RayLoader([pairs(tmp_path, batch=9, a=source)], 0, 1, 1) as loader,
        pytest.raises(UserError, match=r"00001\.tar holds 4 samples, but .* 5"),
    ):
        list(loader.steps(0, 2))


def test_a_loader_left_early_serves_again(cluster: Any, spec: StreamSpec) -> None:
    from data_pipeline.loader.loader import RayLoader

    with LocalLoader([spec], 0, 1, 0) as local:
        want = [step["pairs"][0].batch_digest for step in local.steps(0, 3)]
    with RayLoader([spec], 0, 1, 2) as loader:
        for _ in loader.steps(3, 9):
            break
        assert [step["pairs"][0].batch_digest for step in loader.steps(0, 3)] == want
        assert loader.wait_seconds > 0


def test_actors_fit_beside_ranks_that_took_every_cpu_and_outlive_a_node(
    cluster: Any, spec: StreamSpec
) -> None:
    import ray

    from data_pipeline.loader.loader import RayLoader

    with LocalLoader([spec], 0, 1, 0) as local:
        want = [step["pairs"][0].batch_digest for step in local.steps(0, STEPS)]
    with RayLoader([spec], 0, 1, 2) as loader:

        @ray.remote(num_cpus=1)
        class Rank:
            def ready(self) -> bool:
                return True

        ranks = [Rank.remote() for _ in range(2)]
        assert all(ray.get([rank.ready.remote() for rank in ranks]))
        processes = dict(loader.actor_locations)
        assert len(processes) == 2
        found = []
        for number, step in enumerate(loader.steps(0, STEPS)):
            found.append(step["pairs"][0].batch_digest)
            if number == 0:
                (second,) = cluster.worker_nodes
                cluster.remove_node(second, allow_graceful=False)
                wait_until(partial(gone, processes[second.node_id]), 60)
        assert found == want
        assert second.node_id not in {node for node, _ in loader.actor_locations}
        for rank in ranks:
            ray.kill(rank)


def deadly(tmp_path: Path, what: str) -> BatchBuilder:
    """A builder with one sample at which any other process crashes, is killed or hangs (`what`)."""
    replace = {(0, 3): members(0, 3) | {"txt": f"a red dot of {what}".encode()}}
    spec = pairs(tmp_path, batch=9, a=write_source(tmp_path / "a", [9], replace))
    return BatchBuilder(spec, tokenizer=Deadly(BatchBuilder(spec).tokenizer))


def test_a_crash_that_follows_its_sample_marks_it_as_bad(cluster: Any, tmp_path: Path) -> None:
    from data_pipeline.loader.loader import RayLoader

    builder = deadly(tmp_path, "crash")
    truth = BatchBuilder(builder.spec)
    truth.known_bad = {("a", 0, 3): CRASHED}
    with RayLoader([builder.spec], 0, 1, 2, builders={"pairs": builder}) as loader:
        for number, step in enumerate(loader.steps(0, 4)):
            (batch,), want = step["pairs"], truth.make(number, 0, 9)
            assert batch.skipped == want.skipped == {"a": {CRASHED: want.skipped["a"][CRASHED]}}
            assert batch.bad == want.bad
            assert batch.batch_digest == want.batch_digest
            np.testing.assert_array_equal(batch.images, want.images)


@pytest.mark.parametrize(
    ("what", "message"),
    [("kill", r"signal SIGKILL.*memory"), ("hang", r"stalled: decoding sample 3 of .*00000\.tar for \d+ s")],
)
def test_a_kill_or_a_stall_replaces_no_sample(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, message: str
) -> None:
    from data_pipeline.loader.loader import RayLoader

    builder = deadly(tmp_path, what)
    limits = StallLimits(0.5, 3.0)
    with (
        caplog.at_level(logging.WARNING, "dromos.loader"),
        RayLoader([builder.spec], 0, 1, 2, builders={"pairs": builder}, limits=limits) as loader,
        pytest.raises(WorkerError, match=message),
    ):
        next(loader.steps(0, 1))
    if what == "hang":
        messages = [record.getMessage() for record in caplog.records]
        assert any(line.startswith("actor ") and "has been decoding sample 3 of" in line for line in messages)


def test_no_cluster_is_one_message(spec: StreamSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'dromos[ray]'")
    from data_pipeline.loader.loader import RayLoader

    def refuse(**_: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(UserError, match=r"no Ray cluster at 192\.0\.2\.1:6379.*ray start --head.*--on ray"):
        RayLoader([spec], 0, 1, 1)


def test_an_actor_builds_a_suspected_item_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: what Ray calls in an actor."""
    monkeypatch.chdir(tmp_path)  # the actor changes to the folder that it is given
    spec = pairs(tmp_path, batch=4, a=write_source(tmp_path / "a", [6]))
    builder = BatchBuilder(spec)
    actor = ray_pool.BatchActor([BuilderSetup.of(builder)], str(tmp_path), StallLimits(30, 60), {})
    made, known_bad = actor.make_isolated(WorkItem("pairs", 0, 1, 3))
    assert isinstance(made, Batch)
    assert known_bad == {"pairs": {}}
    want = builder.make(0, 1, 3)
    assert made.batch_digest == want.batch_digest
    np.testing.assert_array_equal(made.pixels, want.pixels)
    refused, _ = actor.make_isolated(WorkItem("nobody", 0, 1, 3))
    assert isinstance(refused, Exception)
