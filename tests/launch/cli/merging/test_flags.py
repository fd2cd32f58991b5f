"""Every flag of `dromos merge` against the equivalent spec file, and flags that conflict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from launch.cli.base import group
from launch.cli.merging import merge
from tests.support.merge_inputs import floats, write


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        tensors = {f"m.layers.{i}.mlp": floats(10 * seed + i, 6, 5) for i in range(3)}
        write(tmp_path / name, tensors | {"m.norm": floats(seed + 50, 7), "head": floats(seed + 60, 4)})
    return tmp_path


def dromos(*words: str) -> Result:
    app = group("test")
    merge.register(app)
    app.command(name="other")(lambda: None)  # a group of one command would take no name
    return CliRunner().invoke(app, list(words))


def merged(out: str, *words: str) -> dict[str, np.ndarray]:
    result = dromos("merge", *words, "--out", out)
    assert result.exit_code == 0, result.output
    return {n: a for path in sorted(Path(out).glob("*.safetensors")) for n, a in load_file(path).items()}


SAME: list[tuple[list[str], str]] = [
    (["./a", "./b", "--beta", "0.4"], "{inputs: [./a, ./b], beta: 0.4}"),
    (["./a", "./b", "./c", "--weights", "1,2,1"], "{inputs: [./a, ./b, ./c], weights: [1, 2, 1]}"),
    (["./a", "./b", "./c", "--method", "soup"], "{inputs: [./a, ./b, ./c], method: soup}"),
    (["./a", "./b", "--method", "slerp", "--t", "0.3"], "{inputs: [./a, ./b], method: slerp, t: 0.3}"),
    (
        ["./a", "./b", "--weights", "1,1", "--no-normalize"],
        "{inputs: [./a, ./b], weights: [1, 1], normalize: false}",
    ),
    (
        ["./a", "./b", "--method", "ties", "--base", "./c", "--density", "0.5", "--lambda", "0.8"],
        "{inputs: [./a, ./b], method: ties, base: ./c, density: 0.5, lambda: 0.8}",
    ),
    (
        ["./a", "./b", "--method", "dare_ties", "--base", "./c", "--density", "0.5,0.9", "--seed", "3"],
        "{inputs: [{path: ./a, density: 0.5}, {path: ./b, density: 0.9}], method: dare_ties, base: ./c, seed: 3}",
    ),
    (
        ["./a", "./b", "--beta", "0.4", "--only", "layers", "--copy-rest", "B", "--dtype", "fp16"],
        "{inputs: [./a, ./b], beta: 0.4, only: layers, copy_rest: B, dtype: fp16}",
    ),
    (
        ["./a", "./b", "--beta", "0.4", "--exclude", "norm", "--copy-rest", "./c", "--max-shard-size", "300"],
        "{inputs: [./a, ./b], beta: 0.4, exclude: norm, copy_rest: ./c, max_shard_size: 300}",
    ),
    (
        ["./a", "./b", "--beta", "0.4", "--rule", "norm=0.9", "--rule", "head=copy:./c"],
        "{inputs: [./a, ./b], beta: 0.4, rules: [{match: norm, beta: 0.9}, {match: head, copy_from: ./c}]}",
    ),
    (
        ["./a", "./b", "./c", "--method", "soup", "--rule", "norm=1,2,3", "--rule", "head=exclude",
         "--copy-rest", "C"],
        "{inputs: [./a, ./b, ./c], method: soup, copy_rest: C, "
        "rules: [{match: norm, weights: [1, 2, 3]}, {match: head, exclude: true}]}",
    ),
    (
        ["./a", "./b", "--beta", "0.4", "--layers", "0:3", "--curve", "0.2,0.8"],
        "{inputs: [./a, ./b], beta: 0.4, rules: [{layers: '0:3', curve: [0.2, 0.8]}]}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "spec"), SAME, ids=[" ".join(words) for words, _ in SAME])
def test_flags_say_what_a_spec_says(words: list[str], spec: str) -> None:
    Path("spec.yaml").write_text(spec)
    by_flags, by_spec = merged("flags", *words), merged("spec", "--spec", "spec.yaml")
    assert by_flags.keys() == by_spec.keys()
    assert all(by_flags[name].tobytes() == by_spec[name].tobytes() for name in by_flags)
    a, b = json.loads(Path("flags/merge.json").read_text()), json.loads(Path("spec/merge.json").read_text())
    assert a["plan"] == b["plan"]
    assert a["asked"] == b["asked"]


def test_a_mergekit_file(tmp_path: Path) -> None:
    content = {
        "merge_method": "linear",
        "models": [
            {"model": "./a", "parameters": {"weight": [1, 0]}},
            {"model": "./b", "parameters": {"weight": [0, 1]}},
        ],
        "dtype": "float32",
    }
    Path("m.yml").write_text(yaml.safe_dump(content))
    got = merged("out", "--spec", "m.yml", "--max-shard-size", "400")
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    for layer, share in enumerate([1.0, 0.5, 0.0]):
        name = f"m.layers.{layer}.mlp"
        want = (share * a[name].astype(np.float64) + (1 - share) * b[name]).astype(np.float32)
        np.testing.assert_array_equal(got[name], want)
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    assert (
        "already complete"
        in dromos("merge", "--spec", "m.yml", "--max-shard-size", "400", "--out", "out").output
    )


def test_dry_run_tells_weights_and_cost_as_text_and_json() -> None:
    words = ("merge", "./a", "./b", "--beta", "0.25", "--rule", "norm=1", "--dry-run")
    text = dromos(*words).output
    assert "m.layers.0.mlp  F32 [6, 5]  0.25 A + 0.75 B" in text
    assert "m.norm  F32 [7]  1 A" in text
    assert "reads 780 bytes" in text  # two of 404 bytes, but of the norm one
    plan = json.loads(dromos(*words, "--json").output)
    assert {t["name"]: t["terms"] for t in plan["tensors"]}["m.norm"] == [[0, "m.norm", 1.0, 1.0]]
    assert plan["cost"]["read"] == 780
    assert plan["files"] == {"model.safetensors": plan["bytes_written"]}
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "c"]


def test_json_is_the_record() -> None:
    result = dromos("merge", "./a", "./b", "--beta", "0.25", "--out", "out", "--json")
    assert json.loads(result.stdout) == json.loads(Path("out/merge.json").read_text())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("./a", "./b", "--spec", "s.yaml", "--beta", "0.5"), "leave beta, A B out"),
        (("--spec", "s.yaml", "--lambda", "2", "--copy-rest", "B"), "leave lambda, copy-rest out"),
        (("--spec", "s.yaml", "--max-shard-size", "3GB"), "max_shard_size: also set in the spec"),
        (("./a", "./b", "--beta", "0.5", "--layers", "0:3"), "--layers and --curve belong together"),
        (("./a", "./b", "--beta", "0.5", "--rule", "norm"), "write REGEX=WEIGHTS"),
        (("./a", "./b", "--beta", "0.5", "--rule", "norm=x"), "write numbers with commas"),
        (("./a", "./b", "--beta", "0.5", "--density", "0.5"), "--density is for"),
        (("./a", "./b", "--beta", "0.5", "--max-shard-size", "big"), "write a size such as 5GB"),
        (("--window", "runs/x", "--beta", "0.5"), "a window sets inputs and weights itself"),
        (("--window", "runs/x,last"), "write RUN/STAGE,KEY=VALUE"),
        (("--window", "runs/x,last=2,last=3"), "a key appears twice"),
        (("--window", "runs/x,least=2"), "window.least: unknown key; did you mean 'last'"),
        (("--window", "runs/x,last=2"), "has no complete checkpoint"),
        ((), "two inputs or more"),
    ],
)
def test_what_does_not_go_together(words: tuple[str, ...], why: str) -> None:
    Path("s.yaml").write_text("{inputs: [./a, ./b], beta: 0.5, max_shard_size: 1GB}")
    result = dromos("merge", *words, "--out", "out")
    assert result.exit_code == 2
    assert why in " ".join(result.output.split())
    assert not Path("out").exists()


def test_a_window_over_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = {step: floats(step, 5) for step in (10, 20, 30)}
    for step, value in values.items():
        folder = Path(f"run/real/checkpoints/step_{step:08d}")
        folder.mkdir(parents=True)
        content = {"module": {"w": torch.from_numpy(value.copy())}, "buffer_names": [], "optimizer": None}
        torch.save(content, folder / "mp_rank_00_model_states.pt")
        (folder / "COMPLETE").write_text("")
    got = merged("out", "--window", "run/real,last=2,schedule=linear")
    want = (values[20].astype(np.float64) * (1 / 3) + values[30].astype(np.float64) * (2 / 3)).astype(
        np.float32
    )
    np.testing.assert_array_equal(got["w"], want)
    record = json.loads(Path("out/merge.json").read_text())
    assert [entry["step"] for entry in record["inputs"]] == [20, 30]
