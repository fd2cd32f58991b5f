"""`verify` and `diff` in an object store give the results of the same files on a disk, also with failing requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from launch.cli.app import app
from pretrain.merge import merge
from pretrain.merge.output.record import sealed
from pretrain.merge.verify.check_output import verify
from pretrain.merge.verify.check_weights import Report
from pretrain.weights import byte_file
from tests.support.faulty_proxy import Proxy
from tests.support.merge_inputs import floats, write
from tests.support.s3_server import faulty_s3, upload

CONFIG = {"model_type": "llama", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2}
Store = tuple[str, Proxy]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with faulty_s3(seed=5) as (root, proxy):
        yield root, proxy


def model(folder: Path, seed: int) -> Path:
    layers = {f"model.layers.{i}.mlp.up.weight": floats(10 * seed + i, 300, 200) for i in range(2)}
    write(folder, {"model.embed_tokens.weight": floats(seed, 30, 8), **layers})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def merge_both(root: str, folder: Path) -> tuple[str, Path]:
    """One merge of inputs in the store, written to the store and to the disk, in three shards."""
    inputs = [upload(model(folder / name, seed), f"{root}/{name}") for seed, name in enumerate("ab")]
    merge(inputs, folder / "out", beta=0.3, max_shard_size=240_100)
    merge(inputs, f"{root}/out", beta=0.3, max_shard_size=240_100)
    return f"{root}/out", folder / "out"


@pytest.fixture(scope="module")
def intact(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A merge that no test may change."""
    return merge_both(f"{store[0]}/intact", tmp_path_factory.mktemp("intact"))


def findings(report: Report) -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in report.findings]


@pytest.mark.parametrize("full", [False, True])
def test_an_intact_output_passes_as_on_a_disk(intact: tuple[str, Path], full: bool) -> None:
    remote, local = (verify(str(place), full=full) for place in intact)
    assert not remote.wrong, findings(remote)
    assert findings(remote) == findings(local)
    assert remote.recomputed == local.recomputed > 2
    assert remote.plain()["folder"] == intact[0]
    assert remote.lines()[-1] == f"{intact[0]}: nothing is wrong"


def flipped(folder: Path, name: str, at: int) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[at] ^= 1
    (folder / name).write_bytes(raw)


DAMAGE: dict[str, Any] = {
    "a bit": lambda f: flipped(f, "model-00002-of-00003.safetensors", -9),
    "a header": lambda f: flipped(f, "model-00001-of-00003.safetensors", 3),
    "cut": lambda f: (f / "model-00003-of-00003.safetensors").write_bytes(b"12345678"),
    "a shard gone": lambda f: (f / "model-00001-of-00003.safetensors").unlink(),
    "config": lambda f: (f / "config.json").write_text('{"vocab_size": 31, "hidden_size": 8}'),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "index gone": lambda f: (f / "model.safetensors.index.json").unlink(),
    "record": lambda f: (f / "merge.json").write_text(
        (f / "merge.json").read_text().replace('"method": "linear"', '"method": "slerp"', 1)
    ),
    "another file": lambda f: shutil.copy(f / "model-00002-of-00003.safetensors", f / "more.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_as_on_a_disk(
    intact: tuple[str, Path], store: Store, tmp_path: Path, damage: str
) -> None:
    folder = shutil.copytree(intact[1], tmp_path / "out")
    DAMAGE[damage](folder)
    url = upload(folder, f"{store[0]}/{damage.replace(' ', '-')}/out")
    remote, local = verify(url), verify(folder)
    assert [(level, text.replace(url, str(folder))) for level, text in findings(remote)] == findings(local)
    assert remote.wrong == local.wrong == (damage != "another file")


def test_changed_missing_and_unreachable_inputs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{store[0]}/changed"
    merged = merge_both(root, tmp_path)
    upload(model(tmp_path / "a", 7), f"{root}/a")
    storage.remove([f"{root}/b/model.safetensors"])
    report = verify(merged[0])
    assert [state for _, state in report.inputs] == ["changed", "gone"]
    assert report.wrong
    monkeypatch.setenv("DROMOS_READ_TRIES", "2")
    record = json.loads(storage.read_bytes(f"{merged[0]}/merge.json"))
    real = byte_file._size_and_etag

    def away(url: str) -> tuple[int, str]:
        if f"{root}/a/" in url:
            raise ReadError(f"{url} could not be read after 2 tries: 503")
        return real(url)

    monkeypatch.setattr(byte_file, "_size_and_etag", away)
    report = verify(merged[0])
    assert [state for _, state in report.inputs] == ["not reached", "gone"]
    assert not report.wrong
    assert any(
        level == "note" and "could not be read after 2 tries" in text for level, text in findings(report)
    )
    assert record == sealed(record)


def test_a_folder_that_is_not_a_merge_is_refused(store: Store, tmp_path: Path) -> None:
    root = store[0]
    upload(model(tmp_path / "a", 0), f"{root}/plain")
    for url in (f"{root}/plain", f"{root}/nothing"):
        with pytest.raises(UserError, match=rf"{url}: .*no merge\.json"):
            verify(url)


def test_failing_requests_change_no_finding(
    intact: tuple[str, Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small blocks, so that there are many requests, of which 20 % fail."""
    monkeypatch.setattr(byte_file, "MAX_BLOCK_BYTES", 1 << 15)
    monkeypatch.setattr(byte_file, "MIN_BLOCK_BYTES", 1 << 15)
    proxy = store[1]
    proxy.reset_counters()
    proxy.rate = 0.2
    try:
        report = verify(intact[0], full=True)
    finally:
        proxy.rate = 0.0
    assert findings(report) == findings(verify(intact[1], full=True))
    assert sum(proxy.faults.values()) > 5


def test_a_store_that_stops_answering_gives_an_error(
    intact: tuple[str, Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROMOS_READ_TRIES", "2")
    real = byte_file.RemoteFile.read

    def read(self: byte_file.RemoteFile, start: int, stop: int) -> memoryview:
        store[1].rate, store[1].kinds = 1.0, ("503",)
        return real(self, start, stop)

    monkeypatch.setattr(byte_file.RemoteFile, "read", read)
    try:
        with pytest.raises(ReadError, match="could not be read"):
            verify(intact[0])
    finally:
        store[1].rate, store[1].kinds = 0.0, ("503", "stall", "truncate", "reset")


def test_the_commands(store: Store, tmp_path: Path) -> None:
    root = f"{store[0]}/commands"
    merged = merge_both(root, tmp_path)
    shown = CliRunner().invoke(app, ["verify", merged[0], "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["recomputed"] == 32
    drawn = tmp_path / "diff.svg"
    there = CliRunner().invoke(app, ["diff", f"{root}/a", merged[0], "--json", "--picture", str(drawn)])
    here = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(merged[1]), "--json"])
    assert there.exit_code == here.exit_code == 0, there.output
    remote, local = json.loads(there.stdout), json.loads(here.stdout)
    for found in (remote, local):
        assert {found.pop("a"), found.pop("b")}
    assert remote == local
    assert drawn.read_text().startswith("<svg")
    storage.remove([f"{merged[0]}/config.json"])
    assert CliRunner().invoke(app, ["verify", merged[0]]).exit_code == 1
