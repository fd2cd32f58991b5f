"""Light commands on real inputs import nothing heavy. `python -m benchmarks startup` measures how fast they start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.startup import COMMANDS, arguments, write_inputs
from tests.support.launching import ROOT

HEAVY = {"torch", "ray", "transformers", "deepspeed", "open_clip", "sklearn", "matplotlib", "pandas", "scipy"}
# Modules that a command may import if it uses them: columns need pyarrow, offsets numpy, progress bars rich.
OPTIONAL = {"numpy", "pyarrow", "rich"}
ALLOWED = {
    "diff {model_a}": {"numpy", "rich"},
    "verify {merged}": {"numpy", "rich"},
    "sweep {model_a}": {"numpy"},
    "merge {model_a}": {"numpy"},
    "run {recipe}": {"numpy", "rich"},
    "recipe check": {
        "numpy"
    },  # for sources that are there, which it opens; those of the demo after `make demo`
    "data show {tars}": {"numpy"},
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("light"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(str(ROOT), "."))
def test_a_light_command_imports_what_it_uses(command: str, inputs: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments(command, inputs)], capture_output=True, text=True, cwd=ROOT
    )
    *output, code, modules = done.stdout.splitlines()
    assert code == "CODE 0", done.stderr
    assert output
    allowed = next((names for start, names in ALLOWED.items() if command.startswith(start)), set())
    assert set(modules.split()) & (HEAVY | OPTIONAL - allowed) == set()
