"""Merges into an object store: moto stands for S3. The objects are those that a disk gets, or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import UserError
from pretrain.merge import merge, open_weights, remote_output
from tests.data_pipeline.s3_server import s3_server
from tests.pretrain.merge.build import floats, write

LARGE = (1500, 1000)  # 6 MB in fp32: more than the smallest part


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as root:
        yield root


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    for seed, name in enumerate("ab"):
        tensors = {f"layer.{i}.weight": floats(9 * seed + i, *LARGE) for i in range(3)}
        folder = write(
            tmp_path / name, tensors | {"norm": floats(seed, 7), "none": np.zeros((0, 3), np.float32)}
        )
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "a"), str(tmp_path / "b")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_output, "PART", 5 << 20)


def objects(folder: str) -> dict[str, bytes]:
    store = storage.filesystem(folder)
    store.invalidate_cache()
    return {path.rpartition("/")[2]: store.cat_file(path) for path in store.find(folder)}


def uploads(folder: str) -> list[Any]:
    store = storage.filesystem(folder)
    return store.call_s3("list_multipart_uploads", Bucket=store.split_path(folder)[0]).get("Uploads", [])


def test_the_objects_are_those_of_a_disk(pair: tuple[str, str], tmp_path: Path, bucket: str) -> None:
    asked: dict[str, Any] = {"beta": 0.3, "max_shard_size": 13_000_000}
    told: list[int] = []
    record = merge(pair, f"{bucket}/out", **asked, progress=told.append)
    merge(pair, tmp_path / "out", **asked)
    found = objects(f"{bucket}/out")
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sum(name.endswith(".safetensors") for name in found) == 2
    assert found == local
    assert sum(told) == sum(entry["size"] for entry in record["output"].values())
    assert uploads(bucket) == []
    assert merge(pair, f"{bucket}/out", **asked)["plan"] == record["plan"]
    with pytest.raises(UserError, match="out holds another merge"):
        merge(pair, f"{bucket}/out", beta=0.4)
    np.testing.assert_array_equal(
        open_weights(f"{bucket}/out").array("norm"), open_weights(str(tmp_path / "out")).array("norm")
    )


def test_nothing_is_seen_before_the_end_nor_after_an_error(
    pair: tuple[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{bucket}/broken"
    seen: list[dict[str, bytes]] = []
    real = remote_output.Uploads.write

    def write_some(self: remote_output.Uploads, data: bytes | bytearray) -> None:
        seen.append(objects(out))
        if len(seen) == 5:
            assert uploads(bucket)  # parts are there, and no object
            raise OSError("the network is gone")
        real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(remote_output.Uploads, "write", write_some)
        with pytest.raises(OSError, match="network is gone"):
            merge(pair, out, beta=0.3)
    assert seen == [{}] * 5
    assert objects(out) == {}
    assert uploads(bucket) == []
    merge(pair, out, beta=0.3)
    assert "merge.json" in objects(out)


def test_a_bucket_that_is_not_there_is_named(pair: tuple[str, str], bucket: str) -> None:
    with pytest.raises(UserError, match="s3://nowhere-at-all/out: cannot be written"):
        merge(pair, "s3://nowhere-at-all/out", beta=0.3)


def test_what_stands_there_is_left_alone(pair: tuple[str, str], bucket: str) -> None:
    storage.publish(f"{bucket}/mine/notes.txt", b"keep me")
    with pytest.raises(UserError, match="mine exists and is not the output of a merge"):
        merge(pair, f"{bucket}/mine", beta=0.3)
    assert objects(f"{bucket}/mine") == {"notes.txt": b"keep me"}
