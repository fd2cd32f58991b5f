"""Shared by all tests: data beside the checkout, groups for parallel workers, and CI's rule that nothing is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
WITHOUT_SHARED = "needs ../shared"
MISSING = "in CI an integration test must run, and this one was skipped"
# Session fixtures that take seconds: all files that use one are a group, so that one worker builds it once.
COSTLY_FIXTURES = ("demo", "tiny_runs")
# One worker runs all tests that start a Ray cluster: two at once starve each other on two cores.
RAY_FILES = ("tests/data_pipeline/workers/test_ray_pool.py", "tests/launch/ray/test_local_head.py")
# Folders and files whose tests take longest start first, so that no worker is left with one of them at the end.
SLOW_FIRST = (
    "tests/integration",
    "tests/fault/test_kill.py",
    "tests/dist",
    "tests/fault",
    "tests/pretrain/train",
    "tests/pretrain/merge",
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and documents beside the checkout; without it the test is skipped by name."""
    if not SHARED.is_dir():
        pytest.skip(f"{WITHOUT_SHARED}, which is not beside this checkout")
    return SHARED


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by file, or by the costly fixture that files share (`--dist loadgroup`), slow groups first."""
    groups: dict[str, str] = {}
    for item in items:
        path = item.nodeid.partition("::")[0]
        costly = (name for name in COSTLY_FIXTURES if name in getattr(item, "fixturenames", ()))
        own = COSTLY_FIXTURES[0] if path in RAY_FILES else path
        groups[path] = next(costly, groups.get(path, own))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item.nodeid.partition("::")[0]]))

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
