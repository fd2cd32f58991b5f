"""Merges into an object store (moto as S3): the objects equal the files of a local merge, or there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from pretrain.merge import merge, open_weights
from pretrain.merge.output import multipart, remote
from tests.support.merge_inputs import floats, write
from tests.support.s3_server import s3_server

botocore = pytest.importorskip("botocore.exceptions")
s3fs_errors = pytest.importorskip("s3fs.errors")
LARGE = (300, 1000)  # 1.2 MB in fp32: more than PART
PART = 1 << 20  # bytes
S3_PART = 5 << 20  # the smallest that S3 accepts


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as root:
        yield root


def write_pair(folder: Path, shape: tuple[int, int]) -> tuple[str, str]:
    for seed, name in enumerate("ab"):
        tensors = {f"layer.{i}.weight": floats(9 * seed + i, *shape) for i in range(3)}
        path = write(folder / name, tensors | {"norm": floats(seed, 7), "none": np.zeros((0, 3), np.float32)})
        (path / "config.json").write_text('{"model_type": "llama"}')
    return str(folder / "a"), str(folder / "b")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two models, for a store that accepts parts of PART bytes."""
    monkeypatch.setattr(remote, "PART", PART)
    monkeypatch.setattr(remote, "SMALLEST_PART", PART)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)
    return write_pair(tmp_path, LARGE)


@pytest.fixture
def large_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two models, for a store with the limit of S3."""
    monkeypatch.setattr(remote, "PART", S3_PART)
    return write_pair(tmp_path, (1500, 1000))


def objects(folder: str) -> dict[str, bytes]:
    store = storage.filesystem(folder)
    store.invalidate_cache()
    return {path.rpartition("/")[2]: store.cat_file(path) for path in store.find(folder)}


def uploads(folder: str) -> list[Any]:
    store = storage.filesystem(folder)
    return store.call_s3("list_multipart_uploads", Bucket=store.split_path(folder)[0]).get("Uploads", [])


def test_the_objects_are_those_of_a_disk(large_pair: tuple[str, str], tmp_path: Path, bucket: str) -> None:
    pair = large_pair
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
    with pytest.raises(UserError, match="out has another merge"):
        merge(pair, f"{bucket}/out", beta=0.4)
    np.testing.assert_array_equal(
        open_weights(f"{bucket}/out").array("norm"), open_weights(str(tmp_path / "out")).array("norm")
    )


def test_nothing_is_seen_before_the_end_nor_after_an_error(
    pair: tuple[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{bucket}/broken"
    seen: list[dict[str, bytes]] = []
    real = remote.Uploads.write

    def write_some(self: remote.Uploads, data: bytes | bytearray) -> None:
        seen.append(objects(out))
        if len(seen) == 5:
            assert uploads(bucket)  # parts are there, and no object
            raise OSError("the network is gone")
        real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(remote.Uploads, "write", write_some)
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


def test_uploads_of_others_below_are_left_alone(pair: tuple[str, str], bucket: str) -> None:
    store = storage.filesystem(bucket)
    place = {"Bucket": store.split_path(bucket)[0], "Key": "shelf/of-others/model.bin"}
    upload = store.call_s3("create_multipart_upload", **place)["UploadId"]
    merge(pair, f"{bucket}/shelf", beta=0.3)
    assert [found["UploadId"] for found in uploads(bucket)] == [upload]
    store.call_s3("abort_multipart_upload", UploadId=upload, **place)


def test_other_content_of_the_folder_is_left_alone(pair: tuple[str, str], bucket: str) -> None:
    storage.publish(f"{bucket}/mine/notes.txt", b"keep me")
    with pytest.raises(UserError, match="mine exists and is not the output of a merge"):
        merge(pair, f"{bucket}/mine", beta=0.3)
    assert objects(f"{bucket}/mine") == {"notes.txt": b"keep me"}


def killed_at(patch: pytest.MonkeyPatch, where: type, name: str, call: int) -> None:
    """Make a method fail from its `call`-th call on and skip the clean-up, as a kill does."""
    real, seen = getattr(where, name), []

    def fail(self: Any, *arguments: Any) -> Any:
        seen.append(name)
        if len(seen) >= call:
            raise KeyboardInterrupt
        return real(self, *arguments)

    patch.setattr(where, name, fail)
    patch.setattr(remote.Uploads, "stop", lambda self, abort_uploads: None)


def test_after_a_kill_only_the_rest_is_sent(
    pair: tuple[str, str], tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a kill of another plan, whose parts are overwritten."""
    out, parts = f"{bucket}/killed", []
    with monkeypatch.context() as patch:
        killed_at(patch, multipart.MultipartUpload, "_put", 4)
        with pytest.raises(KeyboardInterrupt):
            merge(pair, out, beta=0.3)
    assert len(uploads(bucket)) == 1
    assert objects(out) == {}
    real = multipart.with_retries

    def ask(url: str, call: Any, **options: Any) -> Any:
        if call.__qualname__.startswith("MultipartUpload._put.") and url.startswith(out):
            parts.append(url)
        return real(url, call, **options)

    monkeypatch.setattr(multipart, "with_retries", ask)
    merge(pair, out, beta=0.3)
    merge(pair, tmp_path / "out", beta=0.3)
    assert objects(out) == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(parts) == -(-(tmp_path / "out/model.safetensors").stat().st_size // PART) - 3
    assert uploads(bucket) == []
    other = f"{bucket}/other"
    with monkeypatch.context() as patch:
        killed_at(patch, multipart.MultipartUpload, "_put", 4)
        with pytest.raises(KeyboardInterrupt):
            merge(pair, other, beta=0.9)
    merge(pair, other, beta=0.3)
    same = objects(out)
    assert {name: data == same[name] for name, data in objects(other).items()} == dict.fromkeys(same, True)
    assert uploads(bucket) == []


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_kill_while_the_files_appear(
    pair: tuple[str, str], tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    out = f"{bucket}/appearing-{call}"
    with monkeypatch.context() as patch:
        killed_at(patch, multipart.MultipartUpload, "commit", call)
        with pytest.raises(KeyboardInterrupt):
            merge(pair, out, beta=0.3)
    assert len(objects(out)) == call  # the mark and what was before
    assert "merge.json" not in objects(out)
    with pytest.raises(UserError, match="another merge was killed while its files became visible"):
        merge(pair, out, beta=0.4)
    merge(pair, out, beta=0.3)
    merge(pair, tmp_path / "out", beta=0.3)
    assert objects(out) == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert uploads(bucket) == []


def test_a_left_over_mark_is_removed(
    pair: tuple[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{bucket}/marked"
    with monkeypatch.context() as patch:
        patch.setattr(remote, "remove", lambda urls: None)
        merge(pair, out, beta=0.3)
    assert remote.MARK in objects(out)
    merge(pair, out, beta=0.3)
    assert remote.MARK not in objects(out)


def test_an_output_that_lost_a_file_is_not_said_to_be_done(pair: tuple[str, str], bucket: str) -> None:
    out = f"{bucket}/lost"
    merge(pair, out, beta=0.3)
    storage.publish(f"{out}/model.safetensors", b"cut")
    with pytest.raises(UserError, match=r"lost/model\.safetensors: is missing or has another size"):
        merge(pair, out, beta=0.3)


def test_a_stopped_merge_keeps_what_was_sent(
    pair: tuple[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, and a store or an input that is unavailable for now."""
    for number, error in enumerate((KeyboardInterrupt(), ReadError("s3://x could not be read"))):
        out, real = f"{bucket}/stopped-{number}", remote.Uploads.write
        written: list[int] = []

        def write(
            self: remote.Uploads, data: bytes | bytearray, error: BaseException = error, real: Any = real,
            written: list[int] = written,
        ) -> None:  # fmt: skip
            written.append(len(data))
            if sum(written) > 3_400_000:
                raise error
            real(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(remote.Uploads, "write", write)
            with pytest.raises(type(error)):
                merge(pair, out, beta=0.3)
        assert objects(out) == {}
        (left,) = multipart.incomplete_uploads(out)
        store = storage.filesystem(out)
        parts = store.call_s3(
            "list_parts", Bucket=store.split_path(out)[0], Key=left.key, UploadId=left.upload
        )
        assert len(parts["Parts"]) >= 1
        merge(pair, out, beta=0.3)
        assert uploads(bucket) == []


@pytest.mark.parametrize("beta", [0.3, 0.4])
def test_two_merges_at_once_into_one_folder(
    pair: tuple[str, str], tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    """One output is complete; the other merge raises an error."""
    out, real = f"{bucket}/twice-{beta}", remote.Uploads.publish

    def publish(self: remote.Uploads) -> None:
        monkeypatch.setattr(remote.Uploads, "publish", real)
        merge(pair, out, beta=beta)
        real(self)

    monkeypatch.setattr(remote.Uploads, "publish", publish)
    with pytest.raises(UserError, match="another process wrote this folder meanwhile"):
        merge(pair, out, beta=0.3)
    merge(pair, tmp_path / "out", beta=beta)
    assert objects(out) == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert uploads(bucket) == []


class Answers:
    """A store that executes a call and then returns S3's error for a missing upload, which moto does not have."""

    def __init__(self, store: Any, method: str, times: list[int]) -> None:
        self._store, self._method, self._times = store, method, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def call_s3(self, method: str, **asked: Any) -> Any:
        answer = self._store.call_s3(method, **asked)
        if method == self._method and self._times:
            code, status = ("NoSuchUpload", 404) if self._times.pop() else ("InternalError", 500)
            said = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise s3fs_errors.translate_boto_error(botocore.ClientError(said, method))
        return answer


def test_an_aborted_upload_and_a_lost_answer(
    pair: tuple[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = multipart.with_retries

    def answering(method: str, times: list[int]) -> None:
        monkeypatch.setattr(
            multipart,
            "with_retries",
            lambda url, call, **o: real(url, lambda s: call(Answers(s, method, times)), **o),
        )

    for method in ("upload_part", "complete_multipart_upload"):
        answering(method, [1])
        with pytest.raises(UserError, match="another process also writes this object"):
            merge(pair, f"{bucket}/taken-{method}", beta=0.3)
    answering("complete_multipart_upload", [1, 0])
    merge(pair, f"{bucket}/lost-answer", beta=0.3)
    assert "merge.json" in objects(f"{bucket}/lost-answer")


def test_without_permission_to_list_uploads_a_merge_starts_again(
    pair: tuple[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(url: str, call: Any, **options: Any) -> Any:
        if "_list_uploads" in call.__code__.co_names:
            raise UserError(f"{url} may not be read")
        return real(url, call, **options)

    real = multipart.with_retries
    monkeypatch.setattr(multipart, "with_retries", denied)
    merge(pair, f"{bucket}/unlisted", beta=0.3)
    assert "merge.json" in objects(f"{bucket}/unlisted")


def test_many_outputs_take_a_bounded_memory() -> None:
    folder = "memory://folder"
    for outputs in (1, 2, 4, 11):
        uploads = remote.Uploads(folder, "key", outputs)
        assert outputs * uploads._part * (1 + uploads._ahead) <= 160 << 20, outputs
        assert uploads._part >= 5 << 20
