"""The core modules, and which of their mutants are drawn."""

from __future__ import annotations

import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.mutants.mutations import Candidate, Mutant, candidates

ROOT = Path(__file__).resolve().parents[2]
# Group -> files and folders. What decides which samples are read, what is learnt from them, and what is kept.
CORE = {
    "order": ["data_pipeline/hashing.py", "data_pipeline/order"],
    "sources": ["data_pipeline/sources"],
    "transforms": ["data_pipeline/transforms"],
    "batches": ["data_pipeline/batches"],
    "workers": ["data_pipeline/workers", "data_pipeline/loader"],
    "storage": ["data_pipeline/storage"],
    "losses": ["pretrain/losses"],
    "models": ["pretrain/models"],
    "objectives": ["pretrain/objectives", "pretrain/build"],
    "engine": ["pretrain/distributed"],
    "trainer": ["pretrain/train"],
    "evaluation": ["pretrain/evaluate"],
    "merge methods": ["pretrain/merge/methods"],
    "journal": [
        "pretrain/merge/output/journal.py",
        "pretrain/merge/output/resumed_folder.py",
        "pretrain/run",
    ],
    "launch": ["launch/supervise", "launch/slurm", "launch/ray", "launch/stage_state.py"],
}


def group_of(path: str) -> str:
    return next((name for name, places in CORE.items() if path.startswith(tuple(places))), "other")


def files_of(groups: Sequence[str]) -> list[str]:
    """The Python files of the groups."""
    found = []
    for name in groups:
        for place in CORE[name]:
            path = ROOT / place
            found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"]


def changed_lines(reference: str) -> dict[str, set[int]]:
    """Lines of the packages' files that are new or changed since a commit."""
    command = ["git", "diff", "-U0", "--no-color", reference, "--", "data_pipeline", "pretrain", "launch"]
    diff = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found: dict[str, set[int]] = defaultdict(set)
    path = ""
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ b/")
        elif place := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, number = int(place[1]), int(place[2] or 1)
            found[path] |= set(range(first, first + number))
    return {name: lines for name, lines in found.items() if name.endswith(".py") and lines}


def sample(
    files: Sequence[str], number: int, seed: int, only: dict[str, set[int]] | None = None
) -> list[Mutant]:
    """`number` different mutants: a statement is drawn, then an operator that applies to it, then one of its changes.

    So every statement has the same chance, and operators with many variants do not dominate. `only`: lines by file.
    """
    statements = [
        by_operator
        for path in files
        for line, by_operator in _by_statement(path)
        if only is None or line in only.get(path, ())
    ]
    draw = random.Random(seed)
    found: dict[tuple[str, str], Mutant] = {}
    tries = 0
    while len(found) < number and statements and tries < 50 * number:
        tries += 1
        by_operator = draw.choice(statements)
        of_operator = by_operator[draw.choice(sorted(by_operator))]
        mutant = draw.choice(of_operator).mutant()
        if mutant is not None:
            found.setdefault((mutant.path, mutant.source), mutant)
    return list(found.values())


def _by_statement(path: str) -> Iterator[tuple[int, dict[str, list[Candidate]]]]:
    found: dict[int, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for candidate in candidates(path, (ROOT / path).read_text()):
        found[candidate.statement][candidate.operator].append(candidate)
    yield from sorted(found.items())
