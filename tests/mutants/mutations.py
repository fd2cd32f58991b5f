"""All mutants of a source file: mutmut's operators, and operators for slips that mutmut does not make."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

# Calls whose only effect is a text for people or for a type checker.
UNCHANGED_CALLS = {"TypeVar", "cast", "print", "warn", "warning", "info", "debug", "fail", "echo", "secho"}
SYMMETRIC = {"min", "max", "gcd", "lcm", "isclose", "equal", "array_equal"}
SYMMETRIC |= {"add", "multiply", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"}
# Names of types in annotations only, such as Result = Callable[[int], int].
TYPE_ALIAS = m.Assign(
    value=m.Subscript(m.Name("Callable") | m.Name("tuple") | m.Name("dict") | m.Name("list"))
)
SWAPPED_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    path:      of the file, relative to the repository
    line:      of the first changed line, from 1
    statement: first line of the statement that is changed: which tests run it decides which tests are run
    function:  qualified name of the enclosing function or class; "" at module level
    on_import: True where the code runs when its module is imported: outside functions, and default arguments
    operator:  name of the mutation operator
    source:    the whole mutated file
    before, after: the changed lines
    """

    path: str
    line: int
    statement: int
    function: str
    on_import: bool
    operator: str
    source: str
    before: str
    after: str

    def diff(self) -> str:
        minus, plus = (
            "\n".join(sign + line for line in text.splitlines())
            for sign, text in (("-", self.before), ("+", self.after))
        )
        return (
            f"{self.path}:{self.line} in {self.function or 'the module'} ({self.operator})\n{minus}\n{plus}"
        )


def delete_statement(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """A call, a deletion, a `raise` or a `return` without value that is not made."""
    if len(node.body) != 1:
        return
    statement = node.body[0]
    value = statement.value if isinstance(statement, cst.Expr) else None
    is_call = isinstance(value, cst.Yield) or (
        isinstance(value, cst.Call) and _called(value) not in UNCHANGED_CALLS
    )
    bare_return = isinstance(statement, cst.Return) and statement.value is None
    if is_call or bare_return or isinstance(statement, cst.Del | cst.Raise | cst.Assert | cst.AugAssign):
        yield node.with_changes(body=[cst.Pass()])


def negate_condition(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    wrapped = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), wrapped))


def drop_operand(node: cst.BooleanOperation) -> Iterator[cst.CSTNode]:
    """`a and b` -> `a`, `b`."""
    yield node.left
    yield node.right


def drop_term(node: cst.BinaryOperation) -> Iterator[cst.CSTNode]:
    """`a + b` -> `a`, also for -, * and /."""
    if isinstance(node.operator, cst.Add | cst.Subtract | cst.Multiply | cst.Divide):
        yield node.left


def swap_arguments(node: cst.Call) -> Iterator[cst.CSTNode]:
    """Neighbouring positional arguments change places."""
    for at, (first, second) in enumerate(zip(node.args, node.args[1:], strict=False)):
        if first.keyword or second.keyword or first.star or second.star:
            continue
        if first.value.deep_equals(second.value) or _called(node) in SYMMETRIC:
            continue
        swapped = [first.with_changes(value=second.value), second.with_changes(value=first.value)]
        yield node.with_changes(args=[*node.args[:at], *swapped, *node.args[at + 2 :]])


def drop_method(node: cst.Call) -> Iterator[cst.CSTNode]:
    """`x.float()` -> `x`: a cast, a copy or a detach that is forgotten."""
    if (
        not node.args
        and isinstance(node.func, cst.Attribute)
        and not m.matches(node.func.value, m.Name("self"))
    ):
        yield node.func.value


def swap_function(node: cst.Call) -> Iterator[cst.CSTNode]:
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    if isinstance(name, cst.Name) and name.value in SWAPPED_NAMES:
        yield node.with_deep_changes(name, value=SWAPPED_NAMES[name.value])


def drop_slice_bound(node: cst.Slice) -> Iterator[cst.CSTNode]:
    for bound in ("lower", "upper"):
        if getattr(node, bound) is not None:
            yield node.with_changes(**{bound: None})


def number_below(node: cst.Integer) -> Iterator[cst.CSTNode]:
    """n -> n - 1; mutmut makes n + 1."""
    if node.evaluated_value > 0:
        yield node.with_changes(value=repr(node.evaluated_value - 1))


OWN_OPERATORS: Sequence[tuple[Any, Callable[[Any], Iterable[cst.CSTNode]]]] = [
    (cst.SimpleStatementLine, delete_statement),
    (cst.If, negate_condition),
    (cst.While, negate_condition),
    (cst.BooleanOperation, drop_operand),
    (cst.BinaryOperation, drop_term),
    (cst.Call, swap_arguments),
    (cst.Call, drop_method),
    (cst.Call, swap_function),
    (cst.Slice, drop_slice_bound),
    (cst.Integer, number_below),
]


@dataclass(frozen=True)
class Candidate:
    """A node and what would replace it; `mutant` makes the mutated file."""

    path: str
    module: cst.Module
    node: cst.CSTNode
    changed: cst.CSTNode
    statement: int
    function: str
    on_import: bool
    operator: str

    def mutant(self) -> Mutant | None:
        """None when the result equals the file, or does not compile."""
        before = self.module.code
        source = cst.ensure_type(self.module.deep_replace(self.node, self.changed), cst.Module).code
        old, new = before.splitlines(), source.splitlines()
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        blocks = [code for code in matcher.get_opcodes() if code[0] != "equal"]
        if not blocks or not _compiles(source):
            return None
        first, last = blocks[0], blocks[-1]
        return Mutant(
            self.path,
            first[1] + 1,
            self.statement,
            self.function,
            self.on_import,
            self.operator,
            source,
            "\n".join(old[first[1] : last[2]]),
            "\n".join(new[first[3] : last[4]]),
        )


def candidates(path: str, source: str) -> list[Candidate]:
    """Every change of a file that the operators make.

    Not changed: texts for people (docstrings, f-strings, strings that contain a space, arguments of UNCHANGED_CALLS),
    annotations, type aliases, imports, decorators, `if TYPE_CHECKING`, `strict=True` of `zip`, and
    `raise AssertionError(...)`.
    """
    module = cst.parse_module(source)
    visitor = _Visitor(path, module)
    MetadataWrapper(module, unsafe_skip_copy=True).visit(visitor)
    return visitor.found


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: str, module: cst.Module) -> None:
        super().__init__()
        self.path, self.module = path, module
        self.scope: list[cst.FunctionDef | cst.ClassDef] = []
        self.parameters = 0
        self.statements: list[int] = []
        self.guards: list[cst.CSTNode] = []
        self.found: list[Candidate] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_skipped(node) or node in self.guards:
            return False
        strict = _strict(node)
        if strict is not None:
            self.guards.append(strict)
        if isinstance(node, cst.BaseSmallStatement | cst.BaseCompoundStatement):
            self.statements.append(self.get_metadata(PositionProvider, node).start.line)
        if isinstance(node, cst.SimpleStatementLine):
            self.statements.append(self.get_metadata(PositionProvider, node).start.line)
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scope.append(node)
        for kind, operator in (*OWN_OPERATORS, *mutation_operators):
            if isinstance(node, kind) and not (isinstance(node, cst.BaseString) and _is_prose(node)):
                name = operator.__name__.removeprefix("operator_")
                for changed in operator(node):
                    if strict is not None and not _keeps(changed, strict):
                        continue
                    suffix = " None" if _puts_none(node, changed) else ""
                    self.found.append(self._candidate(node, changed, name + suffix))
        return True

    def visit_FunctionDef_params(self, node: cst.FunctionDef) -> None:
        self.parameters += 1

    def leave_FunctionDef_params(self, node: cst.FunctionDef) -> None:
        self.parameters -= 1

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if _is_skipped(original_node):
            return
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self.scope.pop()
        if isinstance(
            original_node, cst.BaseSmallStatement | cst.BaseCompoundStatement | cst.SimpleStatementLine
        ):
            self.statements.pop()

    def _candidate(self, node: cst.CSTNode, changed: cst.CSTNode, operator: str) -> Candidate:
        statement = self.statements[-1] if self.statements else 1
        name = ".".join(one.name.value for one in self.scope)
        functions = sum(isinstance(one, cst.FunctionDef) for one in self.scope)
        on_import = functions == 0 or (functions == 1 and self.parameters == 1)
        return Candidate(self.path, self.module, node, changed, statement, name, on_import, operator)


def _is_skipped(node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Annotation | cst.Import | cst.ImportFrom | cst.FormattedString | cst.Decorator):
        return True
    if isinstance(node, cst.If) and m.matches(node.test, m.Name("TYPE_CHECKING")):
        return True
    if m.matches(node, m.SimpleStatementLine([m.Raise(m.Call(m.Name("AssertionError"))) | TYPE_ALIAS])):
        return True
    return isinstance(node, cst.Call) and _called(node) in UNCHANGED_CALLS


def _strict(node: cst.CSTNode) -> cst.Arg | None:
    """The argument `strict=True` of a `zip`; it guards lengths that the code makes equal, so no test sees a change."""
    if not isinstance(node, cst.Call) or _called(node) != "zip":
        return None
    return next((arg for arg in node.args if arg.keyword and arg.keyword.value == "strict"), None)


def _keeps(changed: cst.CSTNode, strict: cst.Arg) -> bool:
    found = _strict(changed)
    return found is not None and found.value.deep_equals(strict.value)


def _called(node: cst.Call) -> str:
    function = node.func
    return function.attr.value if isinstance(function, cst.Attribute) else getattr(function, "value", "")


def _puts_none(node: cst.CSTNode, changed: cst.CSTNode) -> bool:
    """True if a value became None: most such mutants end in a TypeError that any test notices."""
    return len(m.findall(changed, m.Name("None"))) > len(m.findall(node, m.Name("None")))


def _is_prose(node: cst.BaseString) -> bool:
    return not isinstance(node, cst.SimpleString) or " " in node.raw_value


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True
