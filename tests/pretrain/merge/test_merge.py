"""A merge end to end: bits, endpoints, chunking, refused inputs, and outputs that appear complete or not at all."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import partial_of
from pretrain.merge import merge, open_weights, plan
from pretrain.merge.planning import describe
from tests.support.merge_inputs import bf16_bits, floats, read_bytes, write, write_bf16


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Two fp32 models with an integer buffer."""
    for seed, name in enumerate("ab"):
        tensors = {
            "llm.up.weight": floats(seed, 17, 5),
            "llm.norm.weight": floats(seed + 10, 5),
            "projector.weight": floats(seed + 20, 3, 3),
            "count": np.array([seed], np.int64),
        }
        write(tmp_path / name, tensors)
    return str(tmp_path / "a"), str(tmp_path / "b")


def sha(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def test_fp32_sums_are_rounded_once_from_fp64(pair: tuple[str, str], tmp_path: Path) -> None:
    merge(pair, tmp_path / "out", beta=0.3)
    a, b, got = (load_file(Path(p) / "model.safetensors") for p in (*pair, tmp_path / "out"))
    for name in ("llm.up.weight", "llm.norm.weight", "projector.weight"):
        wide = 0.3 * a[name].astype(np.float64) + (1 - 0.3) * b[name].astype(np.float64)
        np.testing.assert_array_equal(got[name], wide.astype(np.float32))
    np.testing.assert_array_equal(got["count"], a["count"])


def test_fp32_sum_is_not_an_fp32_computation(pair: tuple[str, str], tmp_path: Path) -> None:
    merge(pair, tmp_path / "out", beta=0.3)
    a, b, got = (load_file(Path(p) / "model.safetensors") for p in (*pair, tmp_path / "out"))
    name = "llm.up.weight"
    assert not np.array_equal(got[name], np.float32(0.3) * a[name] + np.float32(0.7) * b[name])


def test_several_inputs_are_added_in_the_order_given(tmp_path: Path) -> None:
    folders = [str(write(tmp_path / str(i), {"w": floats(i, 1000, scale=10.0**-i)})) for i in range(3)]
    merge(folders, tmp_path / "out", weights=[1, 2, 1])
    x = [load_file(Path(f) / "model.safetensors")["w"].astype(np.float64) for f in folders]
    expected = ((0.25 * x[0] + 0.5 * x[1]) + 0.25 * x[2]).astype(np.float32)
    np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")["w"], expected)


def test_bf16_in_bf16_out(tmp_path: Path) -> None:
    a, b = floats(1, 4, 100), floats(2, 4, 100)
    write_bf16(tmp_path / "a", {"w": a}), write_bf16(tmp_path / "b", {"w": b})
    merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", beta=0.3)
    cut = [(bf16_bits(x).astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
    total = (
        np.float32(0.3) * cut[0] + np.float32(0.7) * cut[1]
    )  # numpy: two rounded products, one rounded sum
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(total).bfloat16().view(torch.uint16).numpy()
    assert read_bytes(tmp_path / "out/model.safetensors")["w"] == expected.tobytes()
    assert open_weights(str(tmp_path / "out")).info("w") == ("BF16", (4, 100))


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_beta_0_and_1_give_the_inputs_byte_for_byte(tmp_path: Path, kind: str) -> None:
    """Every bit pattern of 16 bits: NaN payloads, both zeros, subnormals, infinities."""
    patterns = np.arange(2**16, dtype=np.uint32) << 16
    both = {"a": patterns.view(np.float32), "b": patterns[::-1].copy().view(np.float32)}
    for name, values in both.items():
        if kind == "BF16":
            write_bf16(tmp_path / name, {"w": values})
        elif kind == "F16":
            write(
                tmp_path / name,
                {"w": (patterns >> 16).astype(np.uint16).view(np.float16)[:: 1 if name == "a" else -1]},
            )
        else:
            write(tmp_path / name, {"w": values})
    inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
    for beta, whole in ((1.0, "a"), (0.0, "b")):
        merge(inputs, tmp_path / f"out{beta}", beta=beta)
        made, parent = (read_bytes(tmp_path / x / "model.safetensors") for x in (f"out{beta}", whole))
        assert made == parent


def test_inputs_of_weight_zero_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": np.array([np.inf, np.nan, 1], np.float32)})
    write(tmp_path / "b", {"w": np.array([1, 2, 3], np.float32)})
    write(tmp_path / "c", {"w": np.array([3, 2, 1], np.float32)})
    merge([str(tmp_path / x) for x in "abc"], tmp_path / "out", weights=[0, 1, 1])
    np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")["w"], [2, 2, 2])


def test_bytes_depend_neither_on_chunks_nor_on_threads(pair: tuple[str, str], tmp_path: Path) -> None:
    found = set()
    for i, (chunk, threads) in enumerate([(1, 1), (7, 4), (1 << 18, 1), (1 << 30, 8)]):
        merge(pair, tmp_path / f"o{i}", beta=0.37, chunk=chunk, threads=threads)
        found.add(sha(tmp_path / f"o{i}"))
    assert len(found) == 1


def test_file_is_what_the_reference_library_writes(pair: tuple[str, str], tmp_path: Path) -> None:
    merge(pair, tmp_path / "out", beta=0.5)
    save_file(load_file(tmp_path / "out/model.safetensors"), tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_dtype(pair: tuple[str, str], tmp_path: Path) -> None:
    write_bf16(
        tmp_path / "c", {n: a for n, a in load_file(pair[1] + "/model.safetensors").items() if n != "count"}
    )
    write(
        tmp_path / "d", {n: a for n, a in load_file(pair[0] + "/model.safetensors").items() if n != "count"}
    )
    mixed = [str(tmp_path / "d"), str(tmp_path / "c")]
    with pytest.raises(UserError, match=r"(?s)dtype F32 in A .*, BF16 in B .*--dtype"):
        merge(mixed, tmp_path / "out", beta=0.5)
    merge(mixed, tmp_path / "out", beta=0.5, dtype="fp16")
    got = load_file(tmp_path / "out/model.safetensors")["llm.up.weight"]
    d, c = (open_weights(m).array("llm.up.weight").astype(np.float64) for m in mixed)
    np.testing.assert_array_equal(got, (0.5 * d + 0.5 * c).astype(np.float16))
    merge(mixed, tmp_path / "one", beta=1.0, dtype="bf16")  # converted, not copied
    assert open_weights(str(tmp_path / "one")).info("llm.up.weight")[0] == "BF16"


def test_sharded_hf_folder_gives_a_folder_of_its_own(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": floats(i, 6, 4) for i in range(4)}
    write(tmp_path / "b", tensors)
    parts = {
        f"model-0000{k + 1}-of-00002.safetensors": [f"layer.{i}.weight" for i in (k, k + 2)] for k in (0, 1)
    }
    for file, names in parts.items():
        write(tmp_path / "a", {n: tensors[n] * 3 for n in names}, file)
    index = {"metadata": {}, "weight_map": {n: file for file, names in parts.items() for n in names}}
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps(index))
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    ):
        (tmp_path / "a" / name).write_text(json.dumps(f"{name} of a"))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", beta=0.5)
    got = load_file(tmp_path / "out/model.safetensors")
    for name, value in tensors.items():
        np.testing.assert_array_equal(
            got[name], (1.5 * value.astype(np.float64) + 0.5 * value).astype(np.float32)
        )
    copied = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == copied | {
        "model.safetensors",
        "merge.json",
        "README.md",
    }
    assert (tmp_path / "out/config.json").read_text() == '"config.json of a"'


@pytest.mark.parametrize(
    ("name", "why"), [("../x.safetensors", "not a file of this folder"), ("y.safetensors", "does not exist")]
)
def test_index_with_a_foreign_or_missing_file_is_refused(tmp_path: Path, name: str, why: str) -> None:
    folder = write(tmp_path / "a", {"w": floats(0, 2)}, "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match=why):
        open_weights(str(folder))


def test_a_merge_of_transformers_models_loads_in_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(transformers.LlamaForCausalLM(config))
        models[-1].save_pretrained(tmp_path / str(seed), max_shard_size="8KB")
    assert (tmp_path / "0/model.safetensors.index.json").exists()
    merge([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "out", beta=0.25)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        for mine, a, b in zip(loaded.parameters(), *(m.parameters() for m in models), strict=True):
            assert torch.equal(mine, (0.25 * a.double() + 0.75 * b.double()).float())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_rerun_is_skipped_and_another_merge_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = merge(pair, out, beta=0.3)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert merge(pair, out, weights=[3, 7]) == first  # the same plan, written differently
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="another merge"):
        merge(pair, out, beta=0.31)
    write(Path(pair[0]), {n: a + 1 for n, a in load_file(Path(pair[0]) / "model.safetensors").items()})
    with pytest.raises(UserError, match="another merge"):
        merge(pair, out, beta=0.3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="not the output of a merge"):
        merge(pair, tmp_path / "mine", beta=0.3)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_record_names_inputs_and_digests(pair: tuple[str, str], tmp_path: Path) -> None:
    xxhash = pytest.importorskip("xxhash")
    record = merge(pair, tmp_path / "out", beta=0.3)
    assert json.loads((tmp_path / "out/merge.json").read_text()) == record
    assert [(i["address"], i["weight"]) for i in record["inputs"]] == [(pair[0], 0.3), (pair[1], 0.7)]
    files = [Path(path) / "model.safetensors" for path in pair]
    for entry, file in zip(record["inputs"], files, strict=True):
        raw = file.read_bytes()
        assert entry["files"] == {
            "model.safetensors": f"{len(raw)}-{xxhash.xxh64(raw).hexdigest()}"
        }  # small enough for one span
    mixed = [{n: nested(d) for n, d in read_bytes(file).items()} for file in files]
    del mixed[1]["count"]  # copied from the first
    for entry, read in zip(record["inputs"], mixed, strict=True):
        listed = "".join(f"{name}\0{digest}\n" for name, digest in sorted(read.items()))
        assert entry["read"] == {"tensors": len(read), "digest": xxhash.xxh64(listed.encode()).hexdigest()}
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    made = {name: nested(data) for name, data in read_bytes(tmp_path / "out/model.safetensors").items()}
    assert record["tensors"] == made
    head = 8 + int.from_bytes(raw[:8], "little")
    whole = xxhash.xxh64(raw[:head] + b"".join(bytes.fromhex(made[name]) for name in made)).hexdigest()
    assert record["output"]["model.safetensors"] == {"size": len(raw), "digest": whole}


def nested(data: bytes) -> str:
    """Digest of a tensor of less than 2**21 elements."""
    import xxhash

    return xxhash.xxh64(xxhash.xxh64(data).digest()).hexdigest()


def test_failures_leave_nothing_under_the_final_name(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sub/out"
    real, calls = os.pwrite, []

    def full(file: int, data: Any, at: int) -> int:
        calls.append(at)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return real(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="out: cannot be written: No space left"):
            merge(pair, out, beta=0.5)
    assert not out.exists()
    shutil.rmtree(partial_of(out))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="1 are free"):
            merge(pair, out, beta=0.5)
    assert list((tmp_path / "sub").iterdir()) == []
    merge(pair, out, beta=0.5)


def test_leftovers_of_a_killed_merge_are_cleared(pair: tuple[str, str], tmp_path: Path) -> None:
    left = partial_of(tmp_path / "out")
    (left / "folder").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "stray").write_bytes(b"x")
    merge(pair, tmp_path / "out", beta=0.5)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "merge.json",
        "model.safetensors",
    ]
    assert not left.exists()


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_folder_of_the_user_s_beside_the_output_stays(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    mine = tmp_path / "out.tmp"
    (mine / "folder").mkdir(parents=True)
    (mine / "notes.txt").write_text("keep me")
    if ends == "well":
        merge(pair, tmp_path / "out", beta=0.5)
    else:
        monkeypatch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(UserError, match="cannot be written: No space left"):
            merge(pair, tmp_path / "out", beta=0.5)
    assert (mine / "notes.txt").read_text() == "keep me"
    assert (mine / "folder").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a", "b", "out.tmp"] + ["out"] * (ends == "well")
    )


@pytest.mark.parametrize("durable", [True, False])
def test_every_file_is_synced_before_the_folder_is_renamed(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """A power cut after the rename must not leave an empty record or config; with `durable`, nor incomplete weights.

    Without `durable`, the digests of the record reveal incomplete weights.
    """
    (Path(pair[0]) / "config.json").write_text("{}")
    (Path(pair[0]) / "tokenizer.json").write_text("{}")
    synced: set[int] = set()
    real_sync, real_rename = os.fsync, os.rename
    missing: list[str] = []

    def sync(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        real_sync(file)

    def rename(source: Any, target: Any) -> None:
        missing.extend(p.name for p in Path(source).iterdir() if p.stat().st_ino not in synced)
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    merge(pair, tmp_path / "out", beta=0.5, durable=durable)
    assert missing == [] if durable else ["model.safetensors"]
    names = ["README.md", "config.json", "merge.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


def _hold(pair: tuple[str, str], out: Path, started: Any, go: Any) -> None:
    def slow(count: int) -> None:
        started.set()
        go.wait(30)

    merge(pair, out, beta=0.5, progress=slow)


def test_two_merges_into_one_folder(pair: tuple[str, str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, go = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(pair, tmp_path / "out", started, go))
    first.start()
    try:
        assert started.wait(60)
        with pytest.raises(UserError, match="another process is writing it"):
            merge(pair, tmp_path / "out", beta=0.5)
    finally:
        go.set()
        first.join(60)
    assert first.exitcode == 0
    assert merge(pair, tmp_path / "out", beta=0.5)["mixed"] == 3


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Allocations (without mapped pages) for a model and for one sixteen times larger."""
    peaks = []
    for size in (1 << 20, 1 << 24):
        folders = [
            str(write(tmp_path / f"{size}{x}", {"w": np.full(size, i, np.float32)}))
            for i, x in enumerate("ab")
        ]
        tracemalloc.start()
        merge(folders, tmp_path / f"out{size}", beta=0.5, threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        for folder in (*folders, tmp_path / f"out{size}"):
            shutil.rmtree(folder)
    assert peaks[1] < 1.02 * peaks[0]
    assert peaks[1] < 20e6


def test_no_torch_is_imported(pair: tuple[str, str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pretrain.merge import merge\n"
        f"merge({list(pair)!r}, {str(tmp_path / 'out')!r}, beta=0.5)\n"
        "assert not {'deepspeed', 'transformers', 'safetensors', 'pydantic'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "out/merge.json").exists()


def test_plan_writes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    lines = "\n".join(describe.lines(plan(pair, beta=0.25)))
    assert "theta = 0.25 x A + 0.75 x B" in lines
    assert "llm.up.weight  F32 [17, 5]  0.25 A + 0.75 B" in lines
    assert "count  I64 [1]  copy of A (integer)" in lines
    assert sorted(tmp_path.rglob("*")) == before
