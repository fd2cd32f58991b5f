"""Which tests run which line, and how long they take; measured once, then only for test files that changed.

The map is `.mutants/map.json`: per source file its text and, per line, the tests as the bits of an integer.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from coverage import CoverageData
from coverage.exceptions import CoverageException

from tests.mutants.coverage_plugin import FOLDER, config_text, context_of

ROOT = Path(__file__).resolve().parents[2]
MAP = ROOT / ".mutants" / "map.json"
PHASES = ("setup", "call", "teardown")


@dataclass
class MeasuredTest:
    """A test, with the seconds of its phases; `setup` is the longest of its file, whose fixtures may be shared."""

    nodeid: str
    setup: float
    call: float
    passed: bool

    @property
    def file(self) -> str:
        return self.nodeid.partition("::")[0]


@dataclass
class CoverageMap:
    """tests: all measured tests; lines: source file -> line -> bits of tests; texts: source file -> measured text.

    digests: test file -> digest of what was measured, to see what is out of date.
    """

    tests: list[MeasuredTest] = field(default_factory=list)
    lines: dict[str, dict[int, int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def covering(self, path: str, lines: Iterable[int]) -> list[MeasuredTest]:
        bits = 0
        for line in lines:
            bits |= self.lines.get(path, {}).get(line, 0)
        return [test for number, test in enumerate(self.tests) if bits >> number & 1]

    def save(self) -> None:
        MAP.parent.mkdir(exist_ok=True)
        content = {
            "tests": [[t.nodeid, t.setup, t.call, t.passed] for t in self.tests],
            "lines": {path: {n: f"{b:x}" for n, b in of.items()} for path, of in self.lines.items()},
            "texts": self.texts,
            "digests": self.digests,
        }
        MAP.write_text(json.dumps(content))


def load() -> CoverageMap:
    """The saved map, with its lines moved to where they are in the present source files."""
    if not MAP.exists():
        return CoverageMap()
    content = json.loads(MAP.read_text())
    tests = [MeasuredTest(*test) for test in content["tests"]]
    longest: dict[str, float] = {}
    for test in tests:
        longest[test.file] = max(test.setup, longest.get(test.file, 0.0))
    for test in tests:  # a test that runs alone makes the fixtures that another one made when it was measured
        test.setup = longest[test.file]
    found = CoverageMap(
        tests,
        {path: {int(n): int(b, 16) for n, b in of.items()} for path, of in content["lines"].items()},
        content["texts"],
        content["digests"],
    )
    for path, text in found.texts.items():
        now = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        if now != text:
            found.lines[path] = _moved(found.lines[path], text, now)
            found.texts[path] = now
    return found


def _moved(lines: dict[int, int], before: str, after: str) -> dict[int, int]:
    """A line that is new has the tests of all lines that it replaces and of their two neighbours."""
    moved: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    for kind, old, old_end, new, new_end in matcher.get_opcodes():
        if kind == "equal":
            moved |= {new + k + 1: lines[old + k + 1] for k in range(old_end - old) if old + k + 1 in lines}
            continue
        near = 0
        for line in range(old, old_end + 2):
            near |= lines.get(line, 0)
        moved |= {line + 1: near for line in range(new, new_end) if near}
    return moved


def digest_of(test_file: str) -> str:
    """Of a test file and the conftest.py files between it and tests/, whose own has no data."""
    path = ROOT / test_file
    folders = itertools.takewhile(lambda folder: folder != ROOT / "tests", path.parents)
    parts = [path, *(folder / "conftest.py" for folder in folders)]
    return xxhash.xxh3_64_hexdigest(b"\0".join(part.read_bytes() for part in parts if part.exists()))


def out_of_date(found: CoverageMap) -> list[str]:
    """MeasuredTest files that are new or changed since they were measured."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*/**/test_*.py"))
    return [name for name in files if found.digests.get(name) != digest_of(name)]


def chunks(test_files: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Test files by package and folder: the map is saved after each, so that an interruption loses one at most."""
    yield from (
        (name, list(of))
        for name, of in itertools.groupby(sorted(test_files), lambda file: "/".join(file.split("/")[:3]))
    )


def measure(found: CoverageMap, test_files: Sequence[str], workers: int) -> CoverageMap:
    """Run test files with coverage and put their tests into the map; tests of files that are gone are removed."""
    with tempfile.TemporaryDirectory(prefix="coverage-") as name:
        folder = Path(name)
        (folder / "coveragerc").write_text(config_text(ROOT, folder))
        arguments = ["-q", "-p", "tests.mutants.coverage_plugin", "-p", "no:cacheprovider", "--timeout=900"]
        arguments += ["-n", str(workers), "--dist", "loadscope", "--no-loadscope-reorder"]
        # periodic_save must be importable in every process.
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        environment = {**os.environ, FOLDER: str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        subprocess.run([sys.executable, "-m", "pytest", *arguments, *test_files], cwd=ROOT, env=environment)
        measured = dict(_read_tests(folder))
        _forget(found, set(test_files))
        numbers: dict[str, int] = {}
        for nodeid, test in measured.items():
            passed = test["outcome"] == "passed"
            found.tests.append(MeasuredTest(nodeid, test.get("setup", 0.0), test.get("call", 0.0), passed))
            for phase in PHASES:
                numbers[context_of(nodeid, phase)] = len(found.tests) - 1
        _add_lines(found, folder, numbers)
    again = {nodeid.partition("::")[0] for nodeid, test in measured.items() if test["outcome"] == "failed"}
    found.digests |= {name: digest_of(name) for name in test_files if name not in again}
    found.save()
    return found


def _read_tests(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.glob("tests.*.json")):
        yield from json.loads(path.read_text()).items()


def _forget(found: CoverageMap, test_files: set[str]) -> None:
    """Remove the tests of some files; the bits of the others move together."""
    kept = [
        n for n, test in enumerate(found.tests) if test.file not in test_files and (ROOT / test.file).exists()
    ]
    if len(kept) == len(found.tests):
        return
    found.tests = [found.tests[n] for n in kept]
    for of in found.lines.values():
        for line, bits in of.items():
            of[line] = sum((bits >> old & 1) << new for new, old in enumerate(kept))


def _add_lines(found: CoverageMap, folder: Path, numbers: dict[str, int]) -> None:
    """Add the lines of all data files. A line that runs in `setup` belongs to every test of the file.

    A fixture that serves a whole module runs in the setup of the first test that uses it.
    """
    of_file: dict[str, int] = {}
    for number, test in enumerate(found.tests):
        of_file[test.file] = of_file.get(test.file, 0) | 1 << number
    setups = {context_of(test.nodeid, "setup"): of_file[test.file] for test in found.tests}
    for path in sorted(folder.glob("data.*")):
        for measured, by_line in _read_contexts(path).items():
            name = str(Path(measured).relative_to(ROOT))
            found.texts.setdefault(name, Path(measured).read_text())
            lines = found.lines.setdefault(name, {})
            for line, contexts in by_line.items():
                for context in contexts:
                    context = context.rpartition("|")[2]  # of a forked process: "of its server|its own"
                    bits = setups.get(context) or (1 << numbers[context] if context in numbers else 0)
                    if bits:
                        lines[line] = lines.get(line, 0) | bits


def _read_contexts(path: Path) -> dict[str, dict[int, list[str]]]:
    """File -> line -> contexts of one process; nothing if it was killed while it wrote."""
    data = CoverageData(str(path))
    try:
        data.read()
        return {measured: data.contexts_by_lineno(measured) for measured in data.measured_files()}
    except CoverageException:
        return {}
