"""Light commands on real inputs: nothing heavy is imported, and they answer in half a second of processor time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from data_pipeline.formats import refinedweb
from data_pipeline.index.build import build_index
from pretrain.merge import merge
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from tests.support.launching import ROOT, write_recipe
from tests.support.merge_inputs import floats, write
from tests.support.tiny import write_pairs

DEMO = str(ROOT / "configs/demo/flip.yaml")
HEAVY = {"torch", "ray", "transformers", "deepspeed", "open_clip", "sklearn", "matplotlib", "pandas", "scipy"}
# What a command may take that has use for it: columns need pyarrow, offsets numpy, progress bars rich.
SOME = {"numpy", "pyarrow", "rich"}
SECONDS = 0.5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("light")
    for name in ("tars", "indexed"):
        (folder / name).mkdir()
        write_pairs(folder / name)
    build_index(str(folder / "indexed"))
    refinedweb.write_documents(str(folder / "documents" / "0.parquet"), [refinedweb.Document("text", "url")])
    run = folder / "runs" / "small"
    (run / "masked" / "checkpoints" / "step_00000020").mkdir(parents=True)
    recipe = write_recipe(folder)
    (run / "recipe.yaml").write_text(dump(load_recipe(recipe)))
    (run / "masked" / "metrics.jsonl").write_text('{"step": 20, "loss": 1.5}\n')
    for seed, name in enumerate(("model_a", "model_b")):
        write(folder / name, {"layers.0.w": floats(seed, 8, 8), "layers.1.w": floats(seed + 2, 8, 8)})
    merge([str(folder / "model_a"), str(folder / "model_b")], folder / "merged", beta=0.4)
    names = ("model_a", "model_b", "merged", "drawn")
    return {
        name: str(folder / name) for name in (*names, "tars", "indexed", "documents", "runs", "runs/small")
    } | {"recipe": str(recipe)}


# A command with its inputs -> what of SOME it may import.
COMMANDS: dict[str, set[str]] = {
    "--help": set(),
    "run --help": set(),
    "merge --help": set(),
    "sweep --help": set(),
    "soup --help": set(),
    "verify --help": set(),
    "diff --help": set(),
    "diff {model_a} {model_b} --picture {drawn}": {"numpy", "rich"},
    "verify {merged}": {"numpy", "rich"},
    "sweep {model_a} {model_b} --dry-run": {"numpy"},
    "--version": set(),
    "run {recipe} --ranks-per-node 1 --dry-run": {"numpy", "rich"},
    "recipe check {recipe}": set(),
    f"recipe check {DEMO}": set(),
    f"recipe show {DEMO}": set(),
    "list {runs}": set(),
    "status {runs/small}": set(),
    "data show {tars}": {"numpy"},
    "data show {tars} --json": {"numpy"},
    "data show {indexed}": {"numpy", "pyarrow"},
    "data show {documents}": {"numpy", "pyarrow"},
}
CODE = (
    "import sys, launch.cli\n"
    "code = None\n"
    "try: launch.cli.main()\n"
    "except SystemExit as error: code = error.code\n"
    "print('CODE', code or 0)\n"
    "print('MODULES', *{name.partition('.')[0] for name in sys.modules})\n"
)


def filled(command: str, inputs: dict[str, str]) -> list[str]:
    return [inputs[word[1:-1]] if word.startswith("{") else word for word in command.split()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(str(ROOT), "."))
def test_a_light_command_imports_what_it_uses(command: str, inputs: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *filled(command, inputs)], capture_output=True, text=True, cwd=ROOT
    )
    *output, code, modules = done.stdout.splitlines()
    assert code == "CODE 0", done.stderr
    assert output
    assert set(modules.split()) & (HEAVY | SOME - COMMANDS[command]) == set()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(str(ROOT), "."))
def test_a_light_command_answers_in_half_a_second(
    command: str, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Compiled modules are kept, as those of an installed package are. Processor time counts no other process's load.
    cache = tmp_path_factory.getbasetemp() / "compiled"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    arguments = [sys.executable, "-m", "launch.cli", *filled(command, inputs)]
    seconds = []
    for _ in range(4):
        process = subprocess.Popen(
            arguments, env=env | {"PYTHONPYCACHEPREFIX": str(cache)}, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
        if seconds[-1] < SECONDS and len(seconds) > 1:
            break
    assert min(seconds) < SECONDS
