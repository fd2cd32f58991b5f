"""Parser and evaluator of filter expressions over parquet columns; never eval().

An example is `similarity > 0.3 and width >= 256`. The grammar:

    expression  := conjunction ("or" conjunction)*
    conjunction := test ("and" test)*       test := "not" test | comparison
    comparison  := value (("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value
                   | ["not"] "in" "[" constant, ... "]" | "is" ["not"] "null")? | "(" expression ")"
    value       := column | constant        column := a name, or `a name` in backticks
    constant    := number | 'text' | "text" | true | false

A comparison with null is unknown, as in SQL. A row for which the whole expression is unknown is not kept.
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
MAX_DEPTH = 100  # of nested parentheses and nots

Evaluator = Callable[["pa.Table"], Any]


@dataclass(frozen=True)
class Filter:
    """A parsed expression and the columns that it uses."""

    expression: str
    columns: tuple[str, ...]
    _evaluate: Evaluator

    def mask(self, table: pa.Table) -> list[bool]:
        """True for each row to keep. Raises UserError if a column is missing or has an unsuitable type."""
        import pyarrow as pa
        import pyarrow.compute as compute

        try:
            result = self._evaluate(table)
            if not pa.types.is_boolean(result.type):
                raise pa.ArrowInvalid(f"it is of type {result.type}, not true or false")
            if isinstance(result, pa.Scalar):
                return [bool(result.as_py())] * len(table)
            mask: list[bool] = compute.fill_null(result, False).to_pylist()
            return mask
        except pa.ArrowException as error:
            types = ", ".join(f"{name} is {resolve(table, name).type}" for name in self.columns)
            reason = " ".join(str(error).split())
            raise UserError(f"{self.expression!r} cannot be applied ({types}): {reason}") from None


def parse(expression: str) -> Filter:
    """Parse an expression. Raises UserError with the position of the first syntax error."""
    parser = _Parser(expression)
    evaluator = parser.expression()
    if parser.token is not None:
        raise parser.syntax_error("and, or, or the end")
    return Filter(expression, tuple(dict.fromkeys(parser.columns)), evaluator)


def resolve(table: pa.Table, name: str) -> Any:
    """Find a column by its name, ignoring case if that is unambiguous. Raises UserError."""
    names = table.column_names
    if name not in names:
        candidates = [other for other in names if other.lower() == name.lower()]
        if len(candidates) != 1:
            close = difflib.get_close_matches(name, names, 1)
            hint = f", did you mean {close[0]}?" if close else "."
            raise UserError(f"there is no column {name!r}{hint} The columns are {', '.join(names)}")
        name = candidates[0]
    return table[name]


class _Parser:
    """Recursive-descent parser, one method per rule of the grammar; builds closures that evaluate a table."""

    def __init__(self, expression: str) -> None:
        self._text = expression
        self._at = self._start = self._depth = 0
        self.columns: list[str] = []
        self.token: tuple[str, str] | None = None
        self._next()

    def syntax_error(self, expected: str) -> UserError:
        """UserError for the current token; `expected` names the tokens that are valid here."""
        position = f"at character {self._start + 1}"
        defect = f"ends too early, {position}" if self.token is None else f"has {self.token[1]!r} {position}"
        return UserError(f"the filter {self._text!r} {defect}; expected {expected}")

    def _next(self) -> None:
        """Advance to the next token; None at the end."""
        match = TOKEN.match(self._text, self._at)
        rest = self._text[self._at :]
        self._start = self._at + len(rest) - len(rest.lstrip())
        if match is None:
            self.token = None
            if rest.strip():
                self.token = "?", rest.strip()[0]
                raise self.syntax_error("a column, a number, a text in quotes or a comparison")
            return
        self._at = match.end()
        kind = str(match.lastgroup)
        word = match.group(kind)
        if kind == "word" and word.lower() in KEYWORDS:
            kind, word = "keyword", word.lower()
        self.token = kind, word

    def _take(self, *words: str) -> str | None:
        """Consume the next token if it is one of these keywords or signs; None if it is another."""
        if self.token is not None and self.token[0] in ("keyword", "sign") and self.token[1] in words:
            word = self.token[1]
            self._next()
            return word
        return None

    def _require(self, word: str) -> None:
        if self._take(word) is None:
            raise self.syntax_error(word)

    def expression(self) -> Evaluator:
        return self._chain("or", self._conjunction, "or_kleene")

    def _conjunction(self) -> Evaluator:
        return self._chain("and", self._test, "and_kleene")

    def _chain(self, word: str, parse_operand: Callable[[], Evaluator], function: str) -> Evaluator:
        operands = [parse_operand()]
        while self._take(word):
            operands.append(parse_operand())
        if len(operands) == 1:
            return operands[0]

        def combined(table: pa.Table) -> Any:
            result = operands[0](table)
            for operand in operands[1:]:
                result = _call(function, result, operand(table))
            return result

        return combined

    def _test(self) -> Evaluator:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self.syntax_error(f"at most {MAX_DEPTH} levels")
        try:
            if self._take("not"):
                inner = self._test()
                return lambda table: _call("invert", inner(table))
            if self._take("("):
                inner = self.expression()
                self._require(")")
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Evaluator:
        left = self._value()
        sign = self._take(*COMPARE)
        if sign is not None:
            right = self._value()
            return lambda table: _call(COMPARE[sign], left(table), right(table))
        if self._take("is"):
            negated = self._take("not")
            self._require("null")
            return lambda table: _call("is_valid" if negated else "is_null", left(table))
        negated = self._take("not")
        if self._take("in"):
            values = self._list()

            def contains(table: pa.Table) -> Any:
                return _is_in(left(table), values)

            return (lambda table: _call("invert", contains(table))) if negated else contains
        if negated:
            raise self.syntax_error("in")
        return left

    def _list(self) -> Sequence[Any]:
        self._require("[")
        values = [self._constant()]
        while self._take(","):
            values.append(self._constant())
        self._require("]")
        return values

    def _value(self) -> Evaluator:
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
            raise self.syntax_error("a column, a number, a text in quotes, true or false")
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
    """True where the column equals one of the values; null where the column is null."""
    result = _call("equal", column, _scalar(values[0]))
    for value in values[1:]:
        result = _call("or_kleene", result, _call("equal", column, _scalar(value)))
    return result
