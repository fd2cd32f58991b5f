"""`verify` passes an intact output, and finds every kind of damage to an output or its inputs."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.merge.execute import plan
from pretrain.merge.output.record import is_sealed, jobs_of, jobs_plain, sealed
from pretrain.merge.planning.request import Rule
from pretrain.merge.verify.check_output import verify
from pretrain.merge.verify.check_weights import Report
from pretrain.merge.verify.recompute import chunks
from pretrain.weights.byte_file import LocalFile
from pretrain.weights.digests import fingerprint
from tests.support.merge_inputs import floats, write, write_bf16

CONFIG = {"model_type": "llama", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2}


def tensors(seed: int) -> dict[str, np.ndarray]:
    layers = {f"model.layers.{i}.mlp.up.weight": floats(10 * seed + i, 16, 8) for i in range(2)}
    return {
        "model.embed_tokens.weight": floats(seed, 30, 8),
        **layers,
        "lm_head.weight": floats(seed + 50, 30, 8),
        "steps": np.arange(4),
    }


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, tensors(seed))
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.fixture
def out(pair: list[str], tmp_path: Path) -> Path:
    """A merge of the pair, in three shards."""
    merge(pair, tmp_path / "out", beta=0.3, max_shard_size=1500)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3
    return tmp_path / "out"


def wrong(report: Report) -> str:
    return "\n".join(f.text for f in report.findings if f.level == "wrong")


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def edit(out: Path, **changes: Any) -> None:
    content = json.loads((out / "merge.json").read_text())
    (out / "merge.json").write_text(json.dumps({**content, **changes}))


def test_an_intact_output_passes(out: Path) -> None:
    report = verify(out, count=20)
    assert not report.wrong, wrong(report)
    assert report.recomputed == 20
    assert [state for _, state in report.inputs] == ["unchanged", "unchanged"]
    assert report.not_finite == {}
    texts = [finding.text for finding in report.findings]
    assert "5 tensors in 3 files: unchanged" in texts
    assert any(text.startswith("config.json matches") and "num_hidden_layers" in text for text in texts)
    full = verify(out, full=True)
    assert not full.wrong
    assert full.recomputed == 5
    json.dumps(full.plain(), allow_nan=False)


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "slerp", "t": 0.3},
        {"method": "task_arithmetic", "base": "base", "weights": [0.5, 0.7], "scale": 0.9},
        {"method": "ties", "base": "base", "density": 0.4},
        {"method": "dare_ties", "base": "base", "density": 0.5, "seed": 3},
        {"beta": 1.0},
        {"beta": 0.25, "only": "layers", "copy_rest": "B", "dtype": "bf16"},
    ],
    ids=lambda asked: str(asked.get("method", asked.get("beta"))),
)
def test_every_method_is_recomputed(pair: list[str], tmp_path: Path, asked: dict[str, Any]) -> None:
    write(tmp_path / "base", tensors(7))
    if "base" in asked:
        asked = asked | {"base": str(tmp_path / "base")}
    merge(pair, tmp_path / "m", **asked)
    report = verify(tmp_path / "m", full=True)
    assert not report.wrong, wrong(report)
    assert report.recomputed == 5
    whole = tmp_path / "m/model.safetensors"
    header = struct.unpack("<Q", whole.read_bytes()[:8])[0]
    flip(whole, 8 + header)
    assert verify(tmp_path / "m", full=True).wrong


def test_a_bit_anywhere_in_any_file_is_found(out: Path) -> None:
    for path in sorted(out.glob("*.safetensors")):
        raw = path.read_bytes()
        for at in (3, 20, len(raw) // 2, len(raw) - 1):
            flip(path, at)
            found = wrong(verify(out, count=0))
            assert path.name in found, at
            path.write_bytes(raw)
    assert not verify(out, count=0).wrong


def test_the_tensor_with_the_flipped_bit_is_named(out: Path) -> None:
    path = next(p for p in sorted(out.glob("*.safetensors")) if b"layers.0" in p.read_bytes())
    name = "model.layers.0.mlp.up.weight"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    flip(path, 8 + size + json.loads(raw[8 : 8 + size])[name]["data_offsets"][0])
    assert wrong(verify(out)) == f"{path.name}: {name}: changed since it was written"


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_shard_is_found(out: Path, left: int) -> None:
    path = sorted(out.glob("*.safetensors"))[1]
    os.truncate(path, left if left >= 0 else path.stat().st_size - 1)
    found = wrong(verify(out))
    assert f"{path.name}: " in found
    assert "the merge wrote" in found


def test_swapped_and_missing_shards_are_found(out: Path) -> None:
    one, two, three = sorted(out.glob("*.safetensors"))
    one.rename(out / "t")
    two.rename(one)
    (out / "t").rename(two)
    found = wrong(verify(out))
    assert one.name in found
    assert two.name in found
    assert "model.safetensors.index.json" in found
    three.unlink()
    assert f"{three.name}: missing" in wrong(verify(out))


def test_a_wrong_index_is_found(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    placed = content["weight_map"]
    placed[min(placed, key=lambda name: placed[name])] = max(placed.values())
    path.write_text(json.dumps(content))
    assert "index.json" in wrong(verify(out))
    path.unlink()
    assert "index.json" in wrong(verify(out))


def test_a_changed_input_is_found(out: Path, pair: list[str]) -> None:
    write(Path(pair[1]), tensors(9))
    report = verify(out)
    assert [state for _, state in report.inputs] == ["unchanged", "changed"]
    assert "B (" in wrong(report)
    assert "changed: model.safetensors" in wrong(report)


def test_a_bit_in_a_large_input_is_found_by_reading_all_of_it(tmp_path: Path) -> None:
    a, b = (write(tmp_path / x, {"w": floats(i, 3 << 20)}) for i, x in enumerate("ab"))  # 12 MiB each
    merge([str(a), str(b)], tmp_path / "m", beta=0.5)
    path = a / "model.safetensors"
    before, stamp = fingerprint(LocalFile(path)), path.stat()
    at = next(at for at in range(6 << 20, 7 << 20, 4096) if _unseen(path, at, before))
    flip(path, at)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [state for _, state in verify(tmp_path / "m", count=0).inputs] == ["unchanged", "unchanged"]
    report = verify(tmp_path / "m", full=True)
    assert [state for _, state in report.inputs] == ["changed", "unchanged"]
    assert "some bytes that the merge read" in wrong(report)


def _unseen(path: Path, at: int, before: str) -> bool:
    """True if a changed byte at `at` does not change the fingerprint."""
    flip(path, at)
    same = fingerprint(LocalFile(path)) == before
    flip(path, at)
    return same


def test_a_missing_input_is_not_wrong(out: Path, pair: list[str]) -> None:
    shutil.rmtree(pair[0])
    report = verify(out)
    assert not report.wrong
    assert [state for _, state in report.inputs] == ["gone", "unchanged"]
    assert report.recomputed == 0 or all(
        j.copy for _, j in jobs_of(json.loads((out / "merge.json").read_text()))
    )
    assert any("could be recomputed" in finding.text for finding in report.findings)


@pytest.mark.parametrize(
    "changes",
    [
        {"theta": "A"},
        {"asked": {"inputs": ["c", "d"]}},
        {"seal": "0" * 16},
        {"inputs": []},
        {"jobs": []},
        {"jobs": "?"},
        {"output": {}},
        {"tensors": {}},
        {"plan": "0" * 16},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_edited_record_is_found(out: Path, changes: dict[str, Any]) -> None:
    edit(out, **changes)
    assert "merge.json" in wrong(verify(out))


OTHER: list[Any] = [None, -1, 1 << 70, 0.5, "", "../x", "é" * 300, [], {}, [[]], {"x": 1}, True]


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy with one random value replaced or removed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    return draw.choice([other for other in OTHER if other != value])


@pytest.mark.parametrize("resealed", [False, True])
def test_no_content_of_a_record_crashes(out: Path, resealed: bool) -> None:
    whole = json.loads((out / "merge.json").read_text())
    found = 0
    for seed in range(150):
        record = mutated(whole, random.Random(seed))
        record = sealed(record) if resealed and isinstance(record, dict) else record
        (out / "merge.json").write_text(json.dumps(record))
        try:
            report = verify(out, count=4)
        except UserError:
            found += 1
            continue
        found += report.wrong
        assert report.wrong or resealed, record
        json.dumps(report.plain())
    assert found > (20 if resealed else 149)


def test_an_edited_weight_with_a_valid_seal_is_found_by_recomputing(out: Path) -> None:
    content = json.loads((out / "merge.json").read_text())
    for job in content["jobs"]:
        for term in job["terms"]:
            term["weight"] = {0.3: 0.7, 0.7: 0.3}.get(term["weight"], term["weight"])
    (out / "merge.json").write_text(json.dumps(sealed(content)))
    assert "recomputed bytes differ" in wrong(verify(out))


@pytest.mark.parametrize("limit", [1, 10**6])
def test_tensors_without_elements_are_not_wrong(tmp_path: Path, limit: int) -> None:
    """Empty tensors share their offset with others; the fp16 one is first in the inputs, and last in a file of fp64."""
    rows: dict[str, np.ndarray] = {"a": floats(1, 2, 2).astype(np.float16)}
    rows |= {name: np.zeros(shape, np.float16) for name, shape in (("b", (3, 0)), ("c", (0,)))}
    for name in "xy":
        write(tmp_path / name, rows | {"steps": np.arange(4)})
    inputs = [str(tmp_path / name) for name in "xy"]
    merge(inputs, tmp_path / "out", beta=0.3, dtype="fp64", rules=[Rule("a", copy_from="A")],
          max_shard_size=limit)  # fmt: skip
    report = verify(tmp_path / "out", full=True)
    assert not report.wrong, wrong(report)


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_an_edited_config_is_found(out: Path, change: str) -> None:
    path = out / "config.json"
    assert path.name in json.loads((out / "merge.json").read_text())["beside"]
    if change == "edit":
        path.write_text(path.read_text().replace("{", "{ ", 1))
    else:
        path.unlink()
    assert wrong(verify(out)) == "config.json: missing, or changed since it was written"


def test_nan_and_infinities_are_counted(tmp_path: Path) -> None:
    for dtype, make in (("f32", write), ("bf16", write_bf16), ("f16", write)):
        values = floats(1, 200)
        values[3:5], values[7], values[9] = np.nan, np.inf, -np.inf
        stored = values.astype(np.float16) if dtype == "f16" else values
        folders = [str(make(tmp_path / f"{dtype}{x}", {"w": stored, "v": stored[20:]})) for x in "ab"]
        merge(folders, tmp_path / f"{dtype}out", beta=0.5)
        report = verify(tmp_path / f"{dtype}out")
        assert report.not_finite == {"w": (2, 2)}
        assert wrong(report) == "w: 2 NaN, 2 infinite"
        merge(folders, tmp_path / f"{dtype}copy", beta=1.0)
        copied = verify(tmp_path / f"{dtype}copy")
        assert copied.not_finite == {"w": (2, 2)}
        assert not copied.wrong


def test_a_config_of_another_size_is_found(out: Path) -> None:
    (out / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 31, "num_hidden_layers": 3}))
    found = wrong(verify(out))
    assert "vocab_size 31, but model.embed_tokens.weight is [30, 8]" in found
    assert "3 layers, but the weights have 2" in found


def test_other_weight_files_are_noted(out: Path) -> None:
    save_file({"x": floats(1, 2)}, out / "extra.safetensors")
    report = verify(out)
    assert not report.wrong
    assert any("extra.safetensors: not part of this merge" in finding.text for finding in report.findings)


def test_a_folder_that_is_not_a_merge_is_refused(tmp_path: Path, pair: list[str]) -> None:
    for folder in (tmp_path / "nothing", Path(pair[0])):
        with pytest.raises(UserError, match=r"merge\.json"):
            verify(folder)
    (tmp_path / "a/merge.json").write_text("[1")
    with pytest.raises(UserError, match=r"merge\.json: not valid JSON"):
        verify(tmp_path / "a")


def test_jobs_come_back_from_json_as_they_were(pair: list[str]) -> None:
    for asked in (
        {"beta": 0.1},
        {"method": "slerp", "t": 1 / 3},
        {"beta": 0.3, "only": "layers", "copy_rest": "A"},
    ):
        made = plan(pair, **asked)
        back = jobs_of(json.loads(json.dumps({"jobs": jobs_plain(made)})))
        assert [job for _, job in back] == list(made.jobs)
        assert {file for file, _ in back} == {made.files[0].name}


def test_a_seal_is_of_the_content_and_not_of_its_layout() -> None:
    record = sealed({"b": (1, 2.5), "a": {"x": None, "é": 0.1}})
    assert is_sealed(json.loads(json.dumps(record, indent=3)))
    assert is_sealed(dict(reversed(record.items())))
    assert not is_sealed({**record, "a": {"x": None, "é": 0.2}})


def test_chunks_are_drawn_by_size_and_seed(pair: list[str]) -> None:
    jobs = plan(pair, beta=0.5).jobs
    one, again, other = (list(chunks(jobs, 200, seed)) for seed in (1, 1, 2))
    assert one == again != other
    sizes = [int(np.prod(job.shape)) for job in jobs]
    assert all(0 <= start < stop <= sizes[number] for number, start, stop in one)
    assert {number for number, _, _ in one} >= {number for number, size in enumerate(sizes) if size >= 100}
    everything = list(chunks(jobs, None, 0))
    assert sum(stop - start for _, start, stop in everything) == sum(sizes)
