"""Sweeps into a failing object store, and killed sweeps: visible outputs are complete, and no upload is left over."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline import storage
from data_pipeline.errors import ReadError
from data_pipeline.storage.object_store import with_retries
from launch.cli.app import app
from pretrain.merge import merge, sweep
from pretrain.merge.output import multipart, remote
from pretrain.merge.verify.check_output import verify
from tests.pretrain.merge.output.test_remote import objects
from tests.pretrain.merge.sweeps.test_remote_sweep import PEAK, run, tree
from tests.support.faulty_proxy import KINDS, Proxy
from tests.support.launching import ROOT
from tests.support.merge_inputs import floats, write
from tests.support.s3_server import faulty_s3, upload

BETAS = [0.0, 0.3, 1.0]
EVERY = ("GET", "HEAD", "PUT", "POST", "DELETE")
Store = tuple[str, Proxy]


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with faulty_s3(seed=11) as (root, proxy):
        proxy.stall = 1.5
        yield root, proxy


@pytest.fixture
def store(
    server: Store, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """A folder for this test alone. Parts have S3's minimum size."""
    monkeypatch.setattr(remote, "PART", 5 << 20)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    root, proxy = server
    proxy.reset_counters()
    yield f"{root}/{request.node.name.replace('[', '-').rstrip(']')}", proxy
    calm(proxy)


def unfinished(out: str) -> list[str]:
    """Keys of the uploads below `out`, at any depth, that are neither completed nor aborted."""

    def call(store: Any) -> list[str]:
        bucket, key, _ = store.split_path(out)
        found = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
        return [entry["Key"] for entry in found.get("Uploads", [])]

    return with_retries(out, call)


def calm(proxy: Proxy) -> None:
    proxy.rate, proxy.delay, proxy.kinds, proxy.methods = 0.0, 0.0, KINDS, ("GET", "HEAD")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    for seed, name in enumerate("ab"):
        w = floats(seed, 50, 3)
        w[0, 0] = (3.0, -1.0)[seed]
        layers = {f"layer.{i}.weight": floats(9 * seed + i, 1500, 1000) for i in range(2)}
        folder = write(tmp_path / name, {"w": w, **layers})
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_a_tenth_of_all_requests_fails(pair: tuple[str, str], store: Store) -> None:
    """Reads and writes get a 503, no answer, a partial answer, or a reset after they were executed."""
    out, proxy = store
    inputs = [upload(Path(path), f"{out}/{Path(path).name}") for path in pair]
    sweep(*pair, BETAS, "s")
    proxy.rate, proxy.methods = 0.1, EVERY
    sweep(inputs[0], inputs[1], BETAS, f"{out}/s")
    reports = [verify(f"{out}/s/beta-{beta:.2f}", full=True) for beta in BETAS]
    calm(proxy)
    for beta, report in zip(BETAS, reports, strict=True):
        name = f"s/beta-{beta:.2f}/model.safetensors"
        assert storage.read_bytes(f"{out}/{name}") == Path(name).read_bytes()
        assert not report.wrong, report.lines()
        assert report.recomputed
    assert sum(proxy.faults.values()) > 10
    assert unfinished(out) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_while_scores_are_kept(pair: tuple[str, str], store: Store, kind: str) -> None:
    out, proxy = store
    run(pair, "s", PEAK, betas=BETAS)
    proxy.rate, proxy.methods, proxy.kinds = 0.15, EVERY, (kind,)
    run(pair, f"{out}/s", PEAK, betas=BETAS)
    calm(proxy)
    assert tree(f"{out}/s") == tree("s")
    assert proxy.faults[kind] > 3
    assert unfinished(out) == []


def test_a_store_that_stays_away_while_it_is_written(
    pair: tuple[str, str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear error, no visible object, and the next run reuses the parts that were sent."""
    out, proxy = store
    monkeypatch.setenv("DROMOS_READ_TRIES", "2")
    real, sent = multipart.MultipartUpload._put, []

    def put(self: multipart.MultipartUpload, number: int, data: bytes) -> None:
        if number == 2:
            proxy.rate, proxy.methods, proxy.kinds = 1.0, EVERY, ("503",)
        real(self, number, data)
        sent.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(multipart.MultipartUpload, "_put", put)
        with pytest.raises(ReadError, match=r"model\.safetensors could not be written after 2 tries: 503"):
            merge(pair, f"{out}/m", beta=0.3)
    calm(proxy)
    assert objects(f"{out}/m") == {}
    assert len(unfinished(out)) == 1
    merge(pair, f"{out}/m", beta=0.3)
    merge(pair, "m", beta=0.3)
    assert tree(f"{out}/m") == tree("m")
    assert unfinished(out) == []


CODE = """
import sys, launch.cli
from pretrain.merge.output import remote
remote.PART = 5 << 20
sys.exit(launch.cli.main())
"""


def names(out: str) -> list[str]:
    """Names of the objects below a folder."""
    store = storage.filesystem(out)
    bucket, key, _ = store.split_path(out)
    found = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/").get("Contents", [])
    return [entry["Key"].removeprefix(f"{key}/") for entry in found]


def complete(out: str) -> list[str]:
    """merge.json files of complete outputs of a sweep."""
    return [name for name in names(out) if name.endswith("/merge.json")]


MOMENTS: dict[str, Callable[[str], bool]] = {
    "the first part": lambda out: bool(unfinished(out)),
    "the first mark": lambda out: any(name.endswith(remote.MARK) for name in names(out)),
    "the first weights": lambda out: any(name.endswith(".safetensors") for name in names(out)),
    "the first output": lambda out: bool(complete(out)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_sweep_that_is_killed_goes_on(
    pair: tuple[str, str], store: Store, tmp_path: Path, moment: str
) -> None:
    """Only the sweep that is killed needs a process of its own; the next ones run in this process."""
    out, proxy = store
    out = f"{out.replace(' ', '-')}/s"
    arguments = ["sweep", *pair, "--betas", "0,0.3,1", "--out", out]
    proxy.delay = 0.05
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while process.poll() is None and not MOMENTS[moment](out):
        time.sleep(0.02)
    was_running = process.poll() is None
    process.kill()
    said: Any = process.communicate()[0]
    assert was_running, said
    proxy.delay = 0.0
    for name in complete(out):
        report = verify(f"{out}/{name.rpartition('/')[0]}")
        assert not report.wrong, report.lines()
    assert len(complete(out)) < len(BETAS)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    sweep(*pair, BETAS, "s")
    assert tree(out) == tree("s")
    assert unfinished(out) == []
    assert "already complete" in CliRunner().invoke(app, arguments).stdout
