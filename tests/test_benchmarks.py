"""The loader's benchmark, small: every figure it needs is there, and the limit does the work that it claims to do."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import bare, loader, photos


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(photos, "SAMPLES", 32)
    monkeypatch.setattr(photos, "SHARDS", 2)
    monkeypatch.setattr(photos, "MADE", 4)
    monkeypatch.setattr(photos, "SHARED", tmp_path / "nowhere")
    what = photos.write_tars(tmp_path / "tars", None)
    assert what.startswith("4 synthetic photographs of 448 pixels")
    assert what.endswith("repeated to 32 samples in 2 tars")
    return tmp_path


def test_photographs_are_repeated_under_keys_of_their_own(small: Path) -> None:
    again = photos.write_tars(small / "again", small / "tars")
    assert again.startswith("32 photographs of tars")
    members: list[str] = []
    for path in (small / "again").glob("*.tar"):
        with tarfile.open(path) as tar:
            members += tar.getnames()
    assert len(set(members)) == len(members) == 64


def test_our_reader_and_the_limit_tell_their_figures(small: Path) -> None:
    settings = loader._settings(small, 1) | {
        "batch": 8,
        "warm": 16,
        "samples": 48,
        "marks": (16, 48),
        "size": 64,
    }
    found = loader._measure(loader.OURS, Path(sys.executable), settings)
    assert set(found["megabytes"]) == {"16", "48"}
    limit = loader._measure(loader.LIMIT, Path(sys.executable), settings)
    for figures in (found, limit):
        assert figures["samples_per_second"] > 0
        assert figures["processor_ms"] > 0
    broken = loader._measure(loader.OURS, Path(sys.executable), settings | {"tars": str(small / "nowhere")})
    assert "nowhere" in broken["problem"]


def test_the_limit_decodes_and_crops(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bare.photos(str(small / "tars"))[0]
    out = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(bare, "crop", lambda width, height, scale: (10, 20, 400, 380))
    bare.one(data, 64, (0.9, 1.0), out)
    whole = Image.open(io.BytesIO(data)).crop((10, 20, 410, 400)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(out.astype(int) - np.asarray(whole)).mean() < 4  # its scaled box falls on whole pixels


def test_the_limits_crops_are_torchvisions() -> None:
    """By their statistics: mean area and ratio over the same distribution."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    import torch

    random.seed(0)
    ours = np.array([bare.crop(500, 375, (0.5, 1.0))[2:] for _ in range(4000)], float)
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(8, scale=(0.5, 1.0)), torch.zeros(3, 375, 500)
    theirs = [transform.make_params([image]) for _ in range(4000)]
    peer = np.array([(params["width"], params["height"]) for params in theirs], float)
    assert np.abs(ours.mean(axis=0) / peer.mean(axis=0) - 1).max() < 0.02
    assert np.abs(ours.std(axis=0) / peer.std(axis=0) - 1).max() < 0.08


def test_the_command_refuses_a_name_that_is_none() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2
    assert "no benchmark 'nothing'" in done.stderr


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ({"fast": 3.0, "small": 39.0}, []),
        ({"fast": 2.9, "small": 39.0}, ["fast"]),
        ({"fast": 3.0, "small": 40.0}, ["small"]),
        ({"fast": float("nan"), "small": float("nan")}, ["small", "fast"]),
        ({"fast": 3.1}, []),  # the part with the other bar did not run
    ],
)
def test_a_bar_that_is_not_held_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: dict[str, float],
    missed: list[str],
) -> None:
    figures = {"what": "w", "unit": "s", "rows": rows, "least": {"fast": 3.0}, "most": {"small": 40.0}}
    monkeypatch.setitem(command.BENCHMARKS, "order", lambda rounds: figures)
    assert command.main(["order", "--rounds", "1"]) == (1 if missed else 0)
    printed = capsys.readouterr()
    assert printed.out.count("NOT HELD") == len(missed)
    assert printed.err.splitlines() == [f"bar not held: order: {row}" for row in missed]
