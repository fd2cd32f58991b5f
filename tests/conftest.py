"""What all tests share: real data beside the checkout, and CI's rule that a missing program is a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
WITHOUT_SHARED = "needs ../shared"
MISSING = "in CI an integration test must run, and this one was skipped"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and documents beside the checkout; without it the test is skipped by name."""
    if not SHARED.is_dir():
        pytest.skip(f"{WITHOUT_SHARED}, which is not beside this checkout")
    return SHARED


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
