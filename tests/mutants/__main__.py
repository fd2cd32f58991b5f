"""`make mutants`: draw mutants of the core modules, run the tests that cover them, print score and survivors."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants import coverage_map, report, sampling
from tests.mutants.coverage_map import MAP, CoverageMap
from tests.mutants.mutations import Mutant
from tests.mutants.runner import Result, run_all

LAST = MAP.with_name("last.json")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants ARGS=...", description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="mutants to draw (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--modules", default="", help=f"groups, comma separated: {', '.join(sampling.CORE)}")
    parser.add_argument("--files", default="", help="draw only from these files, comma separated")
    parser.add_argument("--changed-since", metavar="COMMIT", help="only lines that changed since a commit")
    parser.add_argument(
        "--again", action="store_true", help="the survivors of the last run, on the present tests"
    )
    parser.add_argument("--seconds", type=float, default=90, help="of tests for one mutant, as measured (90)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument("--bar", type=float, default=0.0, help="exit with 1 below this score")
    parser.add_argument("--measure", action="store_true", help="only measure which tests run which lines")
    parser.add_argument("--tests", default="tests/", help="measure only these test files and folders")
    parser.add_argument("--no-measure", action="store_true", help="with the map as it is")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    return parser.parse_args(words)


def draw(options: argparse.Namespace) -> list[Mutant]:
    if options.again:
        return [_renewed(mutant) for mutant in report.read_survivors(LAST)]
    if options.changed_since:
        changed = sampling.changed_lines(options.changed_since)
        return sampling.sample(sorted(changed), options.sample, options.seed, changed)
    groups = [name.strip() for name in options.modules.split(",") if name.strip()] or list(sampling.CORE)
    unknown = [name for name in groups if name not in sampling.CORE]
    if unknown:
        sys.exit(f"--modules: {unknown[0]!r} is none of {', '.join(sampling.CORE)}")
    files = [name for name in options.files.split(",") if name] or sampling.files_of(groups)
    return sampling.sample(files, options.sample, options.seed)


def _renewed(mutant: Mutant) -> Mutant:
    """The same change of the present file, at the place nearest to the old one; the old file if the lines are gone."""
    text = (coverage_map.ROOT / mutant.path).read_text()
    lines, before = text.splitlines(), mutant.before.splitlines()
    places = [at for at in range(len(lines)) if lines[at : at + len(before)] == before]
    if not before or not places:
        return mutant
    at = min(places, key=lambda place: abs(place + 1 - mutant.line))
    source = "\n".join([*lines[:at], *mutant.after.splitlines(), *lines[at + len(before) :]]) + "\n"
    moved = at + 1 - mutant.line
    return dataclasses.replace(mutant, source=source, line=at + 1, statement=mutant.statement + moved)


def measured_map(options: argparse.Namespace) -> CoverageMap:
    found = coverage_map.load()
    stale = coverage_map.out_of_date(found)
    if options.no_measure:
        return found
    stale = [name for name in stale if name.startswith(tuple(options.tests.split(",")))]
    for name, test_files in coverage_map.chunks(stale):
        print(f"which lines do {len(test_files)} test files of {name} run?", flush=True)
        found = coverage_map.measure(found, test_files, options.jobs)
    return coverage_map.load()


def main(words: Sequence[str]) -> int:
    options = arguments(words)
    if options.list:
        print("\n\n".join(mutant.diff() for mutant in draw(options)))
        return 0
    found = measured_map(options)
    failed = [test.nodeid for test in found.tests if not test.passed]
    if failed:
        print(
            f"{len(failed)} tests failed or were skipped without mutants; they are not used, such as {failed[0]}"
        )
    if options.measure:
        return 0
    mutants, began = draw(options), time.monotonic()
    known = report.read_equivalents()
    number = itertools.count(1)

    def show(result: Result) -> None:
        print(report.line_of(next(number), len(mutants), result), flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        results = run_all(mutants, found, options.seconds, options.jobs, Path(folder), show)
    report.write_json(LAST, results, known)
    text, score = report.summary(results, known)
    print(text)
    print(f"{len(mutants)} mutants in {(time.monotonic() - began) / 60:.1f} minutes, seed {options.seed}")
    return int(score < options.bar)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}: {error.stderr}")
