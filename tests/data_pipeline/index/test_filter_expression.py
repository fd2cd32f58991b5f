"""Filter expressions against the same conditions in Python; syntax errors are located, and no code is executed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.index.filter_expression import parse

ROWS: list[dict[str, Any]] = [
    {"width": 256, "HEIGHT": 100.0, "nsfw": "UNLIKELY", "similarity": 0.31, "ok": True, "odd name": 1},
    {"width": 512, "HEIGHT": 600.0, "nsfw": "NSFW", "similarity": 0.2, "ok": False, "odd name": 2},
    {"width": None, "HEIGHT": 300.0, "nsfw": None, "similarity": None, "ok": None, "odd name": 3},
    {"width": 300, "HEIGHT": 299.5, "nsfw": 'it\'s "odd"', "similarity": 0.5, "ok": True, "odd name": 4},
]
TABLE = pa.Table.from_pylist(ROWS)


def kept(expression: str) -> list[int]:
    return [number for number, keep in enumerate(parse(expression).mask(TABLE)) if keep]


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("similarity > 0.3 and width >= 256", [0, 3]),
        ("SIMILARITY>.3AND width>=256", None),
        ("Similarity > 3e-1", [0, 3]),
        ("width >= height", [0, 3]),
        ("nsfw = 'UNLIKELY'", [0]),
        ("nsfw == 'UNLIKELY' or similarity <= 0.2", [0, 1]),
        ("nsfw in ['UNLIKELY', \"NSFW\"]", [0, 1]),
        ("nsfw not in ['UNLIKELY']", [1, 3]),
        ("not nsfw in ['UNLIKELY']", [1, 3]),
        ("nsfw = 'it\\'s \"odd\"'", [3]),
        ("width is null", [2]),
        ("width is not null", [0, 1, 3]),
        ("not width is null", [0, 1, 3]),
        ("width != 256", [1, 3]),
        ("not (width = 256)", [1, 3]),
        ("ok", [0, 3]),
        ("not ok", [1]),
        ("ok = true", [0, 3]),
        ("true", [0, 1, 2, 3]),
        ("`odd name` in [1, 3]", [0, 2]),
        ("width < 400 and (nsfw = 'x' or height > 200) and not ok = false", [3]),
        ("width = 256 or width is null and ok", [0]),
        ("width is null or width > 400", [1, 2]),
        ("0.3 < similarity", [0, 3]),
        ("width > -1", [0, 1, 3]),
    ],
)
def test_rows(expression: str, rows: list[int] | None) -> None:
    if rows is None:
        with pytest.raises(UserError):
            kept(expression)
    else:
        assert kept(expression) == rows


Test = Callable[[dict[str, Any]], bool | None]


def compared(sign: str, a: Any, b: Any) -> bool | None:
    if a is None or b is None:
        return None
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "=": a == b, "!=": a != b}[sign]


def negated(test: Test) -> Test:
    def result(row: dict[str, Any]) -> bool | None:
        found = test(row)
        return None if found is None else not found

    return result


def joined(word: str, a: Test, b: Test) -> Test:
    """SQL's three-valued logic."""
    decisive = word == "or"

    def result(row: dict[str, Any]) -> bool | None:
        found = (a(row), b(row))
        if decisive in found:
            return decisive
        return None if None in found else not decisive

    return result


leaves = st.builds(
    lambda column, sign, value: (
        f"{column} {sign} {value}",
        lambda row: compared(sign, row[column], value),
    ),
    st.sampled_from(["width", "similarity"]),
    st.sampled_from(["<", "<=", ">", ">=", "=", "!="]),
    st.sampled_from([0.2, 0.31, 256, 300, 512]),
)
trees: st.SearchStrategy[tuple[str, Test]] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a: (f"not ({a[0]})", negated(a[1])), inner),
        st.builds(
            lambda word, a, b: (f"({a[0]}) {word} ({b[0]})", joined(word, a[1], b[1])),
            st.sampled_from(["and", "or"]),
            inner,
            inner,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_expressions_agree_with_python(tree: tuple[str, Test]) -> None:
    expression, test = tree
    assert kept(expression) == [number for number, row in enumerate(ROWS) if test(row) is True]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "ends too early, at character 1; expected a column"),
        ("width >", "ends too early, at character 8"),
        ("width > 3 similarity", "'similarity' at character 11"),
        ("width > 3 and", "ends too early"),
        ("(width > 3", "ends too early, at character 11; expected \\)"),
        ("width in []", "']'"),
        ("width in 3", "expected \\["),
        ("width is 3", "expected null"),
        ("width = 'open", "character 9"),
        ("width ; drop", "';'"),
        ("__import__('os').system('true')", "'\\(' at character 11"),
        ("width.real > 3", "character 6"),
        ("width > 3x", "character 9"),
        ("lambda: 0", "character 7"),
        ("(" * 5000 + "ok" + ")" * 5000, "at most 100 levels"),
        ("not " * 5000 + "ok", "at most 100 levels"),
    ],
)
def test_syntax_errors_show_their_position(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("widht > 3", "no column 'widht', did you mean width"),
        ("nsfw > 3", "nsfw is string"),
        ("width", "not true or false"),
        ("width and ok", "width is int64"),
        ("width in [1, 'a']", "cannot be applied"),
    ],
)
def test_unsuitable_columns_are_named(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(expression).mask(TABLE)


@settings(max_examples=300, deadline=None)
@given(st.text("()[],'\"`<>=! andornotiswidth0123456789.null\\\n", max_size=30))
def test_any_text_is_parsed_or_a_user_error(text: str) -> None:
    with suppress(UserError):
        parse(text).mask(TABLE)
