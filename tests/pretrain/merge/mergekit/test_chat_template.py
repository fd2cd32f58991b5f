"""Chat templates of mergekit files, rendered as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.merge.execute import execute
from pretrain.merge.mergekit.plan import open_mergekit, plan_mergekit
from pretrain.merge.mergekit.yaml_file import parse

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi\n"}]


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent / "fixtures")


def template_written(wanted: str, models: list[str], out: Path) -> str:
    inputs = [{"model": model, "parameters": {"weight": 1}} for model in models]
    values = {
        "merge_method": "linear",
        "models": inputs,
        "chat_template": wanted,
        "tokenizer_source": "union",
    }
    file = parse("x.yml", values)
    opened = open_mergekit(file)
    execute([plan_mergekit(file, opened, 10**9)], opened, [out])
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    return (out / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("chatml", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
                   "<|im_start|>assistant\n"),
        ("llama3", "<BOS><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
                   "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("{{ messages[0].content }}", "Be kind."),
    ],
)  # fmt: skip
def test_chat_templates(wanted: str, said: str, tmp_path: Path) -> None:
    """Render a template with Jinja and the settings of transformers."""
    from jinja2 import Environment

    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        template_written(wanted, ["d", "e"], tmp_path / "out")
    )
    assert template.render(messages=TURNS, add_generation_prompt=True, bos_token="<BOS>") == said


def test_the_template_that_most_models_have(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in Path("e").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "chat_template.jinja").write_text("sky\n")
    assert template_written("auto", ["d", str(other), "f"], tmp_path / "out") == "sky"
