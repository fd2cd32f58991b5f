"""Names of parameters: regular expressions over them, short names of a model's parts, and many names on one line."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

# Short name -> regular expression that stands for it. The names are those of the modules in pretrain/models.
SHORT_NAMES = {
    "vision": r"(visual|vision)\..*",
    "text": r"(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection(\..*)?",
    "connector": r"connector\..*|(start|end)_image",
    "llm": r"llm\..*",
}
# Parameters whose name is a single word; every other name has a dot.
SINGLE_WORDS = ("logit_scale", "positional_embedding", "text_projection", "start_image", "end_image")
NEAREST = 3


def matching(expression: str, names: Iterable[str]) -> list[str]:
    """The names that an expression matches as a whole; a key of SHORT_NAMES stands for its regular expression."""
    pattern = re.compile(SHORT_NAMES.get(expression, expression))
    return [name for name in names if pattern.fullmatch(name)]


def expression_mistake(expression: str) -> str | None:
    """Why an expression can match no parameter of any model, as far as its text tells; None if it may match one."""
    try:
        re.compile(expression)
    except re.error as error:
        return f"{expression!r} is not a valid regular expression: {error}"
    if re.fullmatch(r"\w*", expression) and expression not in (*SHORT_NAMES, *SINGLE_WORDS):
        close = difflib.get_close_matches(expression, [*SHORT_NAMES, *SINGLE_WORDS], n=1)
        suggestion = f"; did you mean {close[0]!r}?" if close else "."
        return (
            f"{expression!r} matches no parameter{suggestion} Write {', '.join(SHORT_NAMES)}, or a regular expression "
            r"that matches whole names, such as 'llm\.model\.layers\.0\..*'"
        )
    return None


def no_match(expression: str, names: Collection[str]) -> str:
    """The message for an expression that matches none of the names, with the nearest names, and short names."""
    parts = [short for short in SHORT_NAMES if matching(short, names)]
    prefixes = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3)}
    plain = re.sub(r"\.?[*+?]|[\\^$()|\[\]{}]", "", expression)
    candidates = sorted({*names, *prefixes, *parts})
    nearest = difflib.get_close_matches(plain, candidates, n=NEAREST, cutoff=0.0)
    short_names = ", ".join(parts) or "none"
    return f"{expression!r} matches no parameter; nearest: {', '.join(nearest)}; short names: {short_names}"


def folded(names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Names on few lines: `llm.model.layers.{1..2}.* (18 tensors)`, `connector.* (4 tensors)`, `start_image`.

    `X.*` stands only for names of the list: none of `others` begins with `X.`.
    """
    lines = []
    for shape, members in _families(names, others).items():
        text = ".".join(
            part if part != "#" else _span(numbers) for part, numbers in _positions(shape, members)
        )
        count = sum(len(found) for found in members.values())
        lines.append(text if count == 1 else f"{text} ({count} tensors)")
    return sorted(lines)


def expressions(names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Regular expressions, one per line of `folded`, that match the names and none of `others`."""
    found = []
    for shape, members in _families(names, others).items():
        parts: list[str] = []
        for part, numbers in _positions(shape, members):
            if part == "#":
                parts.append(str(numbers[0]) if len(numbers) == 1 else f"({'|'.join(map(str, numbers))})")
            else:
                parts.append(".*" if part == "*" else re.escape(part))
        found.append(r"\.".join(parts))
    return sorted(found)


def _families(
    names: Iterable[str], others: Iterable[str]
) -> dict[tuple[str, ...], dict[tuple[int, ...], list[str]]]:
    """Shape (`#` for a number, a last `*` for a whole module) -> numbers at the `#`s -> names.

    A family is a full grid of its numbers; a shape whose numbers are not is split by its numbers but the last.
    """
    taken = {prefix for name in others for prefix in _prefixes(name)}
    modules: dict[str, list[str]] = defaultdict(list)
    for name in names:
        modules[next((prefix for prefix in _prefixes(name) if prefix not in taken), name)].append(name)
    grouped: dict[tuple[str, ...], dict[tuple[int, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, inside in modules.items():
        parts = [*module.split("."), "*"] if len(inside) > 1 else inside[0].split(".")
        shape = tuple("#" if part.isdigit() else part for part in parts)
        grouped[shape][tuple(int(part) for part in parts if part.isdigit())] += inside
    families: dict[tuple[str, ...], dict[tuple[int, ...], list[str]]] = {}
    for shape, members in grouped.items():
        for numbers, found in members.items():
            fixed = iter(numbers[:-1])  # only the last number varies within a line
            last = shape[::-1].index("#") if numbers else 0
            at = len(shape) - 1 - last
            key = tuple(str(next(fixed)) if part == "#" and i != at else part for i, part in enumerate(shape))
            families.setdefault(key, {})[numbers[-1:]] = found
    return families


def _prefixes(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`: the modules around a parameter."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _positions(shape: Sequence[str], members: Collection[tuple[int, ...]]) -> list[tuple[str, list[int]]]:
    """(part, its numbers if the part is `#`)."""
    return [(part, sorted(number[0] for number in members) if part == "#" else []) for part in shape]


def _span(numbers: Sequence[int]) -> str:
    """`3`, `{1..2}` or `{0,2,5}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"
