"""Filter expressions such as `similarity > 0.3 and width >= 256` over parquet columns: parsed, never evaluated as code.

    expression  := all ("or" all)*          all := test ("and" test)*          test := "not" test | comparison
    comparison  := value (("=" | "==" | "!=" | "<" | "<=" | ">" | ">=") value | ["not"] "in" "[" constant, ... "]"
                   | "is" ["not"] "null")? | "(" expression ")"
    value       := column | constant        column := a name, or `a name` in backticks
    constant    := number | 'text' | "text" | true | false

A comparison with null is unknown, as in SQL; what is unknown in the end is not kept.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])
    |(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<quoted>`[^`]+`)
    |(?P<word>[^\W\d]\w*)
    |(?P<sign><=|>=|==|!=|<>|[=<>()\[\],])
    )""",
    re.VERBOSE,
)
COMPARE = {
    "=": "equal",
    "==": "equal",
    "!=": "not_equal",
    "<>": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}
KEYWORDS = {"and", "or", "not", "in", "is", "null", "true", "false"}
DEEPEST = 100  # parentheses and nots within each other

Values = Callable[["pa.Table"], Any]


@dataclass(frozen=True)
class Filter:
    """A parsed expression."""

    expression: str
    columns: tuple[str, ...]
    _test: Values

    def mask(self, table: pa.Table) -> list[bool]:
        """For each row, whether it is kept. Raises UserError if the columns are not there or do not compare."""
        import pyarrow as pa
        import pyarrow.compute as compute

        try:
            found = self._test(table)
            if not pa.types.is_boolean(found.type):
                raise pa.ArrowInvalid(f"it is of type {found.type}, not true or false")
            if isinstance(found, pa.Scalar):
                return [bool(found.as_py())] * len(table)
            kept: list[bool] = compute.fill_null(found, False).to_pylist()
            return kept
        except pa.ArrowException as error:
            kinds = ", ".join(f"{name} is {resolve(table, name).type}" for name in self.columns)
            said = " ".join(str(error).split())
            raise UserError(f"{self.expression!r} cannot be applied ({kinds}): {said}") from None


def parse(expression: str) -> Filter:
    """Raises UserError that shows where the expression cannot be read."""
    parser = _Parser(expression)
    test = parser.either()
    if parser.token is not None:
        raise parser.wrong("and, or, or the end")
    return Filter(expression, tuple(dict.fromkeys(parser.columns)), test)


def resolve(table: pa.Table, name: str) -> Any:
    """A column by its name, or by its name in other case where that is one alone. Raises UserError."""
    names = table.column_names
    if name not in names:
        alike = [other for other in names if other.lower() == name.lower()]
        if len(alike) != 1:
            near = difflib.get_close_matches(name, names, 1)
            hint = f", did you mean {near[0]}?" if near else "."
            raise UserError(f"there is no column {name!r}{hint} There are {', '.join(names)}")
        name = alike[0]
    return table[name]


class _Parser:
    def __init__(self, expression: str) -> None:
        self._text = expression
        self._at = self._start = self._depth = 0
        self.columns: list[str] = []
        self.token: tuple[str, str] | None = None
        self._next()

    def wrong(self, expected: str) -> UserError:
        found = repr(self.token[1]) if self.token is not None else "its end"
        return UserError(
            f"the filter {self._text!r} cannot be read at character {self._start + 1}, {found}: {expected} is expected"
        )

    def _next(self) -> None:
        match = TOKEN.match(self._text, self._at)
        rest = self._text[self._at :]
        self._start = self._at + len(rest) - len(rest.lstrip())
        if match is None:
            self.token = None
            if rest.strip():
                self.token = "?", rest.strip()[0]
                raise self.wrong("a column, a number, a text in quotes or a comparison")
            return
        self._at = match.end()
        kind = str(match.lastgroup)
        word = match.group(kind)
        if kind == "word" and word.lower() in KEYWORDS:
            kind, word = "keyword", word.lower()
        self.token = kind, word

    def _take(self, *words: str) -> str | None:
        """The next token if it is one of these keywords or signs."""
        if self.token is not None and self.token[0] in ("keyword", "sign") and self.token[1] in words:
            word = self.token[1]
            self._next()
            return word
        return None

    def _need(self, word: str) -> None:
        if self._take(word) is None:
            raise self.wrong(word)

    def either(self) -> Values:
        return self._chain("or", self._all, "or_kleene")

    def _all(self) -> Values:
        return self._chain("and", self._one, "and_kleene")

    def _chain(self, word: str, part: Callable[[], Values], function: str) -> Values:
        tests = [part()]
        while self._take(word):
            tests.append(part())
        if len(tests) == 1:
            return tests[0]

        def joined(table: pa.Table) -> Any:
            found = tests[0](table)
            for test in tests[1:]:
                found = _call(function, found, test(table))
            return found

        return joined

    def _one(self) -> Values:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self.wrong(f"at most {DEEPEST} levels")
        try:
            if self._take("not"):
                inner = self._one()
                return lambda table: _call("invert", inner(table))
            if self._take("("):
                inner = self.either()
                self._need(")")
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Values:
        left = self._value()
        sign = self._take(*COMPARE)
        if sign is not None:
            right = self._value()
            return lambda table: _call(COMPARE[sign], left(table), right(table))
        if self._take("is"):
            negated = self._take("not")
            self._need("null")
            return lambda table: _call("is_valid" if negated else "is_null", left(table))
        negated = self._take("not")
        if self._take("in"):
            values = self._list()

            def among(table: pa.Table) -> Any:
                return _is_in(left(table), values)

            return (lambda table: _call("invert", among(table))) if negated else among
        if negated:
            raise self.wrong("in")
        return left

    def _list(self) -> Sequence[Any]:
        self._need("[")
        values = [self._constant()]
        while self._take(","):
            values.append(self._constant())
        self._need("]")
        return values

    def _value(self) -> Values:
        if self.token is not None and self.token[0] in ("word", "quoted"):
            name = self.token[1].strip("`")
            self.columns.append(name)
            self._next()
            return lambda table: resolve(table, name)
        constant = self._constant()
        return lambda _: _scalar(constant)

    def _constant(self) -> Any:
        if self._take("true"):
            return True
        if self._take("false"):
            return False
        if self.token is None or self.token[0] not in ("number", "text"):
            raise self.wrong("a column, a number, a text in quotes, true or false")
        kind, word = self.token
        self._next()
        if kind == "text":
            return re.sub(r"\\(.)", operator.itemgetter(1), word[1:-1], flags=re.DOTALL)
        return int(word) if re.fullmatch(r"[+-]?\d{1,18}", word) else float(word)


def _call(function: str, *arguments: Any) -> Any:
    import pyarrow.compute as compute

    return compute.call_function(function, list(arguments))


def _scalar(value: Any) -> Any:
    import pyarrow as pa

    return pa.scalar(value)


def _is_in(column: Any, values: Sequence[Any]) -> Any:
    """Unknown where the column is null."""
    found = _call("equal", column, _scalar(values[0]))
    for value in values[1:]:
        found = _call("or_kleene", found, _call("equal", column, _scalar(value)))
    return found
