"""The demo's recipes over an S3 server that fails one request in ten: digests and losses equal those of local files."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import storage
from data_pipeline.index.build import build_index
from pretrain.run import metrics_log
from tests.integration.conftest import RECIPE, Demo
from tests.support import rank
from tests.support.s3_server import faulty_s3

FLIP = {name: f"{name}/train" for name in ("digits", "scenes_real", "scenes_synthetic")}


def upload(data: Path, source: str, root: str) -> None:
    for path in sorted((data / source).rglob("*")):
        if path.is_file():
            storage.publish(f"{root}/{path.relative_to(data)}", path.read_bytes())


def run(demo: Demo, folder: Path, *changes: str) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    given = ("train.steps=6", "eval=null", "data.pairs.batch=32", "loader.workers=2", f"run.dir={folder}")
    with chdir(demo.folder):
        code, printed = rank.run(RECIPE, *given, *changes, stage="masked", logs=folder)
    assert code == 0, printed
    return metrics_log.read(folder / "masked" / "metrics.jsonl")


def results(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


@pytest.fixture(scope="module")
def local(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(demo, tmp_path_factory.mktemp("local"))


@pytest.mark.integration
@pytest.mark.parametrize("indexed", [True, False])
def test_the_demo_over_s3_equals_the_demo(
    demo: Demo, local: list[dict[str, Any]], tmp_path: Path, indexed: bool
) -> None:
    with faulty_s3(rate=0.0) as (root, proxy):
        for path in FLIP.values():
            upload(demo.folder / "data" / "demo", path, root)
            if indexed:
                build_index(f"{root}/{path}")
        proxy.rate = 0.1
        moved = [f"data.pairs.sources.{name}.path={root}/{path}" for name, path in FLIP.items()]
        remote = run(demo, tmp_path / "remote", f"loader.cache.folder={tmp_path / 'cache'}", *moved)
        assert proxy.faults.total() > 0
    assert results(remote) == results(local)
    assert len({row["batch_digest"] for row in local}) == len(local) == 6
    assert not any(row["skipped"] for row in remote)
