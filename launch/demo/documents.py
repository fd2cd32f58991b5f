"""The demo's documents: the reference topics and docstrings of the Python that runs, read without importing it."""

from __future__ import annotations

import ast
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import xxhash

from data_pipeline.formats.refinedweb import Document

# Tests and programs, what other people installed, and pydoc_data, which is read as topics.
SKIPPED = frozenset(
    [
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "pydoc_data",
    ]
)
SHORTEST = 400  # characters of a document worth having
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents() -> Iterator[Document]:
    """Topics, then one document a module, both sorted by name; a docstring that was seen before is left out."""
    dump = f"CPython {platform.python_version()}"
    for name, text in topics():
        yield Document(content=text, url=f"python:topics/{name}", dump=dump, segment="topics")
    seen: set[int] = set()
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if SKIPPED.isdisjoint(path.parts):
            text = module_text(file, ".".join(path.with_suffix("").parts), seen)
            if len(text) >= SHORTEST:
                yield Document(
                    content=text, url=f"python:lib/{path.as_posix()}", dump=dump, segment="docstrings"
                )


def topics() -> list[tuple[str, str]]:
    """The language reference as pydoc shows it; empty where a distribution leaves it out."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:
        return []
    return sorted((name, text.strip()) for name, text in found.items())


def module_text(file: Path, name: str, seen: set[int]) -> str:
    """Docstrings of a module in the order of its source, each under its signature.

    `seen` holds hashes of docstrings that other documents have: a split by document would otherwise put the
    same words on both sides.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""  # templates and deliberately broken files
    parts = [f"{heading}\n\n{text}" for heading, text in _docstrings(tree, name) if _new(text, seen)]
    return "\n\n".join(parts)


def _new(text: str, seen: set[int]) -> bool:
    digest = xxhash.xxh64_intdigest(text.encode())
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        text = ast.get_docstring(node)
        if text:
            # A lone surrogate can be neither hashed nor written.
            yield _heading(node, name), text.encode("utf-8", "replace").decode()
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child, f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name)


def _heading(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return f"class {name}" if isinstance(node, ast.ClassDef) else name
