"""The strict YAML reader: messages with line numbers, and equal results of both parsers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.recipe import yaml_file
from pretrain.recipe.yaml_file import load_yaml
from tests.pretrain.recipe.test_recipe import CONFIGS, ROOT, write

MISTAKES = {
    "a: 1\nb: [}\n": ":2: .*found '}'",
    "a: 1\na: 2\n": ":2: the key 'a' is written twice",
    "a: 1\nb: @x\n": ":2: found character '@'",
    "a: 1\nb: *x\n": ":2: found undefined alias 'x'",
    "a: 1\nb: &x [*x]\n": ":2: found unconstructable recursive node",
    "a: 1\nb: !!python/name:os.x 1\n": ":2: could not determine a constructor",
    "a: " + "[" * 200_000: "not YAML: maximum recursion depth",
    "a:\n " + "- " * 200_000: "not YAML: maximum recursion depth",
    "a: " + "[" * 1900 + "]" * 1900: "not YAML: maximum recursion depth",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:20])
def test_mistakes_in_the_yaml_are_named_with_their_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=MISTAKES[text]):
        load_yaml(write(tmp_path, text))


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_both_parsers_read_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(yaml_file._FastLoader, yaml.CSafeLoader)
    fast = load_yaml(path)
    monkeypatch.setattr(yaml_file, "_FastLoader", yaml_file._Loader)
    assert fast == load_yaml(path)
