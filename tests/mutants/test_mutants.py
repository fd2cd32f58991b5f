"""The mutation tool: which mutants it makes, which tests it selects, and what it says of a run."""

from __future__ import annotations

import ast
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import report, runner, sampling
from tests.mutants.coverage_map import CoverageMap, MeasuredTest, _moved
from tests.mutants.mutations import Mutant, candidates
from tests.mutants.report import EQUIVALENTS, read_equivalents, reason_of, summary
from tests.mutants.runner import Result, run_all, select

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""A module."""

LIMIT = 4


def clip(values: list[float], low: float = 7.0) -> float:
    """Sum of the values, at most LIMIT."""
    total = sum(values[1:]) + low
    if total > LIMIT and low:
        print("too many values", total)
        values.clear()
        raise ValueError("too large a sum")
    return min(total, scale(low, 2)).copy()
'''


def after_of(line: int) -> set[str]:
    """The mutated lines of SOURCE whose first changed line is `line`."""
    mutants = [candidate.mutant() for candidate in candidates("a.py", SOURCE)]
    return {mutant.after.strip() for mutant in mutants if mutant is not None and mutant.line == line}


def test_operators_make_the_slips_they_are_for() -> None:
    assert {"LIMIT = 5", "LIMIT = 3", "LIMIT = None"} <= after_of(3)
    assert {
        "total = sum(values[1:])",
        "total = sum(values[:]) + low",
        "total = sum(values[1:]) - low",
    } <= after_of(8)
    assert {
        "if total >= LIMIT and low:", "if total > LIMIT or low:", "if total > LIMIT:", "if low:",
        "if not (total > LIMIT and low):",
    } <= after_of(9)  # fmt: skip
    assert after_of(11) == {"pass", "values"}
    assert "pass" in after_of(12)
    assert {
        "return max(total, scale(low, 2)).copy()", "return min(total, scale(2, low)).copy()",
        "return min(total, scale(low, 2))", "return min(total, scale(low, 3)).copy()",
        "return min(total, scale(low, )).copy()",
    } <= after_of(13)  # fmt: skip


def test_texts_annotations_and_symmetric_swaps_are_left_alone() -> None:
    mutants = [mutant for c in candidates("a.py", SOURCE) if (mutant := c.mutant()) is not None]
    assert {mutant.line for mutant in mutants} == {3, 6, 8, 9, 11, 12, 13}
    assert {mutant.line for mutant in mutants if mutant.on_import} == {3, 6}
    assert not any("XX" in mutant.after or "(scale(low, 2), total)" in mutant.after for mutant in mutants)
    assert {mutant.function for mutant in mutants} == {"", "clip"}
    assert {m.after.strip() for m in mutants if m.operator.endswith(" None") and m.line in (3, 8)} >= {
        "LIMIT = None", "total = None", "total = sum(None) + low"
    }  # fmt: skip
    assert not any(m.operator.endswith(" None") for m in mutants if "None" not in m.after)
    for mutant in mutants:
        ast.parse(mutant.source)
        assert mutant.source != SOURCE


def test_a_draw_is_repeatable_spread_over_the_files_and_without_doubles() -> None:
    files = sampling.files_of(["losses"])
    drawn = sampling.sample(files, 60, seed=3)
    assert [m.source for m in drawn] == [m.source for m in sampling.sample(files, 60, seed=3)]
    assert len({(m.path, m.source) for m in drawn}) == 60
    assert {m.path for m in drawn} == set(files)
    assert Counter(m.operator for m in drawn).most_common(1)[0][1] < 20
    lines = {files[0]: {drawn[0].statement}}
    assert {m.statement for m in sampling.sample(files, 5, 0, lines)} <= lines[files[0]]


def test_every_core_module_is_in_one_group() -> None:
    for name, places in sampling.CORE.items():
        assert all((ROOT / place).exists() for place in places), name
        assert all(sampling.group_of(path) == name for path in sampling.files_of([name]))


def mutant_at(line: int, on_import: bool = False, path: str = "pretrain/train/schedule.py") -> Mutant:
    return Mutant(path, line, line, "f", on_import, "number", "", "a = 1", "a = 2")


def test_near_and_fast_tests_run_first_and_what_does_not_fit_is_left_out() -> None:
    tests = [
        MeasuredTest("tests/dist/test_a.py::far", 1.0, 2.0, True),
        MeasuredTest("tests/pretrain/train/test_schedule.py::slow", 0.0, 5.0, True),
        MeasuredTest("tests/pretrain/train/test_session.py::near", 0.0, 0.1, True),
        MeasuredTest("tests/pretrain/train/test_schedule.py::fast", 0.0, 0.1, True),
        MeasuredTest("tests/pretrain/train/test_schedule.py::fails_anyway", 0.0, 0.1, False),
        MeasuredTest("tests/pretrain/train/test_schedule.py::other_line", 0.0, 0.1, True),
    ]
    found = CoverageMap(tests, {"pretrain/train/schedule.py": {7: 0b011111, 8: 0b100000}})
    names = [test.nodeid.partition("::")[2] for test in select(found, mutant_at(7), 100).tests]
    assert names == ["fast", "slow", "near", "far"]
    some = select(found, mutant_at(7), 2)
    assert [test.nodeid.partition("::")[2] for test in some.tests] == ["fast", "near"]
    assert some.left_out == 2
    assert select(found, mutant_at(9), 100).tests == []
    # A line at module level runs in every import; the map has only the tests that import it in a process of their own.
    for line in (8, 9):
        assert len(select(found, mutant_at(line, on_import=True), 100).tests) == 5


def test_lines_of_the_map_move_with_the_code() -> None:
    before, after = "a\nb\nc\nd\n", "new\na\nb\nchanged\nd\n"
    assert _moved({1: 1, 2: 2, 3: 4, 4: 8}, before, after) == {1: 1, 2: 1, 3: 2, 4: 2 | 4 | 8, 5: 8}


def test_listed_equivalents_are_of_the_present_code() -> None:
    """A line that has changed is a new mutant: look at it again."""
    known = read_equivalents()
    for one in known:
        present = "\n".join(["", *(line.strip() for line in (ROOT / one.path).read_text().splitlines()), ""])
        times = present.count(f"\n{one.before}\n")
        assert times == 1 or (times and one.function), f"{EQUIVALENTS.name}: {one.path}: {one.before}"
        assert one.before != one.after
    assert len({(one.path, one.function, one.before, one.after) for one in known}) == len(known)


def test_equivalents_are_counted_out_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "equivalents.yaml"
    path.write_text("same bits:\n  pretrain/train/schedule.py:\n    - ['  a = 1 ', a = 2]\n")
    known = read_equivalents(path)
    assert reason_of(mutant_at(1), known) == "same bits"
    assert reason_of(mutant_at(1, path="other.py"), known) is None
    results = [
        Result(mutant_at(1), "survived"), Result(mutant_at(1, path="pretrain/losses/x.py"), "survived"),
        Result(mutant_at(2), "killed"), Result(mutant_at(3), "timeout"),
    ]  # fmt: skip
    text, score = summary(results, known)
    assert score == 2 / 3
    assert "1 equivalent: same bits" in text
    assert "SURVIVED (no test runs the line) pretrain/losses/x.py:1" in text


def test_a_slip_is_noticed_only_by_a_test_that_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs: a mutant that a test notices, one that it does not, and a test that fails anyway."""
    monkeypatch.setattr(runner, "LIBRARIES", ["numpy"])
    path = "pretrain/train/schedule.py"
    source = (ROOT / path).read_text()
    rate = "return peak * (step + 1) / (warmup + 1)"
    text = "optimizer: write lr or lr_per_256"

    def changed(before: str, after: str) -> Mutant:
        line = source[: source.index(before)].count("\n") + 1
        return Mutant(
            path, line, line, "learning_rate", False, "test", source.replace(before, after), before, after
        )

    nodeid = "tests/pretrain/train/test_schedule.py::test_every_rate_equals_that_of_torch[0.0-4-3-linear]"
    found = CoverageMap([MeasuredTest(nodeid, 0.0, 0.1, True)], {path: dict.fromkeys(range(1, 50), 1)})
    mutants = [changed(rate, rate.replace("step + 1", "step")), changed(text, "x")]
    results = run_all(mutants, found, 60, 1, tmp_path, lambda result: None)
    assert [(r.status, r.killed_by) for r in results] == [("killed", nodeid), ("survived", "")]
    report.write_json(tmp_path / "last.json", results, [])
    assert report.read_survivors(tmp_path / "last.json") == [mutants[1]]


def test_a_copy_that_a_mutant_removed_is_whole_for_the_next_one(tmp_path: Path) -> None:
    copy = runner.Copy(tmp_path)
    changed, gone = copy.root / "pretrain/train/schedule.py", copy.root / "data_pipeline"
    before = {path: path.read_bytes() for path in (changed, gone / "hashing.py", copy.root / ".ci/run")}
    with copy.mutated(mutant_at(1)):
        assert changed.read_bytes() != before[changed]
        shutil.rmtree(gone)
        (copy.root / ".venv").unlink()
        (copy.root / ".ci/run").write_text("exit 1")
    assert {path: path.read_bytes() for path in before} == before
    assert os.access(copy.root / ".ci/run", os.X_OK)
    assert (copy.root / ".venv").is_symlink()
