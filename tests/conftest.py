"""Shared by all tests: data beside the checkout, groups for parallel workers, and CI's rule for integration tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
WITHOUT_SHARED = "needs ../shared"
SET_BY_OTHERS = {"PYTEST_CURRENT_TEST", "MUTANTS_CONTEXT", "RAY_CLIENT_MODE"}
# Variables of other names may appear: libraries set theirs when they are imported.
OURS = ("AWS_", "DROMOS_", "HF_", "LOCAL_", "MASTER_", "RANK", "RAY_", "SLURM_", "WORLD_")
MISSING = "in CI an integration test must run, and this one was skipped"
# Files that train (tests/support/forks.py), or that start a Ray or Slurm cluster: one parallel worker runs all files of
# a group. Its fork server imports torch once, and two clusters do not starve each other on two cores.
GROUPS = {
    "tests/integration/test_s3_run.py": "ranks",
    "tests/integration": "clusters",
    "tests/data_pipeline/workers/test_ray_pool.py": "clusters",
    "tests/launch/ray": "clusters",
    "tests/dist": "ranks",
    "tests/fault/test_kill.py": "ranks",
    "tests/fault/test_operational_failures.py": "ranks",
    "tests/launch/test_real_sources.py": "ranks",
    "tests/pretrain/evaluate": "ranks",
    "tests/pretrain/export": "ranks",
    "tests/pretrain/train": "ranks",
}
# Folders and files whose tests take longest start first, so that no worker is left with one of them at the end.
SLOW_FIRST = (
    "tests/integration",
    "tests/dist",
    "tests/fault",
    "tests/pretrain/merge",
)


# Several workers share the cores: threads of torch's and numpy's pools would wait for each other in busy loops.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What collection imports lives as long as the worker: collections of garbage during it find nothing and cost seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()  # also makes every later collection cheaper
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise nanobind reports what is not freed at exit as leaks


# A shell starts background jobs with SIGINT ignored, nohup its command with SIGHUP, and children inherit that: tests of
# Ctrl-C and of a closed terminal would then fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def process_state() -> dict[str, object]:
    """What a test file may change in the process that runs it, and later files depend on."""
    umask = os.umask(0)
    os.umask(umask)
    numbers = set(signal.Signals) - {signal.SIGALRM}  # pytest-timeout's
    handlers = {number.name: signal.getsignal(number) for number in numbers}
    environ = {f"environ[{name}]": value for name, value in os.environ.items() if name not in SET_BY_OTHERS}
    return {"umask": umask, "folder": os.getcwd(), **handlers, **environ}


@pytest.fixture(scope="module", autouse=True)
def unchanged_process() -> Iterator[None]:
    """A file that leaves a signal handler, a variable or a folder behind fails, not the file that runs after it."""
    before = process_state()
    yield
    after = process_state()
    changed = {
        name: (before.get(name), after.get(name))
        for name in {*before, *after}
        if before.get(name) != after.get(name)
        and (name in before or name.startswith(tuple(f"environ[{start}" for start in OURS)))
    }
    assert not changed, f"the tests of this file left the process changed (before, after): {changed}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and documents beside the checkout; without it the test is skipped by name."""
    if not SHARED.is_dir():
        pytest.skip(f"{WITHOUT_SHARED}, which is not beside this checkout")
    return SHARED


def group_of(path: str) -> str:
    """The group of a test file: its entry in GROUPS, else the file itself."""
    return next((group for start, group in GROUPS.items() if path.startswith(start)), path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, at most four: tests of clusters and stalls wait more than they compute."""
    return min(4, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes whole groups. (pytest-xdist 3.8's own `--dist loadgroup` has no effect under pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow folders first, so that no worker is left with one of them at the end."""

    def place(item: pytest.Item) -> int:
        return next(
            (k for k, start in enumerate(SLOW_FIRST) if item.nodeid.startswith(start)), len(SLOW_FIRST)
        )

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # yields and returns the report
    report = yield
    if item.get_closest_marker("integration") is not None:
        forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if "integration" in Path(str(collector.path)).parts:
        forbid_skip(report)
    return report


def forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI, turn the skip of an integration test into a failure; an expected failure stays one."""
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail"):
        return
    place = report.longrepr
    reason = str(place[2]) if isinstance(place, tuple) else str(place)
    if WITHOUT_SHARED in reason:
        return
    report.outcome = "failed"
    report.longrepr = f"{MISSING}: {reason.removeprefix('Skipped: ')}"
