"""Strict YAML: safe types only, duplicate keys are errors, and every key keeps its line number."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError

Key = tuple[str, ...]
# Deeper nesting of brackets or dashes is read by the Python parser: libyaml would overflow the stack instead of
# raising an error.
FAST_DEPTH = 2000


@dataclass
class Document:
    """A YAML mapping and the line number of each of its keys, by the key's path from the top."""

    path: str
    values: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)

    def line(self, key: Key) -> int | None:
        """Line number of a key, from 1; None for a key that the file does not hold."""
        return self.lines.get(key)

    def location(self, *key: str) -> str:
        """`recipe.yaml:12: data.pairs`, for messages."""
        line = self.line(key)
        return f"{self.path}{f':{line}' if line else ''}: {'.'.join(key)}"


def load_yaml(path: str | Path, noun: str = "recipe") -> Document:
    """Read a file that holds one mapping. UserErrors name the file and line, and call the file a `noun`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such {noun}; the path is relative to {Path.cwd()}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the {noun}'s YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        values, lines = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context or "not YAML"
        if problem == "but found another document":
            problem = f"a second YAML document begins here (after ---); put each {noun} into its own file"
        raise UserError(f"{path}{line}: {problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        content = "sections (run, data, model, ...)" if noun == "recipe" else "keys"
        raise UserError(f"{path}: a {noun} must be a map of {content}; found a {type(values).__name__}")
    return Document(str(path), values, lines)


def parse_scalar(text: str) -> Any:
    """The value of `KEY=VALUE` on a command line, parsed as YAML."""
    return yaml.load(text, Loader=_Loader)


def whole_value(text: str) -> Any:
    """`parse_scalar`, but no part of the text is lost: YAML ends a value at ` #`, and drops `&name` and `!tag`.

    A text whose end YAML takes for a comment, such as a folder `set #1`, is returned whole. Raises ValueError for
    another value of which YAML would keep less than is written.
    """
    value = parse_scalar(text)
    if "#" not in text and "&" not in text and "!" not in text:
        return value
    outer = (yaml.StreamStartToken, yaml.StreamEndToken, yaml.BlockEndToken)
    tokens = [token for token in yaml.scan(text, Loader=yaml.SafeLoader) if not isinstance(token, outer)]
    is_marked = any(isinstance(token, yaml.AnchorToken | yaml.TagToken) for token in tokens)
    kept = text[: tokens[-1].end_mark.index] if tokens else ""
    dropped = text[len(kept) :].strip()
    if not is_marked and dropped.startswith("#"):
        is_plain = len(tokens) == 1 and isinstance(tokens[0], yaml.ScalarToken) and tokens[0].plain
        if not tokens or (is_plain and isinstance(value, str)):
            return text.strip()
    inner = "#" in text and any(
        "#" in text[first.end_mark.index : second.start_mark.index]
        for first, second in itertools.pairwise(tokens)
    )
    if is_marked or dropped or inner:
        raise ValueError(
            "YAML reads it with a comment, an anchor or a tag; write the value in quotes: 'KEY=\"VALUE\"'"
        )
    return value


class _Strict(yaml.constructor.SafeConstructor):
    """Constructs mappings whose keys are unique strings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        first_line: dict[str, int] = {}
        for key in own:
            name, line = self._name(key), key.start_mark.line + 1
            if name in first_line:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {name!r} is written twice (first in line {first_line[name]})",
                    key.start_mark,
                )
            first_line[name] = line
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
    """SafeLoader with unique string keys that reads 1e-4 as a number."""


def _construct_map(loader: _Strict, node: yaml.MappingNode) -> dict[Hashable, Any]:
    return loader.construct_mapping(node, deep=True)


def _configure(loader: Any) -> Any:
    """Register the strict mappings and the number format on a loader class; returns the class."""
    loader.add_constructor("tag:yaml.org,2002:map", _construct_map)
    # YAML 1.1 reads 1e-4 as text; in a learning rate or rms_norm_eps it is always meant as a number.
    exponent = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return loader


_configure(_Loader)
# libyaml parses about ten times as fast, but PyYAML is not built with it everywhere.
_FastLoader: Any = (
    _configure(type("_FastLoader", (_Strict, yaml.CSafeLoader), {}))
    if hasattr(yaml, "CSafeLoader")
    else _Loader
)


def _parse(text: str) -> tuple[Any, dict[Key, int]]:
    """The value of a YAML text, and the line number of every key."""
    max_depth = text.count("[") + text.count("{") + max(map(len, text.splitlines()), default=0)
    loader = (_FastLoader if max_depth < FAST_DEPTH else _Loader)(text)
    lines: dict[Key, int] = {}
    try:
        node = loader.get_single_node()
        _collect_lines(node, (), lines)
        return (None if node is None else loader.construct_document(node)), lines
    except (yaml.YAMLError, RecursionError):
        # The parser in Python has the better message for the same mistake: it names the character or the alias.
        yaml.load(text, Loader=_Loader)
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
