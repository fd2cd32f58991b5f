"""Runs the tests of mutants, each in a process forked from one that has imported the libraries."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mutants.coverage_map import CoverageMap, MeasuredTest
from tests.mutants.mutations import Mutant

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "pretrain", "launch")
# Imported once, before the forks. Nothing of the repository: each fork imports its own, mutated files.
LIBRARIES = [
    "torch",
    "torch._dynamo",
    "open_clip",
    "transformers.models.llama.modeling_llama",
    "pyarrow.parquet",
]
LIBRARIES += [
    "hypothesis",
    "pydantic",
    "typer",
    "webdataset",
    "safetensors",
    "tokenizers",
    "PIL.Image",
    "xdist",
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu", "PYTHONHASHSEED": "0",
}  # fmt: skip
# Seconds that a run may take beyond three times what its tests took when they were measured.
START_SECONDS = 60
# Seconds for the import of the test files, on a loaded machine.
COLLECTION_SECONDS = 300
PASSED = (0, 5)  # 5: no selected test is there


@dataclass
class Result:
    """What became of a mutant: `killed`, `timeout`, `survived` or `uncovered` (no test runs its line)."""

    mutant: Mutant
    status: str
    seconds: float = 0.0
    tests: int = 0
    test_seconds: float = 0.0
    killed_by: str = ""
    output: str = ""

    @property
    def is_killed(self) -> bool:
        return self.status in ("killed", "timeout")


@dataclass
class Selection:
    """Tests for a mutant, the nearest and fastest first; `left_out` more would run the line."""

    tests: list[MeasuredTest] = field(default_factory=list)
    left_out: int = 0

    @property
    def seconds(self) -> float:
        return sum(test.call for test in self.tests) + sum(
            max(test.setup for test in of_file) for of_file in _by_file(self.tests).values()
        )


def select(found: CoverageMap, mutant: Mutant, seconds: float) -> Selection:
    """The tests that run a mutant's statement, as many as fit into `seconds`, at least one.

    For a line at module level, which runs only in the first test that imports the module: the tests that run any line
    of the file, and those of the module's test file, which may only read a constant.
    """
    if not mutant.on_import:
        tests = found.covering(mutant.path, (mutant.statement, mutant.line))
    else:
        running = {test.nodeid for test in found.covering(mutant.path, found.lines.get(mutant.path, {}))}
        tests = [t for t in found.tests if t.nodeid in running or _distance(t, mutant)[0] == 0]
    tests = sorted((test for test in tests if test.passed), key=lambda test: _distance(test, mutant))
    chosen: list[MeasuredTest] = []
    files: set[str] = set()
    total = 0.0
    for test in tests:
        cost = test.call + 0.02 + (test.setup if test.file not in files else 0.0)
        if chosen and total + cost > seconds:
            continue
        chosen.append(test)
        files.add(test.file)
        total += cost
    return Selection(chosen, len(tests) - len(chosen))


def _distance(test: MeasuredTest, mutant: Mutant) -> tuple[int, float]:
    """0: the test file of the module; 1: of its folder; 2: elsewhere; then by seconds."""
    folder, _, name = mutant.path.rpartition("/")
    if test.file.startswith(f"tests/{folder}/test_{name.removesuffix('.py')}"):
        place = 0
    else:
        place = 1 if test.file.startswith(f"tests/{folder}/") else 2
    return place, test.call + test.setup


def _by_file(tests: Sequence[MeasuredTest]) -> dict[str, list[MeasuredTest]]:
    """Tests by file, in the order of first appearance: a file's fixtures are then built once."""
    found: dict[str, list[MeasuredTest]] = {}
    for test in tests:
        found.setdefault(test.file, []).append(test)
    return found


class Copy:
    """A copy of the working tree, in which one mutant at a time is written."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "main"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        compiled = (str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.so"))
        names = [name for name in (*listed.split("\0"), *compiled) if name and (ROOT / name).is_file()]
        # Restored from these, not from the working tree, which may change while the mutants run.
        self.originals = {name: (ROOT / name).read_bytes() for name in names}
        self.modes = {name: (ROOT / name).stat().st_mode for name in names}
        self.states: dict[str, tuple[int, int]] = {}
        # Python trusts a compiled file whose source has the recorded second and size: every write gets its own second.
        self.times = itertools.count(int(time.time()) - 10_000_000)
        places = ((folder / "shared", ROOT.parent / "shared"), (self.root / ".venv", Path(sys.prefix)))
        self.links = {link: place for link, place in places if place.exists()}
        self.repair()

    def repair(self) -> None:
        """Write every file again that is gone or changed: a mutant of code that removes files may remove the copy."""
        for name, content in self.originals.items():
            path = self.root / name
            if self.states.get(name) != _state(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write(path, content)
                path.chmod(self.modes[name])
                self.states[name] = _state(path)
        for link, place in self.links.items():
            if not link.is_symlink():
                link.symlink_to(place)

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant | None) -> Iterator[None]:
        if mutant is None:
            yield
            return
        self._write(self.root / mutant.path, mutant.source.encode())
        try:
            yield
        finally:
            self.repair()

    def _write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        second = next(self.times)
        os.utime(path, (second, second))


def _state(path: Path) -> tuple[int, int]:
    """Time of change and size; of a file that is gone (0, -1)."""
    try:
        status = path.stat()
    except OSError:
        return 0, -1
    return status.st_mtime_ns, status.st_size


class Outcome:
    """Pytest plugin that runs only the selected tests, and stops one that takes far longer than when it was measured.

    Pytest gets whole files: it would fail for a test that is gone, such as one whose name holds a mutated number.
    """

    def __init__(self, tests: Sequence[MeasuredTest]) -> None:
        self.seconds = {test.nodeid: 20 + 5 * (test.setup + test.call) for test in tests}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import pytest

        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.seconds if name in by_name]
        signal.alarm(0)
        for item in items:
            item.add_marker(pytest.mark.timeout(self.seconds[item.nodeid]), append=False)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class Run:
    """A forked pytest process in a copy."""

    def __init__(self, copy: Copy, mutant: Mutant | None, selection: Selection, stop: bool = True) -> None:
        self.mutant, self.selection = mutant, selection
        self.log = copy.root.parent / "output.txt"
        self.outcome = copy.root.parent / "outcome.json"
        self.outcome.unlink(missing_ok=True)
        self._changed = contextlib.ExitStack()
        self._changed.enter_context(copy.mutated(mutant))
        self.began = time.monotonic()
        self.deadline = self.began + START_SECONDS + 3 * selection.seconds
        self.pid = os.fork()
        if self.pid == 0:
            _run_tests(copy.root, selection, self.log, self.outcome, stop)

    def poll(self) -> Result | None:
        """The result, or None while the tests run. Ends the processes that the tests left."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        late = time.monotonic() > self.deadline
        if pid == 0 and not late:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if pid == 0:
            os.waitpid(self.pid, 0)
        self._changed.close()
        outcome = json.loads(self.outcome.read_text()) if self.outcome.exists() else {}
        code = os.waitstatus_to_exitcode(status) if pid else None
        is_late = pid == 0 or code == -signal.SIGALRM
        name = "timeout" if is_late else "survived" if code in PASSED else "killed"
        assert self.mutant is not None
        return Result(
            self.mutant, name, time.monotonic() - self.began, len(self.selection.tests), self.selection.seconds,
            next(iter(outcome.get("failed", ())), ""), self.log.read_text(errors="replace")[-6000:],
        )  # fmt: skip


def _run_tests(root: Path, selection: Selection, log: Path, outcome: Path, stop: bool) -> None:
    """In the forked process: run pytest in the copy and leave."""
    code = 3
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        os.environ |= {**ENVIRONMENT, "PYTHONPATH": str(root)}
        os.chdir(root)
        _forget_repository(root)
        _set_up_hypothesis()
        import pytest

        by_file = _by_file(selection.tests)
        plugin = Outcome([test for of_file in by_file.values() for test in of_file])
        arguments = [
            *(["-x"] if stop else []),
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--tb=short",
        ]
        signal.alarm(
            START_SECONDS
        )  # a loop without end while a test file is imported; later each test has its limit
        code = int(pytest.main([*arguments, *by_file], plugins=[plugin]))
        outcome.write_text(json.dumps({"failed": plugin.failed}))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _set_up_hypothesis() -> None:
    """A failure ends the test at once, not after minutes of shrinking; examples depend on no earlier mutant or run."""
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", phases=phases, database=None, derandomize=True)
    settings.load_profile("mutants")


def _forget_repository(root: Path) -> None:
    """Import the repository's modules from the copy from now on."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (*PACKAGES, "tests"):
            del sys.modules[name]
    sys.path[:] = [str(root), *(place for place in sys.path if Path(place or ".").resolve() != ROOT)]
    importlib.invalidate_caches()


def run_all(
    mutants: Sequence[Mutant],
    found: CoverageMap,
    seconds: float,
    jobs: int,
    folder: Path,
    report: Callable[[Result], None],
) -> list[Result]:
    """The results of all mutants, `jobs` at a time; `report` is called with each.

    At the end every test that killed a mutant runs without one. A test that fails then proves nothing: its mutants
    run again without it, until all tests that killed one pass without.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    copies = []
    for number in range(jobs):
        (folder / str(number)).mkdir(parents=True)
        copies.append(Copy(folder / str(number)))
    results = _run_mutants(mutants, found, seconds, copies, report)
    unchecked = results
    while failing := _fail_without_mutant(unchecked, found, copies[0]):
        names = {name for test in failing for name in (test.nodeid, test.file)}
        for test in found.tests:
            test.passed = test.passed and test.nodeid not in names
        doubtful = [result for result in results if result.killed_by in names]
        results = [result for result in results if result not in doubtful]
        unchecked = _run_mutants([result.mutant for result in doubtful], found, seconds, copies, report)
        results += unchecked
    return results


def _fail_without_mutant(results: Sequence[Result], found: CoverageMap, copy: Copy) -> list[MeasuredTest]:
    killers = {result.killed_by for result in results if result.killed_by}
    tests = [test for test in found.tests if test.nodeid in killers]
    tests += [next(test for test in found.tests if test.file == name) for name in killers if "::" not in name]
    if not tests:
        return []
    run = Run(copy, None, Selection(tests), stop=False)
    os.waitpid(run.pid, 0)
    failed = set(json.loads(run.outcome.read_text())["failed"])
    return [test for test in tests if failed & {test.nodeid, test.file}]


def _run_mutants(
    mutants: Sequence[Mutant],
    found: CoverageMap,
    seconds: float,
    copies: Sequence[Copy],
    report: Callable[[Result], None],
) -> list[Result]:
    waiting, free = list(mutants), list(copies)
    running: list[tuple[Copy, Run]] = []
    results = []

    def finish(result: Result) -> None:
        results.append(result)
        report(result)

    while waiting or running:
        while waiting and free:
            mutant = waiting.pop(0)
            selection = select(found, mutant, seconds)
            if selection.tests:
                copy = free.pop()
                running.append((copy, Run(copy, mutant, selection)))
            else:
                finish(Result(mutant, "uncovered"))
        for copy, run in list(running):
            if (result := run.poll()) is not None:
                running.remove((copy, run))
                free.append(copy)
                finish(result)
        time.sleep(0.02)
    return results
