"""The demo's documents: language reference and docstrings of the running CPython, read without imports."""

from __future__ import annotations

import ast
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import xxhash

from data_pipeline.formats.refinedweb import Document

# Tests, programs, third-party packages, and pydoc_data, which `topics` reads.
SKIPPED_FOLDERS = frozenset(
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
MIN_CHARACTERS = 400  # of a document; shorter modules are left out
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents() -> Iterator[Document]:
    """Yield the topics, then one document per module, both sorted by name. A repeated docstring is left out."""
    dump = f"CPython {platform.python_version()}"
    for name, text in topics():
        yield Document(content=text, url=f"python:topics/{name}", dump=dump, segment="topics")
    seen_hashes: set[int] = set()
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(path.parts):
            text = module_text(file, ".".join(path.with_suffix("").parts), seen_hashes)
            if len(text) >= MIN_CHARACTERS:
                yield Document(
                    content=text, url=f"python:lib/{path.as_posix()}", dump=dump, segment="docstrings"
                )


def topics() -> list[tuple[str, str]]:
    """Return (name, text) of the language reference of pydoc; an empty list if this Python lacks it."""
    try:
        from pydoc_data.topics import topics as topic_texts
    except ImportError:
        return []
    return sorted((name, text.strip()) for name, text in topic_texts.items())


def module_text(file: Path, name: str, seen_hashes: set[int]) -> str:
    """Return the docstrings of a module in source order, each below its signature.

    `seen_hashes` has the hashes of the docstrings of earlier documents, and is extended: a repeated docstring could be
    in both splits.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""  # templates and deliberately broken files
    parts = [
        f"{heading}\n\n{text}" for heading, text in _docstrings(tree, name) if _is_new(text, seen_hashes)
    ]
    return "\n\n".join(parts)


def _is_new(text: str, seen_hashes: set[int]) -> bool:
    digest = xxhash.xxh64_intdigest(text.encode())
    if digest in seen_hashes:
        return False
    seen_hashes.add(digest)
    return True


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        text = ast.get_docstring(node)
        if text:
            # Replaces lone surrogates, which cannot be encoded as UTF-8.
            yield _heading(node, name), text.encode("utf-8", "replace").decode()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):  # holds no definition
            continue
        yield from _docstrings(child, f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name)


def _heading(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return f"class {name}" if isinstance(node, ast.ClassDef) else name
