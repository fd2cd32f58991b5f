"""The layout's rules: which folder may import which, no circles, and how large a folder, a file or a function may be.

`docs/architecture.md` explains the tables; change both together.
"""

from __future__ import annotations

import ast
import warnings
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "pretrain", "launch")
MAX_FILES_IN_A_FOLDER = 14
MAX_LINES_IN_A_FILE = 600
MANY_LINES = 400
MAX_LINES_IN_A_FUNCTION = 60
LONG_FUNCTIONS = 4  # so many may be longer, up to MAX_LINES_IN_ANY_FUNCTION
MAX_LINES_IN_ANY_FUNCTION = 75

# Left may import right. A unit is a folder or a file directly below the table's folder; all of them may import "*".
MAY_IMPORT = {
    "data_pipeline": {
        "*": "errors hashing activity child_process native text_encoding",
        "stream": "loader workers batches transforms order storage",
        "loader": "workers batches sources order storage",
        "workers": "batches",
        "batches": "sources transforms order storage",
        "index": "sources storage",
        "formats": "sources storage",
        "show": "formats sources transforms storage",
        "prepare": "formats index sources transforms storage",
        "sources": "order storage",
        "transforms": "",
        "order": "",
        "storage": "",
    },
    "pretrain": {
        "*": "",
        "merge_stage": "merge evaluate build weights run recipe",
        "train": "evaluate build objectives distributed run recipe",
        "export": "build objectives models recipe",
        "evaluate": "build objectives losses distributed recipe",
        "build": "objectives models weights run recipe",
        "objectives": "models losses recipe",
        "merge": "weights run recipe",
        "models": "losses recipe",
        "losses": "distributed",
        "distributed": "",
        "weights": "run",
        "report": "run",
        "run": "recipe",
        "recipe": "",
    },
    "pretrain/merge": {
        "*": "merge_plan",
        "sweeps": "execute output planning figures",
        "verify": "spec output planning methods diff vocabulary",
        "execute": "output planning",
        "spec": "mergekit planning",
        "mergekit": "planning vocabulary",
        "output": "planning methods",
        "planning": "vocabulary",
        "diff": "methods figures",
        "methods": "",
        "vocabulary": "",
        "figures": "",
    },
    "launch": {
        "*": "job cluster environment",
        "cli": "demo run status data_check supervise",
        "demo": "run",
        "run": "local slurm ray preflight run_lock stage_state",
        "local": "ray supervise run_folder run_lock stage_state",
        "slurm": "ray supervise run_folder run_lock stage_state",
        "ray": "supervise preflight run_folder run_lock",
        "supervise": "stage_state",
        "preflight": "stage_state data_check",
        "run_folder": "environment",
        "run_lock": "supervise",
        "stage_state": "",
        "data_check": "",
        "status": "",
    },
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def files() -> dict[str, ast.Module]:
    """Every Python file of the packages, parsed."""
    found = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in found}


def module_file(module: str) -> str | None:
    """The file of a dotted module; None for a name that is no module of ours."""
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in files()), None)


@cache
def imports(name: str) -> frozenset[tuple[str, int]]:
    """Files that a file imports, with the line: at module level, inside functions and for type checking alike."""
    found = set()
    for node in ast.walk(files()[name]):
        if isinstance(node, ast.Import):
            found |= {(module_file(alias.name), node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # `from a import b`: the module a.b, else the module a
                target = module_file(f"{node.module}.{alias.name}") or module_file(str(node.module))
                found.add((target, node.lineno))
    return frozenset((target, line) for target, line in found if target is not None and target != name)


def unit(name: str, folder: str) -> str | None:
    """The unit of a file below a folder; None where the file is not below it, or is the folder's own __init__."""
    if not name.startswith(folder + "/"):
        return None
    first = name.removeprefix(folder + "/").split("/")[0].removesuffix(".py")
    return None if first == "__init__" else first


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_rooms_import_only_what_the_table_allows(folder: str) -> None:
    table = {left: set(right.split()) for left, right in MAY_IMPORT[folder].items()}
    ground = table.pop("*")
    wrong = []
    for name in files():
        here = unit(name, folder)
        if here is None:
            continue
        if here in ground:
            allowed = ground
        else:
            assert here in table, f"{name}: {here} is not in the table of {folder}"
            allowed = table[here] | ground
        for target, line in sorted(imports(name)):
            there = unit(target, folder)
            if there is not None and there != here and there not in allowed:
                wrong.append(f"{name}:{line} imports {target}: {here} may not import {there}")
    assert not wrong, "\n".join(wrong)


def test_the_tables_name_no_room_that_is_not_there() -> None:
    for folder, table in MAY_IMPORT.items():
        there = {unit(name, folder) for name in files()}
        named = {left for left in table if left != "*"} | set(" ".join(table.values()).split())
        assert not named - there, f"{folder}: {', '.join(sorted(named - there))}"


def test_no_circles() -> None:
    sorter = TopologicalSorter({name: {target for target, _ in imports(name)} for name in files()})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail("circle: " + " -> ".join(error.args[1]))


def test_no_folder_is_crowded() -> None:
    counts = Counter(name.rpartition("/")[0] for name in files() if not name.endswith("__init__.py"))
    crowded = {folder: count for folder, count in counts.items() if count > MAX_FILES_IN_A_FOLDER}
    assert not crowded


def test_no_file_is_too_long() -> None:
    """Above 400 lines a warning, above 600 a failure."""
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in files()}
    long = {name: count for name, count in lengths.items() if count > MANY_LINES}
    if long:
        warnings.warn(f"files of more than {MANY_LINES} lines: {long}", stacklevel=1)
    assert not {name: count for name, count in long.items() if count > MAX_LINES_IN_A_FILE}


def test_few_functions_are_long() -> None:
    longer: dict[str, int] = defaultdict(int)
    for name, tree in files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_LINES_IN_A_FUNCTION:
                    longer[f"{name}:{node.lineno} {node.name}"] = lines
    assert len(longer) <= LONG_FUNCTIONS, dict(longer)
    assert max(longer.values(), default=0) <= MAX_LINES_IN_ANY_FUNCTION, dict(longer)
