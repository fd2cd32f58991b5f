"""Scores by module, the survivors with their diffs, and the list of equivalent mutants."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.mutants.mutations import Mutant
from tests.mutants.runner import Result
from tests.mutants.sampling import group_of

EQUIVALENTS = Path(__file__).with_name("equivalents.yaml")


@dataclass(frozen=True)
class Equivalent:
    """A mutant that no test can tell from the code, or that only changes what is not a result; and why."""

    path: str
    before: str
    after: str
    reason: str
    function: str = ""  # needed where the lines before occur in several functions


def read_equivalents(path: Path = EQUIVALENTS) -> list[Equivalent]:
    """equivalents.yaml: reason -> file -> [lines before, lines after] or [before, after, function].

    White space at the ends of lines is ignored.
    """
    found = []
    for reason, files in (yaml.safe_load(path.read_text()) or {}).items():
        for name, pairs in files.items():
            found += [Equivalent(name, _plain(a), _plain(b), reason, *function) for a, b, *function in pairs]
    return found


def _plain(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def reason_of(mutant: Mutant, known: Sequence[Equivalent]) -> str | None:
    """Why a mutant is equivalent; None when it is not listed."""
    key = (mutant.path, _plain(mutant.before), _plain(mutant.after))
    for one in known:
        if (one.path, one.before, one.after) == key and one.function in ("", mutant.function):
            return one.reason
    return None


def line_of(number: int, total: int, result: Result) -> str:
    """One line for a finished mutant."""
    mutant = result.mutant
    how = f" by {result.killed_by}" if result.killed_by else ""
    place = f"{mutant.path}:{mutant.line} ({mutant.operator})"
    return f"{number:4}/{total} {result.status:9} {result.seconds:6.1f} s  {place}{how}"


def summary(results: Sequence[Result], known: Sequence[Equivalent]) -> tuple[str, float]:
    """The report's text, and the score: killed / (all - equivalent)."""
    reasons = {id(r): reason_of(r.mutant, known) for r in results if not r.is_killed}
    survivors = [r for r in results if not r.is_killed and not reasons[id(r)]]
    equivalent = Counter(reason for reason in reasons.values() if reason)
    by_group: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for result in results:
        if result.is_killed or not reasons[id(result)]:
            counts = by_group[group_of(result.mutant.path)]
            counts[0] += result.is_killed
            counts[1] += 1
    lines = []
    for result in survivors:
        ran = (
            f"{result.tests} tests, {result.test_seconds:.0f} s" if result.tests else "no test runs the line"
        )
        lines += ["", f"SURVIVED ({ran}) {result.mutant.diff()}"]
    lines += ["", "module            killed  of  score"]
    for name, (killed, number) in sorted(by_group.items()):
        lines.append(f"{name:16} {killed:7} {number:3}  {killed / number:5.0%}")
    killed, number = (sum(counts[k] for counts in by_group.values()) for k in (0, 1))
    score = killed / number if number else 1.0
    lines.append(f"{'all':16} {killed:7} {number:3}  {score:6.1%}")
    harder = [
        r for r in results if not r.mutant.operator.endswith(" None") and (r.is_killed or not reasons[id(r)])
    ]
    noticed = sum(result.is_killed for result in harder)
    if len(harder) < number:
        lines.append(f"{'without None':16} {noticed:7} {len(harder):3}  {noticed / max(1, len(harder)):6.1%}")
    timeouts = sum(result.status == "timeout" for result in results)
    if timeouts:
        lines.append(f"{timeouts} of the killed did not end in time")
    lines += [f"{count} equivalent: {reason}" for reason, count in sorted(equivalent.items())]
    return "\n".join(lines), score


def write_json(path: Path, results: Sequence[Result], known: Sequence[Equivalent]) -> None:
    """All results, with the mutated files, so that survivors can be run again."""
    content = [
        {
            **{name: getattr(r.mutant, name) for name in Mutant.__dataclass_fields__},
            "status": r.status, "seconds": round(r.seconds, 2), "tests": r.tests, "killed_by": r.killed_by,
            "equivalent": None if r.is_killed else reason_of(r.mutant, known), "output": r.output[-2000:],
        }
        for r in results
    ]  # fmt: skip
    path.write_text(json.dumps(content, indent=1))


def read_survivors(path: Path) -> list[Mutant]:
    """The mutants of a result file that were not killed and are not equivalent."""
    fields = Mutant.__dataclass_fields__
    return [
        Mutant(**{name: row[name] for name in fields})
        for row in json.loads(path.read_text())
        if row["status"] in ("survived", "uncovered") and not row["equivalent"]
    ]
