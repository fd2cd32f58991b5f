"""Which package may import which, at which time, and what no file may do: shells, pickles, untyped signatures."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "pretrain", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Imports point down: launch -> pretrain -> data_pipeline.
FORBIDDEN = {"data_pipeline": {"pretrain", "launch"}, "pretrain": {"launch"}, "launch": set()}
# Modules that a process must not load by importing us: workers and light commands start without them.
HEAVY = {"torch", "ray", "transformers", "deepspeed", "open_clip", "sklearn", "matplotlib"}
# The restricted unpickler of checkpoints, and messages between a loader and workers that it has started itself.
UNPICKLERS = {"pretrain/weights/formats/torch_pickle.py", "data_pipeline/workers/ipc.py"}


def each_file(check: Callable[[Path], None]) -> Callable[[], None]:
    """One test that checks every file and names all that fail: a test per file and rule costs pytest 10 s."""

    def test() -> None:
        faults: dict[str, str] = {}
        for path in FILES:
            try:
                check(path)
            except AssertionError as error:
                faults[path.relative_to(ROOT).as_posix()] = str(error) or "forbidden"
        assert not faults

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of imported modules, `from a import b` as `a` and `a.b`."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def at_import_time(path: Path) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: outside functions and `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_are_files_to_look_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@each_file
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not tops(imported(ast.walk(tree(path)))) & (FORBIDDEN[package] | {"tests", "benchmarks"})


def test_the_reference_trainer_shares_no_code_with_the_packages() -> None:
    """tests/support/reference and what it imports of tests: agreement would prove nothing about shared code."""
    waiting = sorted((ROOT / "tests/support/reference").glob("*.py"))
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        names = imported(ast.walk(tree(path)))
        assert not tops(names) & set(PACKAGES), path
        waiting += [
            ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tests.support.")
        ]
    assert {ROOT / "tests/support/reference/flip.py", ROOT / "tests/support/naive_order.py"} <= seen


@each_file
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() != "pretrain/distributed/engine.py":
        assert "deepspeed" not in tops(imported(ast.walk(tree(path))))


@each_file
def test_the_data_pipeline_knows_no_models_and_no_process_groups(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "data_pipeline":
        names = imported(ast.walk(tree(path)))
        assert not {name for name in names if name.startswith(("torch.distributed", "torch.nn"))}
        assert not tops(imported(at_import_time(path))) & HEAVY


def test_what_the_commands_import_first_is_light() -> None:
    """Follows imports at module level from launch/cli/app.py; test_light.py asks a real process the same."""
    waiting, seen = [ROOT / "launch/cli/app.py"], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        names = imported(at_import_time(path))
        assert not tops(names) & HEAVY, path
        modules = {
            tuple(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)
        }
        places = [ROOT.joinpath(*module) for module in modules]
        candidates = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
        waiting += [candidate for candidate in candidates if candidate in FILES]
    assert {ROOT / "launch/__init__.py", ROOT / "launch/cli/base.py"} <= seen


@each_file
def test_every_file_says_in_one_sentence_what_it_is_for(path: Path) -> None:
    if path.read_text(encoding="utf-8").strip():
        sentence = (ast.get_docstring(tree(path)) or "").partition("\n\n")[0]
        assert sentence.endswith("."), "the file opens with a whole sentence"


@each_file
def test_nothing_is_run_by_a_shell_or_read_from_a_pickle(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name not in UNPICKLERS:
        assert not tops(imported(ast.walk(tree(path)))) & {
            "pickle",
            "cloudpickle",
            "dill",
            "shelve",
            "marshal",
        }
    for called, call in calls(path):
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{name}:{call.lineno}"
        assert words.get("shell", "False") == "False", f"{where}: shell=True"
        assert called not in (
            "os.system",
            "os.popen",
            "eval",
            "exec",
            "yaml.unsafe_load",
            "yaml.full_load",
        ), where
        if called.endswith(("torch.load", "np.load", "numpy.load")):
            assert words.get("weights_only") == "True" or words.get("allow_pickle", "False") == "False", where
        if called == "torch.load":
            assert words.get("weights_only") == "True", f"{where}: torch.load reads pickles"
        if called == "yaml.load":
            assert words.get("Loader") == "_Loader", f"{where}: only our SafeLoader"


@each_file
def test_every_signature_is_typed(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [
            item.arg
            for item in arguments
            if item.annotation is None and item.arg not in ("self", "cls", "ctx")
        ]
        where = f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        assert not bare, f"{where}: no type on {', '.join(bare)}"
        assert node.returns is not None, f"{where}: no return type"


# Classes of one system. Only the objectives and the models may know them; all others ask for what they need by name.
SYSTEMS = {
    "Clip", "Contrastive", "ContrastiveOptions", "Generative", "GenerativeOptions", "OpenClipVit",
    "VisionLanguageModel",
}  # fmt: skip


def asks_for_a_system(node: ast.AST) -> bool:
    """`isinstance(x, Contrastive)`, `getattr(objective, ...)`, `objective.kind == ...`, `objective.kind in ...`."""
    if isinstance(node, ast.Compare):
        return any(ast.unparse(side).endswith("objective.kind") for side in (node.left, *node.comparators))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    words = [ast.unparse(argument) for argument in node.args]
    if node.func.id in ("isinstance", "issubclass"):
        return bool(SYSTEMS & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)})
    return node.func.id in ("getattr", "hasattr") and words[0].endswith(("objective", "objective.model"))


@each_file
def test_nobody_asks_which_system_it_is(path: Path) -> None:
    if path.is_relative_to(ROOT / "pretrain" / "objectives"):
        return
    found = [node for node in ast.walk(tree(path)) if asks_for_a_system(node)]
    assert not found, ", ".join(f"line {node.lineno}: {ast.unparse(node)}" for node in found)  # type: ignore[attr-defined]


def test_what_counts_as_asking_for_a_system() -> None:
    for text, asks in (
        ("isinstance(objective, Contrastive)", True),
        ("isinstance(model, (Generative, int))", True),
        ("stage.objective.kind == 'contrastive'", True),
        ("'generative' != stage.objective.kind", True),
        ("stage.objective.kind in kinds", True),
        ("getattr(objective, 'tower', None)", True),
        ("isinstance(stage, TrainStage)", False),
        ("KINDS[stage.objective.kind]", False),
        ("getattr(options, name)", False),
    ):
        assert any(asks_for_a_system(node) for node in ast.walk(ast.parse(text))) == asks, text
