"""`recipe check` says what the sources of a recipe lack, and what lies in them unread."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.index.build import build_index
from launch import data_check
from launch.cli.app import app
from pretrain.recipe.load import load_recipe
from tests.support.samples import write_source

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs/demo/flip.yaml")


def warnings_of(path: str) -> list[str]:
    """Lines that `recipe check` prints about a source, by its functions."""
    stage = next(iter(load_recipe(DEMO, runnable=False).stages))
    loaded = load_recipe(DEMO, [f"{stage}.data.pairs.sources={{only: '{path}'}}"], runnable=False)
    missing = [
        text for _, key, _, text in data_check.missing_sources(loaded, [stage], False) if "only" in key
    ]
    return missing + [text for _, key, text in data_check.source_warnings(loaded, [stage]) if "only" in key]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    write_source(tmp_path / "a", [2, 2])
    assert warnings_of(f"{tmp_path}/a") == []
    assert warnings_of(f"{tmp_path}/a/{{00000..00001}}.tar") == []
    for path, message in (
        (f"{tmp_path}/a/{{00002..00004}}.tar", "none of 3 shards was found"),
        (f"{tmp_path}/a/{{00001..00004}}.tar", "3 of the 4 shards"),
        (f"{tmp_path}/a/*.tgz", "no file matches"),
        (f"{tmp_path}/a/7.tar", "does not exist"),
        (f"{tmp_path}/b", "does not exist"),
        ("hf://datasets/org/name", "not from hf://"),
        ("gs://bucket/set", "not from gs://"),
    ):
        (said,) = warnings_of(path)
        assert message in said


def test_what_is_not_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "a", [2])
    with tarfile.open(tmp_path / "a" / "00000.tar", "a") as tar:
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(link)
    (tmp_path / "a" / "00001.tgz").write_bytes(b"x")
    links, unread = warnings_of(f"{tmp_path}/a")
    assert "1 symbolic links are in no sample" in links
    assert "1 compressed tars beside" in unread
    monkeypatch.setattr(data_check, "MAX_SCANNED_BYTES", 0)  # large tars are not read without an index
    (unread,) = warnings_of(f"{tmp_path}/a")
    assert "1 compressed tars" in unread
    build_index(f"{tmp_path}/a")
    assert len(warnings_of(f"{tmp_path}/a")) == 2


def test_a_tar_that_goes_on_after_its_end_is_said(tmp_path: Path) -> None:
    write_source(tmp_path / "a", [2])
    path = tmp_path / "a" / "00000.tar"
    path.write_bytes(path.read_bytes() * 2)
    (said,) = warnings_of(f"{tmp_path}/a")
    assert "other members begin at byte" in said
    stage = next(iter(load_recipe(DEMO, runnable=False).stages))
    done = CliRunner().invoke(
        app, ["recipe", "check", DEMO, f"{stage}.data.pairs.sources={{only: '{tmp_path}/a'}}"]
    )
    assert "other members begin at byte" in done.output
