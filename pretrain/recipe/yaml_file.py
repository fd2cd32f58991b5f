"""YAML read strictly: safe types only, a key written twice is an error, and every key remembers its line."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError

Key = tuple[str, ...]


@dataclass
class Document:
    """A YAML mapping and the line of each of its keys, by path from the top."""

    path: str
    values: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)

    def line(self, key: Key) -> int | None:
        return self.lines.get(key)


class _Strict(yaml.constructor.SafeConstructor):
    """Constructs mappings whose keys are unique strings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen: dict[str, int] = {}
        for key in own:
            name, line = self._name(key), key.start_mark.line + 1
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {name!r} is written twice (first in line {seen[name]})",
                    key.start_mark,
                )
            seen[name] = line
        self.flatten_mapping(node)
        return {self._name(key): self.construct_object(value, deep=True) for key, value in node.value}

    def _name(self, key: yaml.Node) -> str:
        value = self.construct_object(key, deep=True)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"the key {getattr(key, 'value', value)!r} is not a plain name; put it in quotes",
                key.start_mark,
            )
        return str(value)


class _Loader(_Strict, yaml.SafeLoader):
    """SafeLoader whose mapping keys are unique strings, and for which 1e-4 is a number."""


def _construct_map(loader: _Strict, node: yaml.MappingNode) -> dict[Hashable, Any]:
    return loader.construct_mapping(node, deep=True)


def _prepared(loader: Any) -> Any:
    loader.add_constructor("tag:yaml.org,2002:map", _construct_map)
    # YAML 1.1 reads 1e-4 as text, which no one who writes a learning rate or rms_norm_eps means.
    exponent = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return loader


_prepared(_Loader)
# libyaml parses some ten times as fast, and is not everywhere.
_FastLoader: Any = (
    _prepared(type("_FastLoader", (_Strict, yaml.CSafeLoader), {}))
    if hasattr(yaml, "CSafeLoader")
    else _Loader
)
FAST_DEPTH = 2000  # libyaml's composer overflows the stack where the one in Python raises an error


def parse_scalar(text: str) -> Any:
    """The value of `KEY=VALUE` on a command line, read as YAML."""
    return yaml.load(text, Loader=_Loader)


def load_yaml(path: str | Path, what: str = "recipe") -> Document:
    """Read one mapping; UserError names file and line of what is wrong, and calls the file a `what`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}; the path is relative to {Path.cwd()}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the {what}'s YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        values, lines = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        why = error.problem or error.context or "not YAML"
        if why == "but found another document":
            why = (
                f"here a second document begins (after ---); a {what} is one: put each into a file of its own"
            )
        raise UserError(f"{path}{line}: {why}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        sections = "sections (run, data, model, ...)" if what == "recipe" else "keys"
        raise UserError(f"{path}: a {what} is a map of {sections}, this is {type(values).__name__}")
    return Document(str(path), values, lines)


def _parse(text: str) -> tuple[Any, dict[Key, int]]:
    """Values and lines."""
    deepest = text.count("[") + text.count("{") + max(map(len, text.splitlines()), default=0)
    loader = (_FastLoader if deepest < FAST_DEPTH else _Loader)(text)
    lines: dict[Key, int] = {}
    try:
        node = loader.get_single_node()
        _collect_lines(node, (), lines)
        return (None if node is None else loader.construct_document(node)), lines
    except (yaml.YAMLError, RecursionError):
        yaml.load(text, Loader=_Loader)  # says more of the same mistake: which character, which alias
        raise


def _collect_lines(node: yaml.Node | None, at: Key, lines: dict[Key, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*at, str(key.value))
            lines[inner] = key.start_mark.line + 1
            _collect_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*at, str(index))
            lines[inner] = value.start_mark.line + 1
            _collect_lines(value, inner, lines)
