"""Inputs that people reported, through every command: merge, sweep, soup and diff agree on each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli.app import app

pytest.importorskip("torch")


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def merging(inputs: list[str], out: Path, *flags: str) -> list[list[str]]:
    """The commands that merge `inputs`, each with a folder of its own."""
    return [
        ["merge", *inputs, "--beta", "0.5", "--out", f"{out}-merge", *flags],
        ["sweep", *inputs, "--betas", "0,1", "--out", f"{out}-sweep", *flags],
        ["soup", *inputs, "--uniform", "--out", f"{out}-soup", *flags],
    ]


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.mark.parametrize(("name", "key"), [("net-loss", "net"), ("parts", "model.decoder")])
def test_several_state_dicts(shared: Path, tmp_path: Path, name: str, key: str) -> None:
    inputs = [str(shared / f"cases/merge/{name}-{letter}.pt") for letter in "ab"]
    for command in [*merging(inputs, tmp_path / "out"), ["diff", *inputs]]:
        refused = run(*command)
        assert refused.exit_code == 2, command
        assert f"--key {key.partition('.')[0]}" in said(refused)
        assert run(*command, "--key", key).exit_code == 0, command
    assert run("verify", str(tmp_path / "out-merge")).exit_code == 0


@pytest.mark.parametrize(
    ("folder", "names", "why"),
    [
        ("peft_unmerged", ("a-unmerged", "b-unmerged"), "merge_and_unload"),
        ("gptq_old", ("gptq-old-a", "gptq-old-b"), "quantised"),
        ("zero3_empty", ("all0-a", "all0-b"), "ZeRO-3"),
    ],
)
def test_weights_that_cannot_be_averaged(
    shared: Path, tmp_path: Path, folder: str, names: tuple[str, str], why: str
) -> None:
    inputs = [str(shared / "cases/merge" / folder / name) for name in names]
    for command in merging(inputs, tmp_path / "out"):
        refused = run(*command)
        assert (refused.exit_code, why in said(refused)) == (2, True), (command, refused.output)
    assert not list(tmp_path.glob("out-*/*"))
    assert why in said(run("diff", *inputs))


@pytest.mark.parametrize("rule", ["first", "intersect", "union", "pad"])
def test_tokens_beyond_the_rows(shared: Path, tmp_path: Path, rule: str) -> None:
    """The merged folder loads, and every token of its tokenizer has a row; or the merge is refused."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    inputs = [str(shared / "cases/merge/added_tokens" / name) for name in ("base", "chat")]
    out = tmp_path / "out"
    done = run("merge", *inputs, "--beta", "0.5", "--vocabulary", rule, "--out", str(out))
    if done.exit_code:
        assert done.exit_code == 2
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
    model(torch.tensor([sorted(tokenizer.get_vocab().values())]))
    assert run("verify", str(out)).exit_code == 0


def test_strided_columns(shared: Path, tmp_path: Path) -> None:
    inputs = [str(shared / f"cases/merge/column-{letter}.bin") for letter in "ab"]
    for command in [*merging(inputs, tmp_path / "out"), ["diff", *inputs]]:
        assert run(*command).exit_code == 0, command
    assert run("verify", str(tmp_path / "out-merge"), "--full").exit_code == 0


def test_complex_buffers(shared: Path, tmp_path: Path) -> None:
    inputs = [str(shared / f"cases/merge/c64-{letter}") for letter in "ab"]
    for command in [*merging(inputs, tmp_path / "out"), ["diff", *inputs]]:
        done = run(*command)
        assert done.exit_code == 0, (command, done.output)
    assert "freqs_cis" in said(run("merge", *inputs, "--beta", "0.5", "--out", str(tmp_path / "said")))
    assert run("verify", str(tmp_path / "out-merge"), "--full").exit_code == 0


def test_counters_beside_the_weights(shared: Path, tmp_path: Path) -> None:
    inputs = [str(shared / f"cases/merge/multisteplr-{letter}.pt") for letter in "ab"]
    for command in [*merging(inputs, tmp_path / "out"), ["diff", *inputs]]:
        assert run(*command).exit_code == 0, command
