"""The pages beside the code: links and paths lead somewhere, and the architecture page shows the rules that hold."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from docs import draw_architecture
from tests.test_layout import MAY_IMPORT

ROOT = Path(__file__).resolve().parent.parent
# CHANGELOG.md and docs/log.md tell of the past: a path in them may be gone.
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]
TOPS = "benchmarks|configs|data_pipeline|docs|launch|pretrain|tests"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@each_page
def test_paths_are_there(page: Path) -> None:
    paths = re.findall(rf"(?<![\w/.-])((?:{TOPS})/[\w./-]*[\w/])", page.read_text())
    assert not [path for path in paths if not (ROOT / path).exists()]


@each_page
def test_python_names_are_there(page: Path) -> None:
    """`package.module.name` in backticks can be imported."""
    for name in re.findall(r"`((?:data_pipeline|pretrain|launch)(?:\.\w+)+)[`(]", page.read_text()):
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:count]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[count:]:
            assert hasattr(found, part), f"{page.name}: {name}"
            found = getattr(found, part)


def test_the_architecture_page_has_the_import_tables() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for folder, table in MAY_IMPORT.items():
        section = text.partition(f"| {folder}/ | may import |\n")[2].partition("\n\n")[0]
        rows = re.findall(r"^\| ([\w, ]+) \| ([\w, ]*?) ?\|$", section, re.MULTILINE)
        shown = {room: set(right.split(", ")) - {""} for left, right in rows for room in left.split(", ")}
        assert shown == {left: set(right.split()) for left, right in table.items() if left != "*"}, folder
        shared = re.findall(rf"^Every module of `{folder}` may import: ([\w, ]+)\.$", text, re.MULTILINE)
        assert [set(names.split(", ")) for names in shared] == (
            [set(table["*"].split())] if table["*"] else []
        )


def test_the_picture_is_of_the_import_tables() -> None:
    assert draw_architecture.OUT.read_text() == draw_architecture.draw(), (
        "run: python -m docs.draw_architecture"
    )


def test_the_walk_names_functions_that_are_there() -> None:
    """In the architecture page, `path/file.py` is followed by the names that it defines, in brackets."""
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.py)` \(((?:`[\w.]+`(?:, )?)+)\)", text)
    assert len(named) > 10
    for path, names in named:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            found = module
            for part in name.split("."):
                assert hasattr(found, part), f"{path}: {name}"
                found = getattr(found, part)
