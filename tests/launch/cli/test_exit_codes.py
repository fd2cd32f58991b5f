"""Exit codes are defined in one module, which ranks, launcher, commands and demo share."""

from __future__ import annotations

import ast
from pathlib import Path

import launch
import pretrain
from pretrain.run import exit_codes


def test_the_numbers_are_those_that_scripts_rely_on() -> None:
    assert (exit_codes.DONE, exit_codes.FAILED, exit_codes.USER_ERROR, exit_codes.RUN_AGAIN) == (0, 1, 2, 75)


def test_no_other_module_says_what_they_are() -> None:
    found = []
    for package in (launch, pretrain):
        for path in Path(package.__path__[0]).rglob("*.py"):
            tree = ast.parse(path.read_text())
            if any(
                isinstance(node, ast.Constant) and node.value == exit_codes.RUN_AGAIN
                for node in ast.walk(tree)
            ):
                found.append(path.name)
    assert found == ["exit_codes.py"]
