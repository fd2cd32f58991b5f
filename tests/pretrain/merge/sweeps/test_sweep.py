"""A sweep writes the bytes of single merges and reads the inputs once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain.merge import interpolated, merge, parse_betas, sweep
from pretrain.merge.methods import native
from pretrain.merge.sweeps.results import folder_names
from pretrain.weights.source import WeightSource
from tests.support.merge_inputs import floats, write, write_bf16


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    for seed, name in enumerate("ab"):
        write(
            tmp_path / name,
            {"w": floats(seed, 100, 3), "n": np.array([seed]), "h": floats(seed, 7).astype(np.float16)},
        )
    return str(tmp_path / "a"), str(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "betas"),
    [
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0:1:0.3", [0, 0.3, 0.6, 0.9, 1]),
        ("0.2:0.4:0.1", [0.2, 0.3, 0.4]),
        ("1,0,0.25,0", [0, 0.25, 1]),
        ("0.5", [0.5]),
        ("0:0:1", [0]),
    ],
)
def test_betas(text: str, betas: list[float]) -> None:
    assert parse_betas(text) == betas


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0:1",
        "0:1:0",
        "0:1:-0.1",
        "1:0:0.1",
        "0:2:0.5",
        "a",
        "0:1:nan",
        "0:1:1e-9",
        "-0.1",
        "nan",
        "0,sNaN",
    ],
)
def test_betas_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--betas"):
        parse_betas(text)


def test_folder_names() -> None:
    assert folder_names([0, 0.3, 1]) == ["beta-0.00", "beta-0.30", "beta-1.00"]
    assert folder_names([0, 0.125]) == ["beta-0.000", "beta-0.125"]
    assert len(set(folder_names(parse_betas("0:1:0.0001")))) == 10001


def test_outputs_are_those_of_merges(pair: tuple[str, str], tmp_path: Path) -> None:
    betas = parse_betas("0:1:0.25")
    folders = sweep(*pair, betas, tmp_path / "s", chunk=64)
    assert [p.name for p in folders.values()] == [
        "beta-0.00",
        "beta-0.25",
        "beta-0.50",
        "beta-0.75",
        "beta-1.00",
    ]
    for beta, folder in folders.items():
        merge(pair, tmp_path / f"m{beta}", beta=beta)
        assert (folder / "model.safetensors").read_bytes() == (
            tmp_path / f"m{beta}/model.safetensors"
        ).read_bytes()
    for beta, parent in ((0.0, pair[1]), (1.0, pair[0])):
        mine = (folders[beta] / "model.safetensors").read_bytes()
        names = ("w", "h", "n")
        got, want = (
            load_file(folders[beta] / "model.safetensors"),
            load_file(Path(parent) / "model.safetensors"),
        )
        assert all(got[n].tobytes() == want[n].tobytes() for n in names), mine
    listed = json.loads((tmp_path / "s/sweep.json").read_text())["betas"]
    assert [(e["beta"], e["folder"]) for e in listed] == [(b, p.name) for b, p in folders.items()]


def test_each_range_is_read_once_for_all_betas(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, str, int]] = Counter()
    real = WeightSource.read

    def counted(self: WeightSource, name: str, start: int, stop: int) -> np.ndarray:
        reads[self.address, name, start] += 1
        return real(self, name, start, stop)

    monkeypatch.setattr(WeightSource, "read", counted)
    sweep(*pair, [0.1, 0.2, 0.3, 0.4], tmp_path / "s", chunk=64)
    assert {n for (_, name, _), n in reads.items() if name == "w"} == {1}
    chunks = (
        5 if native.compiled_function("linear", np.float32) is None else 2
    )  # 300 elements by 64, or by four times that
    assert sum(name == "w" for _, name, _ in reads) == 2 * chunks


def test_complete_outputs_are_not_written_again(pair: tuple[str, str], tmp_path: Path) -> None:
    first = sweep(*pair, [0.0, 0.5], tmp_path / "s")
    stamps = {p: (p / "model.safetensors").stat().st_mtime_ns for p in first.values()}
    moved: list[int] = []
    second = sweep(*pair, [0.0, 0.25, 0.5], tmp_path / "s", progress=moved.append)
    assert all((p / "model.safetensors").stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert sum(moved) == (second[0.25] / "model.safetensors").stat().st_size  # one output
    assert len(second) == 3


def test_interpolated_is_what_merge_writes(pair: tuple[str, str], tmp_path: Path) -> None:
    lazy = interpolated(*pair, 0.3)
    merge(pair, tmp_path / "m", beta=0.3)
    want = load_file(tmp_path / "m/model.safetensors")
    assert set(lazy) == set(want)
    assert len(lazy) == len(want)
    for name, value in want.items():
        np.testing.assert_array_equal(lazy[name], value)
        assert lazy[name].shape == value.shape
    with pytest.raises(KeyError):
        lazy["absent"]


def test_interpolated_bf16_comes_as_float32(tmp_path: Path) -> None:
    inputs = [str(write_bf16(tmp_path / x, {"w": floats(i, 9)})) for i, x in enumerate("ab")]
    got = interpolated(*inputs, 0.3)["w"]
    assert got.dtype == np.float32
    assert not (got.view(np.uint32) & 0xFFFF).any()
