"""Digests and fingerprints of weights: each ingredient changes them, a boundary that moves does, a path does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import xxhash

from data_pipeline.errors import UserError
from pretrain.train.checkpoint import hash_file
from pretrain.weights.byte_file import LocalFile, open_file
from pretrain.weights.digests import combined_digest, file_digest, fingerprint, tensor_digest
from tests.support.counting_store import ROOT, counting_store
from tests.support.ingredients import assert_distinct, assert_each_changes

A, B = "00" * 8, "11" * 8


def test_tensor_and_file_digests_have_every_span_in_order() -> None:
    one, other = bytes(8), bytes([1] * 8)
    spans = {"a": [one, other], "swapped": [other, one], "one": [one], "none": [], "twice": [one, one]}
    assert_distinct([(name, tensor_digest(given)) for name, given in spans.items()])
    assert_each_changes(
        lambda header, tensors: file_digest(header, tensors),
        {"header": b"head", "tensors": [A, B]},
        [("header", b"heap"), ("header", b""), ("tensors", [B, A]), ("tensors", [A]), ("tensors", [A, B, A])],
    )


def test_a_combined_digest_has_every_name_and_digest_whatever_the_order() -> None:
    base = {"a": A, "b": B}
    others = [{"a": B, "b": A}, {"a": A}, {"a": A, "c": B}, {"a": A, "b": A}, {"a": A, "b": B, "c": A}, {}]
    assert_distinct([(str(given), combined_digest(given)) for given in [base, *others]])
    assert combined_digest(base) == combined_digest(dict(reversed(base.items())))


@pytest.mark.parametrize("size", [0, 1, 4096, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_fingerprint_is_size_and_content_not_path_or_time(tmp_path: Path, size: int) -> None:
    """Of a file of up to 3 MiB every byte counts; 256 pages of 4 KiB are the MiB between the first and the last."""
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    shutil.copy(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b", (1, 1))
    want = fingerprint(LocalFile(tmp_path / "a"))
    assert fingerprint(LocalFile(tmp_path / "b")) == want
    prints = [("whole", want)]
    for at in sorted({0, size // 3, size // 2, (1 << 20) - 1, 1 << 20, size - (1 << 20), size - 1}):
        if 0 <= at < size:
            changed = bytearray(data)
            changed[at] ^= 1
            (tmp_path / "c").write_bytes(changed)
            prints.append((f"byte {at}", fingerprint(LocalFile(tmp_path / "c"))))
    for name, other in (("longer", data + b"\0"), ("shorter", data[:-1])):
        if other != data:
            (tmp_path / "c").write_bytes(other)
            prints.append((name, fingerprint(LocalFile(tmp_path / "c"))))
    assert_distinct(prints)
    assert hash_file(tmp_path / "a") == xxhash.xxh64_hexdigest(data) == hash_file(tmp_path / "b")
    assert hash_file(tmp_path / "none") is None


def test_the_identity_of_a_local_file_is_its_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "w"

    def identity(size: int, changed: int) -> str:
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(0, changed))
        return LocalFile(path).identity

    assert_each_changes(identity, {"size": 12, "changed": 3}, [("size", 1), ("changed", 4), ("changed", 23)])
    opened = LocalFile(path)
    opened.check_unchanged()
    os.utime(path, ns=(0, 5))
    with pytest.raises(UserError, match="w: changed while it was being read"):
        opened.read(0, 1)


def test_the_identity_of_an_object_is_its_size_and_etag(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_store() as store:

        def identity(size: int, etag: str) -> str:
            return open_file(store.put("w", b"x" * size, etag)).identity

        base = {"size": 12, "etag": '"a"'}
        assert_each_changes(identity, base, [("size", 1), ("etag", '"b"'), ("etag", '"aa"')])
        identity(12, '"a"')
        opened = open_file(f"{ROOT}/w")
        assert bytes(opened.read(2, 5)) == b"xxx"
        assert fingerprint(opened) == opened.identity
        store.put("w", b"y" * 12, '"b"')
        with pytest.raises(UserError, match="w: changed while it was being read"):
            opened.peek(2, 5)
