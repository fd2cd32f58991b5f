"""Weights in an object store compared with the same files on disk: every format, with faults, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline import storage
from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.weights import byte_file
from pretrain.weights.byte_file import BlockCache, RemoteFile
from pretrain.weights.dtypes import elements
from pretrain.weights.source import WeightSource, open_weights
from tests.pretrain.weights.formats.test_zero_layout import numbered, stage_2, stage_3
from tests.support.merge_inputs import floats, read_bytes, write
from tests.support.s3_server import faulty_s3, s3_server, upload

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as root:
        yield root


def same(remote: WeightSource, local: WeightSource) -> None:
    assert sorted(remote.names()) == sorted(local.names())
    assert (remote.tied, remote.frozen) == (local.tied, local.frozen)
    assert set(remote.companions) == set(local.companions)
    for name in local.names():
        count = elements(local.info(name)[1])
        assert remote.info(name) == local.info(name)
        assert remote.read(name, 0, count).tobytes() == local.read(name, 0, count).tobytes(), name
        assert remote.read(name, count // 3, count).tobytes() == local.read(name, count // 3, count).tobytes()


def sharded(folder: Path) -> Path:
    tensors = {f"layers.{i}.w": floats(i, 40, 30) for i in range(6)}
    names = list(tensors)
    placed: dict[str, str] = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write(folder, {name: tensors[name] for name in part}, file)
        placed |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text('{"vocab_size": 3}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def pickled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    base = torch.randn(50, 40)
    content = {"w": base, "t": base.t(), "half": torch.randn(7).half(), "alias": base, "row": base[3]}
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def zero(folder: Path, stage: int) -> Path:
    folder.mkdir(parents=True)
    (stage_2 if stage == 2 else stage_3)(folder, numbered([[(9, 5), (7,)], [(3, 11)]]), 4)
    return folder


def under_latest(folder: Path) -> Path:
    zero(folder / "global_step7", 3)
    (folder / "latest").write_text("global_step7\n")
    return folder


def universal(folder: Path) -> Path:
    for name, shape in {"a.w": (5, 3), "b": (4,)}.items():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": torch.randn(shape), "cat_dim": 0}, folder / "zero" / name / "fp32.pt")
    return folder


KINDS = {
    "sharded": sharded, "pickled": pickled, "zero2": lambda f: zero(f, 2), "zero3": lambda f: zero(f, 3),
    "latest": under_latest, "universal": universal,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_it_is_on_disk(bucket: str, tmp_path: Path, kind: str) -> None:
    folder = KINDS[kind](tmp_path / kind)
    remote = open_weights(upload(folder, f"{bucket}/{kind}"))
    same(remote, open_weights(str(folder)))
    assert all("ETag" in mark for mark in remote.hashes().values())


def test_a_file_by_its_own_address(bucket: str, tmp_path: Path) -> None:
    upload(pickled(tmp_path / "p"), f"{bucket}/one")
    same(open_weights(f"{bucket}/one/pytorch_model.bin"), open_weights(str(tmp_path / "p/pytorch_model.bin")))


def test_steps_of_a_remote_stage(bucket: str, tmp_path: Path) -> None:
    for step in (5, 10, 20):
        folder = zero(tmp_path / f"run/stage/checkpoints/step_{step:08d}", 2)
        if step != 20:
            (folder / "COMPLETE").write_text("")
    upload(tmp_path / "run", f"{bucket}/run")
    assert open_weights(f"{bucket}/run/stage@5").located.path.endswith("step_00000005")
    assert open_weights(f"{bucket}/run/stage@latest").located.path.endswith("step_00000010")
    for which in ("20", "7", "best"):
        with pytest.raises(UserError, match=r"stage@\w+: .*complete steps: 5, 10"):
            open_weights(f"{bucket}/run/stage@{which}")


def test_a_merge_from_the_store_is_the_merge_from_the_disk(bucket: str, tmp_path: Path) -> None:
    a, b = (
        sharded(tmp_path / "a"),
        write(tmp_path / "b", {f"layers.{i}.w": floats(i + 9, 40, 30) for i in range(6)}),
    )
    url = upload(a, f"{bucket}/merged")
    merge([url, str(b)], tmp_path / "remote", beta=0.3)
    merge([str(a), str(b)], tmp_path / "local", beta=0.3)
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_what_is_not_there_or_not_weights(bucket: str, tmp_path: Path) -> None:
    storage.publish(f"{bucket}/bad/model.safetensors", b"12345678 not a header")
    storage.publish(f"{bucket}/bad.pt", b"no archive")
    for address, why in {
        f"{bucket}/nothing": "not found", f"{bucket}/nothing.safetensors": "not found",
        f"{bucket}/bad": r"bad/model\.safetensors: not a safetensors", f"{bucket}/bad.pt": r"bad\.pt: refused",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=why):
            open_weights(address)


@pytest.mark.parametrize("size", ["same", "other"])
def test_an_object_changed_after_it_was_opened_is_an_error(bucket: str, tmp_path: Path, size: str) -> None:
    url = f"{bucket}/changing-{size}/model.safetensors"
    for number, count in enumerate((1000, 1000 if size == "same" else 1001)):
        save_file({"w": floats(number, count)}, tmp_path / f"{number}.safetensors")
    storage.publish(url, (tmp_path / "0.safetensors").read_bytes())
    source = open_weights(url)
    storage.publish(url, (tmp_path / "1.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors: changed while it was being read"):
        source.read("w", 0, 1000)
    with pytest.raises(UserError, match="changed while it was being read"):
        source.check_unchanged()


def test_a_local_file_changed_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    """Includes a truncated file: reading its mapped pages would kill the process."""
    folder = write(tmp_path / "a", {"w": floats(0, 100_000)})
    source = open_weights(str(folder))
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="changed while it was being read"):
        source.read("w", 90_000, 100_000)
    with pytest.raises(UserError, match="changed while it was being read"):
        source.check_unchanged()


def test_headers_come_by_small_ranges_and_each_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_file, "MAX_BLOCK_BYTES", 1 << 20)
    with faulty_s3() as (root, proxy):
        tensors = {f"w{i}": floats(i, 500_000) for i in range(4)}
        write(tmp_path / "m", tensors)
        torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, tmp_path / "m/m.pt")
        upload(tmp_path / "m", f"{root}/m")
        for name in ("model.safetensors", "m.pt"):
            size = (tmp_path / "m" / name).stat().st_size
            key = f"{root.removeprefix('s3://')}/m/{name}"
            proxy.reset_counters()
            source = open_weights(f"{root}/m/{name}")
            assert proxy.bytes[key] < 200_000
            proxy.reset_counters()
            for tensor, expected in tensors.items():
                for at in range(0, 500_000, 30_000):
                    got = source.read(tensor, at, min(at + 30_000, 500_000))
                    np.testing.assert_array_equal(got, expected[at : at + 30_000])
            assert size - 200_000 < proxy.bytes[key] < size * 1.05
            assert proxy.gets[key] < 20


def test_reads_go_on_over_faults(tmp_path: Path) -> None:
    with faulty_s3(rate=0.25, seed=3) as (root, proxy):
        folder = sharded(tmp_path / "a")
        url = upload(folder, f"{root}/a")
        same(open_weights(url), open_weights(str(folder)))
        assert sum(proxy.faults.values()) > 2


def test_blocks_are_bounded_however_much_is_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_file, "MAX_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(byte_file, "MIN_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(byte_file, "CACHE_BYTES", 1 << 16)
    data = np.random.default_rng(0).bytes(1 << 20)
    storage.publish(f"{bucket}/block", data)
    blocks = BlockCache(1)
    file = RemoteFile(f"{bucket}/block", blocks)
    for start in [*range(0, 1 << 20, 50_000), 7, 1_000_000]:
        stop = min(start + 60_000, 1 << 20)
        assert file.read(start, stop) == data[start:stop]
        assert len(blocks._cached) * blocks.size <= 1 << 16
    assert file.read(0, 1 << 20) == data
    assert file.read(10, 10) == b""
    assert BlockCache(1000).size == 1 << 14


def test_companions_and_lineage_come_from_the_store(bucket: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a")
    (folder / "README.md").write_text("---\nbase_model: org/base\n---\n# A model\n")
    source = open_weights(upload(folder, f"{bucket}/card"))
    assert source.companions["config.json"] == b'{"vocab_size": 3}'
    assert source.lineage == {"hf://org/base"}
    merge([f"{bucket}/card", str(folder)], tmp_path / "out", beta=1.0)
    first = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in read_bytes(f).items()}
    assert read_bytes(tmp_path / "out/model.safetensors") == first
