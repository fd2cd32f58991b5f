"""A stage's folder keeps the counts of what its sources leave out, for the report."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data_pipeline.sources.left_out import LeftOutWarning
from data_pipeline.sources.manifest import open_source
from pretrain.report.read_run import read_run
from pretrain.train.stage_setup import write_left_out
from tests.support.samples import write_source


def test_the_counts_of_all_sources_are_written_and_read(tmp_path: Path) -> None:
    for name in ("clean", "odd"):
        write_source(tmp_path / name, [2])
    with tarfile.open(tmp_path / "odd" / "00000.tar", "a") as tar:
        for number in range(3):
            link = tarfile.TarInfo(f"z{number}.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
            tar.addfile(link)
    clean = open_source("clean", str(tmp_path / "clean"))
    with pytest.warns(LeftOutWarning):
        odd = open_source("odd", str(tmp_path / "odd"))
    folder = tmp_path / "run" / "main"
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text("stage: {}\n")
    context = cast(Any, SimpleNamespace(folder=folder))
    write_left_out(context, {"pairs": cast(Any, SimpleNamespace(manifests={"clean": clean, "odd": odd}))})
    want = {"pairs.odd": {"symbolic links": 3}}
    assert json.loads((folder / "left_out.json").read_text()) == want
    assert read_run(tmp_path / "run").stages[0].left_out == want
    write_left_out(context, {"pairs": cast(Any, SimpleNamespace(manifests={"clean": clean}))})
    assert not (folder / "left_out.json").exists()
