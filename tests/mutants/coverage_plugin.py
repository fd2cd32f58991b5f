"""Pytest plugin that records which test runs which line, also in the processes that the test starts.

Load it with `-p tests.mutants.coverage_plugin` and MUTANTS_COVERAGE naming a folder. Each process writes a data file of
coverage.py there, with one context per test and phase, and each pytest process a JSON file with the tests' times.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import coverage
import pytest
import xxhash

FOLDER = "MUTANTS_COVERAGE"
# The context of the running test, for the processes that it starts: coverage.py reads it from their environment.
CONTEXT = "MUTANTS_CONTEXT"
PACKAGES = ("data_pipeline", "pretrain", "launch")


def config_text(root: Path, folder: Path) -> str:
    """Settings of coverage.py for the processes that tests start."""
    sources = "".join(f"    {root / package}\n" for package in PACKAGES)
    return (
        f"[run]\nparallel = true\ndata_file = {folder / 'data'}\ncontext = ${{{CONTEXT}}}\n"
        f"patch =\n    fork\n    _exit\nplugins = tests.mutants.periodic_save\n"
        f"disable_warnings = no-data-collected,module-not-measured\n"
        f"source =\n{sources}"
    )


def context_of(nodeid: str, phase: str) -> str:
    """A short name without special characters; `tests.*.json` maps it back."""
    return xxhash.xxh3_64_hexdigest(f"{nodeid}|{phase}".encode())


def enter_context() -> None:
    """Continue under the test that the environment names; for a process forked from one that another test started."""
    measurement = coverage.Coverage.current()
    if measurement is not None and CONTEXT in os.environ:
        measurement.switch_context(os.environ[CONTEXT])


class Recorder:
    """Measures this process, and names the running test to those that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tests: dict[str, dict[str, Any]] = {}
        self.coverage = coverage.Coverage(
            data_file=str(folder / "data"),
            data_suffix=True,
            config_file=False,
            source=[str(Path.cwd() / package) for package in PACKAGES],
        )
        self._enter("collection", "setup")
        self.coverage.start()
        self.coverage.switch_context(os.environ[CONTEXT])
        os.environ["COVERAGE_PROCESS_START"] = str(folder / "coveragerc")

    def _enter(self, nodeid: str, phase: str) -> None:
        os.environ[CONTEXT] = context_of(nodeid, phase)
        if coverage.Coverage.current() is self.coverage:
            self.coverage.switch_context(os.environ[CONTEXT])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        self._enter(item.nodeid, "setup")
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self._enter(item.nodeid, "call")
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed"})
        test[report.when or ""] = round(report.duration, 4)
        if report.outcome != "passed":
            test["outcome"] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        (self.folder / f"tests.{os.getpid()}.json").write_text(json.dumps(self.tests))


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get(FOLDER)
    is_controller = bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")
    if folder and not is_controller:
        config.pluginmanager.register(Recorder(Path(folder)), "mutants-recorder")
