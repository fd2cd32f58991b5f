"""Malformed and hostile weights: each gives one clear error that names the file.

No code of a file runs, memory stays bounded and no input changes. Every case is opened in its own process with limits
of memory and time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import deserialize, save

from tests.fault.bad_weights import MUTATIONS, Call, Stored, archive, torch_pickle

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
SEEDS = 170
TENSORS: dict[str, np.ndarray] = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(6, 12, dtype=np.float32).reshape(3, 2),
    "c": np.arange(5, dtype=np.float16),
    "d": np.array([1, 2**40]),
    "empty": np.zeros((0, 4), np.float32),
}
GOOD = save(TENSORS, metadata={"format": "pt"})


def read_all(tmp_path: Path, addresses: list[str]) -> dict[str, dict[str, Any]]:
    """Results of tests.fault.merge_reader for each address; it must finish within its memory limit."""
    wanted, results = tmp_path / "addresses", tmp_path / "results"
    wanted.write_text("\n".join(addresses), encoding="utf-8")
    command = [sys.executable, "-m", "tests.fault.merge_reader", str(wanted), str(results)]
    done = subprocess.run(command, cwd=ROOT, timeout=200, capture_output=True, text=True)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert done.returncode == 0, f"after {lines[-1:]}: {done.stderr[-2000:]}"
    assert len(lines) == len(addresses) + 1
    assert lines[-1]["peak_kib"] < 600_000
    return {line["address"]: line for line in lines[:-1]}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_clear(result: dict[str, Any], name: str) -> bool:
    """True if a result is one error line that names the file."""
    message = result["message"]
    return (
        result["error"] == "UserError" and message.isprintable() and name in message and len(message) < 1500
    )


def test_headers_spoiled_in_a_thousand_ways(tmp_path: Path) -> None:
    """Refused, or read as the reference library reads it; files that the library refuses are refused."""
    size = struct.unpack("<Q", GOOD[:8])[0]
    header, data = json.loads(GOOD[8 : 8 + size]), GOOD[8 + size :]
    folder = tmp_path / "in"
    folder.mkdir()
    seen: dict[bytes, Path] = {}
    for mutation in MUTATIONS:
        for seed in range(SEEDS):
            raw = mutation(np.random.default_rng(seed), copy.deepcopy(header), data)
            if raw not in seen:
                seen[raw] = folder / f"{mutation.__name__}_{seed}.safetensors"
                seen[raw].write_bytes(raw)
    before = digests(folder)
    results = read_all(tmp_path, [str(path) for path in seen.values()])
    assert digests(folder) == before
    refused = 0
    for raw, path in seen.items():
        result = results[str(path)]
        if result["error"] is not None:
            assert is_clear(result, path.name), (path.name, result)
            refused += 1
            continue
        try:
            reference = dict(deserialize(raw))
        except SafetensorError as error:
            pytest.fail(f"{path.name} was read, the reference library refuses it: {error}")
        got = {n: [dtype, shape, values] for n, (dtype, shape, values) in result["tensors"].items()}
        assert got == {n: [t["dtype"], t["shape"], bytes(t["data"]).hex()] for n, t in reference.items()}
    assert len(seen) > 1000
    assert refused > 900


def test_a_header_that_claims_or_takes_a_hundred_megabytes(tmp_path: Path) -> None:
    claims = tmp_path / "in/claims.safetensors"
    claims.parent.mkdir()
    claims.write_bytes(struct.pack("<Q", 100_000_000) + b"{}")
    sparse = tmp_path / "in/sparse.safetensors"
    with open(sparse, "wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b'{"a": ')
        file.truncate(100_000_008)
    beyond = tmp_path / "in/beyond.safetensors"
    with open(beyond, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b"{}")
        file.truncate(300_000_000)
    results = read_all(tmp_path, [str(p) for p in (claims, sparse, beyond)])
    for path in (claims, sparse, beyond):
        assert is_clear(results[str(path)], path.name), results[str(path)]


def index(folder: Path, placed: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def shards(folder: Path) -> None:
    """Two valid shards and their index."""
    names = list(TENSORS)
    for number, part in enumerate((names[:2], names[2:]), 1):
        (folder / f"m-{number}.safetensors").write_bytes(save({n: TENSORS[n] for n in part}))
    index(folder, {n: "m-1.safetensors" if n in names[:2] else "m-2.safetensors" for n in names})


def _raw_index(content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shards(folder)
        (folder / "model.safetensors.index.json").write_bytes(content)

    return make


def _index_of(placed: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shards(folder)
        index(folder, placed)

    return make


def truncated_shard(folder: Path) -> None:
    shards(folder)
    path = folder / "m-2.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def tensor_in_two_shards(folder: Path) -> None:
    shards(folder)
    (folder / "m-2.safetensors").write_bytes(save(TENSORS))


def tensor_that_no_shard_has(folder: Path) -> None:
    shards(folder)
    index(folder, {**dict.fromkeys(TENSORS, "m-1.safetensors"), "d": "m-2.safetensors"})


def shard_linked_to_nothing(folder: Path) -> None:
    shards(folder)
    (folder / "m-1.safetensors").unlink()
    (folder / "m-1.safetensors").symlink_to("../.git/annex/objects/x/y")


def tokenizer_beside_a_link_named_as_weights(folder: Path) -> None:
    """A link that only looks like a weight file gives no access to the files beside its target."""
    tokenizer_linked_from_outside(folder)
    (folder / "other.pt").symlink_to(folder.parent / "secret.json")


def shard_is_a_folder(folder: Path) -> None:
    shards(folder)
    (folder / "m-1.safetensors").unlink()
    (folder / "m-1.safetensors").mkdir()


def shard_is_a_pipe(folder: Path) -> None:
    shards(folder)
    (folder / "m-1.safetensors").unlink()
    os.mkfifo(folder / "m-1.safetensors")


def tokenizer_linked_from_outside(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    (folder / "tokenizer.json").symlink_to(secret)


def config_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)
    (folder / "config.json").write_bytes(b"\xff{")


def config_too_deep(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)
    (folder / "config.json").write_text("[" * 100_000)


def latest_leads_out(folder: Path) -> None:
    (folder / "latest").write_text("../elsewhere")


def several_files(folder: Path) -> None:
    for name in ("x", "y"):
        (folder / f"{name}.safetensors").write_bytes(GOOD)


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda folder: None, "no safetensors file"),
    "several": (several_files, "no index"),
    "absent": (_index_of({"a": "m-9.safetensors"}), "which does not exist"),
    "parent": (_index_of({"a": "../outside.safetensors"}), "not a file of this folder"),
    "absolute": (_index_of({"a": "/etc/passwd"}), "not a file of this folder"),
    "backslash": (_index_of({"a": "..\\x.safetensors"}), "not a file of this folder"),
    "number": (_index_of({"a": 3}), "not a file of this folder"),
    "dots": (_index_of({"a": ".."}), "not a file of this folder"),
    "newline": (_index_of({"a": "m\n\x1b[31m.safetensors"}), "which does not exist"),
    "other": (_index_of({"a": "model.safetensors.index.json"}), "not a weight file"),
    "map_is_list": (_index_of(["m-1.safetensors"]), "no weight_map"),
    "map_is_empty": (_index_of({}), "no weight_map"),
    "index_is_list": (_raw_index(b"[]"), "no weight_map"),
    "index_is_cut": (_raw_index(b'{"weight_map": {"a": '), "not valid JSON"),
    "index_not_utf8": (_raw_index(b"\xff\xfe{}"), "not valid JSON"),
    "index_too_deep": (_raw_index(b"[" * 200_000), "not valid JSON"),
    "truncated": (truncated_shard, "m-2.safetensors: not a safetensors file"),
    "in_two": (tensor_in_two_shards, "is stored in two files"),
    "in_none": (tensor_that_no_shard_has, "although the index of its folder lists it"),
    "tokenizer_beside_a_weight_link": (tokenizer_beside_a_link_named_as_weights, ", outside /"),
    "dangling": (shard_linked_to_nothing, "a broken link to"),
    "folder": (shard_is_a_folder, "which does not exist"),
    "pipe": (shard_is_a_pipe, "is not a regular file"),
    "tokenizer_link": (tokenizer_linked_from_outside, ", outside /"),
    "config": (config_is_no_json, "config.json: not valid JSON"),
    "deep_config": (config_too_deep, "config.json: not valid JSON"),
    "latest": (latest_leads_out, "not a folder beside it"),
}


def test_folders_that_lie_about_what_is_in_them(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name, (make, _) in FOLDERS.items():
        (root / name / "m").mkdir(parents=True)
        make(root / name / "m")
    before = digests(root)
    results = read_all(tmp_path, [str(root / name / "m") for name in FOLDERS])
    assert digests(root) == before
    for name, (_, why) in FOLDERS.items():
        result = results[str(root / name / "m")]
        assert is_clear(result, f"/{name}/m"), (name, result)
        assert why in result["message"], (name, result)


def test_good_folders_beside_them_are_read(tmp_path: Path) -> None:
    """Links of the hub's cache lead out of the snapshot and are read."""
    blobs = tmp_path / "models--org--name/blobs"
    snapshot = tmp_path / "models--org--name/snapshots/0123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "ffff").write_bytes(GOOD)
    (snapshot / "model.safetensors").symlink_to("../../blobs/ffff")
    plain = tmp_path / "plain"
    plain.mkdir()
    shards(plain)
    results = read_all(tmp_path, [str(snapshot), str(plain)])
    for result in results.values():
        assert {n: v for n, (_, _, v) in result["tensors"].items()} == {
            n: a.tobytes().hex() for n, a in TENSORS.items()
        }


WEIGHTS = np.arange(6, dtype=np.float32).tobytes()


def tensor(
    shape: Any = (2, 3),
    stride: Any = (3, 1),
    offset: Any = 0,
    key: Any = "0",
    count: Any = 6,
    kind: Any = None,
) -> Call:
    stored = Stored(key, count, torch.FloatStorage if kind is None else kind)
    return Call(torch._utils._rebuild_tensor_v2, stored, offset, shape, stride, False, OrderedDict())


def runs(canary: Path) -> dict[str, Any]:
    """Pickled calls that would create a file if they ran."""
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": Call(os.system, f"touch {canary}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(canary), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "import": Call(__import__, "os"),
        "getattr": Call(getattr, "x", "upper"),
        "torch_load": Call(torch.load, str(canary)),
        "storage_bytes": Call(torch.storage._load_from_bytes, pickle.dumps(1)),
        "loads": Call(pickle.loads, pickle.dumps(Call(exec, code))),
        "partial": Call(__import__("functools").partial, exec, code),
    }


def pickles(canary: Path) -> dict[str, bytes]:
    """Name -> data.pkl: code, false sizes, and excessive memory or time."""
    made = {}
    for name, call in runs(canary).items():
        for protocol in (2, 4):
            made[f"{name}_{protocol}"] = torch_pickle({"w": tensor(), "evil": call}, protocol)
    for number, (shape, stride, offset, count) in enumerate([
        ((5,), (1,), 2, 6), ((7,), (1,), 0, 7), ((2**40,), (1,), 0, 2**40), ((2**40,), (0,), 0, 6),
        ((2**62, 4), (0, 0), 0, 6), ((2, 3), (-3, 1), 0, 6), ((2, 3), (2**62, 1), 0, 6), ((-1,), (1,), 0, 6),
        ((2, 3), (1,), 0, 6), ((2.0, 3), (3, 1), 0, 6), ((1,) * 100, (1,) * 100, 0, 6), ((True, 3), (3, 1), 0, 6),
        ((10**400,), (1,), 0, 6), ("ab", (1, 1), 0, 6), ((2, 3), (3, 1), -1, 6), ((2, 3), (3, 1), 0, -6),
        ((2, 3), (3, 1), 2**70, 6), ((2, 3), (3, 1), 0, 2**70), (None, None, 0, 6), ([[2], 3], [3, 1], 0, 6),
    ]):  # fmt: skip
        made[f"tensor_{number}"] = torch_pickle({"w": tensor(shape, stride, offset, count=count)})
    made["absent_storage"] = torch_pickle({"w": tensor(key="7")})
    made["storage_of_a_list"] = torch_pickle({"w": tensor(key=["0"])})
    made["dtype_is_no_storage"] = torch_pickle({"w": tensor(kind="F32")})
    made["no_tensors"] = torch_pickle({"w": 3})
    made["no_dict"] = torch_pickle([tensor()])
    made["name_is_no_text"] = torch_pickle({3: tensor()})
    made["name_with_newline"] = torch_pickle({"a\n\x1b[31m": tensor()})
    made["empty"] = b""
    made["cut"] = torch_pickle({"w": tensor()})[:-9]
    made["garbage"] = bytes(range(256)) * 4
    made["memo"] = b"\x80\x02Nr\xff\xff\xff\xff."  # LONG_BINPUT: the last place of a memo of 4 billion
    made["bytearray"] = b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x."
    made["bytes"] = b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x."
    made["text"] = b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x."
    made["long"] = b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x."
    made["frame"] = b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N."
    # Half a million levels of recursion in C overflow a stack of 8 MB, and stay below the limit of operations.
    made["deep_key"] = b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."
    made["deep_list"] = b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."
    made["many_lists"] = b"\x80\x02(" + b"]" * 5_000_000 + b"l."  # above that limit
    made["doubling"] = b"\x80\x02cbuiltins\nset\n(" + b"K\x01" * 100_000 + b"lq\x01" + b"0" + (
        b"cbuiltins\nset\nh\x01\x85R" * 20_000
    ) + b"."  # fmt: skip
    made["latin"] = b"\x80\x02X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\x01" + (
        b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 20_000
    ) + b"."  # fmt: skip
    made["hidden_methods"] = (
        b"\x80\x02ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemsK\x01X\x03\x00\x00\x00getK\x02ub."
    )
    return made


def hidden_zips(root: Path) -> None:
    """File name -> archive with false sizes or offsets."""
    good = torch_pickle({"w": tensor()})
    archive(root / "packed_storage.pt", good, {"0": bytes(24)}, compress=True)
    archive(root / "bomb.pt", torch_pickle({"w": tensor(count=2**28)}), {"0": bytes(2**28)}, compress=True)
    with zipfile.ZipFile(root / "bomb_pickle.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 2**27 + b"N.")
    path = archive(root / "two_pickles.pt", good, {"0": WEIGHTS})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", good)
    path = archive(root / "big_endian.pt", good, {"0": WEIGHTS})
    path.write_bytes(path.read_bytes().replace(b"little", b"big   "))
    raw = archive(root / "honest.pt", good, {"0": WEIGHTS}).read_bytes()
    (root / "tail.pt").write_bytes(raw + b"more")
    (root / "cut.pt").write_bytes(raw[:-30])
    (root / "half.pt").write_bytes(raw[: len(raw) // 2])
    (root / "empty.pt").write_bytes(b"")
    (root / "text.pt").write_text("not an archive")
    (root / "comment.pt").write_bytes(raw[:-2] + b"\xff\xff" + b"PK\x05\x06" * 100)
    place = raw.rindex(b"PK\x05\x06")
    for number, (at, other) in enumerate([
        (10, b"\xff\xff"), (12, b"\xff\xff\xff\xff"), (16, b"\xff\xff\xff\x7f"), (12, b"\x00\x00\x00\x00"),
        (10, b"\x01\x00"),
    ]):  # fmt: skip
        (root / f"directory_{number}.pt").write_bytes(
            raw[: place + at] + other + raw[place + at + len(other) :]
        )
    for field, values in {
        20: (2**31, 0, 23), 24: (2**31, 0, 23, 0xFFFFFFFF), 42: (2**31, 3, 0xFFFFFFFF), 10: (8, 99), 8: (1,),
        28: (9, 0xFFFF),
    }.items():  # fmt: skip
        for value in values:
            entry = raw.rindex(b"PK\x01\x02")  # of the storage: the last that was written
            width = "<I" if field in (20, 24, 42) else "<H"
            size = struct.calcsize(width)
            spoiled = raw[: entry + field] + struct.pack(width, value) + raw[entry + field + size :]
            (root / f"entry_{field}_{value}.pt").write_bytes(spoiled)
    start = raw.index(b"PK\x03\x04", raw.index(b"byteorder") + 1)
    for field, part in ((0, b"XXXX"), (26, b"\xff\xff"), (28, b"\xff\x0f")):
        spoiled = raw[: start + field] + part + raw[start + field + len(part) :]
        (root / f"local_{field}.pt").write_bytes(spoiled)
    torch.save({"w": torch.ones(3)}, root / "legacy.pt", _use_new_zipfile_serialization=False)
    (root / "pickle.pt").write_bytes(pickle.dumps({"w": 1}))
    scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(scripted, str(root / "scripted.pt"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit, deprecated, and still on people's disks
def test_pickles_and_archives(tmp_path: Path) -> None:
    canary = tmp_path / "it_ran"
    root = tmp_path / "in"
    for name, pickled in pickles(canary).items():
        archive(root / f"{name}.pt", pickled, {"0": WEIGHTS})
    hidden_zips(root)
    folder = tmp_path / "in/folder"
    folder.mkdir()
    archive(folder / "pytorch_model.bin", torch_pickle({"w": Call(os.system, f"touch {canary}")}))
    addresses = [str(path) for path in sorted(root.glob("*.pt"))] + [str(folder)]
    before = digests(root)
    results = read_all(tmp_path, addresses)
    assert digests(root) == before
    assert not canary.exists()
    honest = results.pop(str(root / "honest.pt"))
    assert honest["tensors"]["w"] == ["F32", [2, 3], WEIGHTS.hex()]
    for address, result in results.items():
        assert is_clear(result, Path(address).name), (address, result)
    for name, why in {
        "system_2": "posix.system", "eval_4": "builtins.eval", "legacy": "torch before 1.6", "scripted": "TorchScript",
        "packed_storage": "compressed", "bomb": "compressed", "bomb_pickle": "compressed", "many_lists": "operations",
        "doubling": "more data than the file", "latin": "more data than the file", "deep_key": "key that is not text",
    }.items():  # fmt: skip
        assert why in results[str(root / f"{name}.pt")]["message"], results[str(root / f"{name}.pt")]


def test_flipped_bytes_of_a_training_s_checkpoint(tmp_path: Path) -> None:
    """Mutations of the pickle and of the central directory: refused in one line, or read without harm."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = tmp_path / "whole.pt"
    content = {
        "state_dict": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "n": np.arange(3),
        "s": {"x"},
    }
    torch.save(content, whole)
    raw = whole.read_bytes()
    with zipfile.ZipFile(whole) as file:
        entry = file.getinfo("whole/data.pkl")
    ranges = ((entry.header_offset, entry.header_offset + entry.file_size + 200), (len(raw) - 1500, len(raw)))
    random = np.random.default_rng(0)
    root = tmp_path / "in"
    root.mkdir()
    for number in range(700):
        spoiled = bytearray(raw)
        for place in random.integers(*ranges[number % 2], int(random.integers(1, 4))):
            spoiled[place] = int(random.integers(256))
        (root / f"{number}.pt").write_bytes(spoiled)
    results = read_all(tmp_path, [str(path) for path in sorted(root.iterdir())])
    refused = [result for result in results.values() if result["error"] is not None]
    assert 200 < len(refused) < 700
    for result in refused:
        assert is_clear(result, Path(result["address"]).name), result


def test_the_canary_would_sing(tmp_path: Path) -> None:
    canary = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(runs(canary)["exec"]))
    assert canary.exists()


def zero_folder(folder: Path, stage: int, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Two ranks of a small checkpoint; `change` corrupts the model and optimizer state of rank 1 (for stage 2, the
    model of rank 0)."""
    folder.mkdir(parents=True)
    shapes = [{"w": torch.Size([4, 3]), "v": torch.Size([2])}]
    for rank in range(2):
        model: dict[str, Any] = {
            "module": {"w": torch.zeros(0), "v": torch.zeros(0)},
            "buffer_names": [],
            "param_shapes": [dict(shapes[0])],
            "shared_params": {},
        }
        if stage == 3:
            state: dict[str, Any] = {
                "zero_stage": 3,
                "partition_count": 2,
                "fp32_flat_groups": [torch.arange(7.0)],
            }
        else:
            state = {
                "zero_stage": 2, "partition_count": [2], "single_partition_of_fp32_groups": [torch.arange(8.0)],
            }  # fmt: skip
        optimizer = {"optimizer_state_dict": state}
        if rank == 1:
            change(model, optimizer)
        name = (
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        )
        torch.save(model, folder / name)
        torch.save(optimizer, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _state(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda model, optimizer: optimizer["optimizer_state_dict"].update({key: value})


def _model(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda model, optimizer: model.update({key: value})


FLAT = {2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


def test_zero_files_that_do_not_fit(tmp_path: Path) -> None:
    root = tmp_path / "in"
    changes: dict[str, Callable[[int], Callable[[dict[str, Any], dict[str, Any]], None]]] = {
        "short": lambda z: _state(FLAT[z], [torch.arange(3.0)]),
        "half": lambda z: _state(FLAT[z], [torch.arange(8.0).half()]),
        "square": lambda z: _state(FLAT[z], [torch.ones(4, 2)]),
        "strided": lambda z: _state(FLAT[z], [torch.ones(16)[::2]]),
        "expanded": lambda z: _state(FLAT[z], [torch.ones(1).expand(8)]),
        "none": lambda z: _state(FLAT[z], None),
        "numbers": lambda z: _state(FLAT[z], [1.0, 2.0]),
        "no_state": lambda z: lambda model, optimizer: optimizer.clear(),
    }
    if_model = {  # these stand in the model file, which stage 2 has once and stage 3 reads of rank 0
        "no_module": _model("module", None),
        "module_is_list": _model("module", [torch.ones(2)]),
        "shapes_are_numbers": _model("param_shapes", [3]),
        "shapes_are_text": _model("param_shapes", "abc"),
        "shape_is_huge": _model("param_shapes", [{"w": torch.Size([2**62]), "v": torch.Size([2])}]),
        "shape_is_negative": _model("param_shapes", [{"w": (-4, 3), "v": (2,)}]),
        "shape_is_nothing": _model("param_shapes", [{"w": None}]),
        "more_groups": _model("param_shapes", [{"w": torch.Size([4, 3])}, {"v": torch.Size([2])}]),
        "name_is_number": _model("param_shapes", [{3: torch.Size([4, 3])}]),
        "shared_is_list": _model("shared_params", [1]),
        "frozen_is_number": _model("frozen_param_shapes", 3),
    }
    names = []
    for stage in (2, 3):
        for name, change in changes.items():
            zero_folder(root / f"{name}_{stage}", stage, change(stage))
            names.append(f"{name}_{stage}")
    for name, spoil in if_model.items():
        zero_folder(root / f"{name}_2", 2, spoil)
        names.append(f"{name}_2")
    for name, file in {
        "experts": "layer_0_expert_3_mp_rank_00_model_states.pt",
        "expert_optimizer": "expp_rank_0_mp_rank_00_optim_states.pt",
        "pipeline": "layer_01-model_00-model_states.pt", "tensor": "mp_rank_01_model_states.pt",
        "missing_rank": "zero_pp_rank_3_mp_rank_00_optim_states.pt",
    }.items():  # fmt: skip
        zero_folder(root / name, 2, lambda model, optimizer: None)
        (root / name / file).write_bytes(b"")
        names.append(name)
    zero_folder(root / "evil", 3, _model("evil", Call(os.system, f"touch {tmp_path / 'it_ran'}")))
    zero_folder(root / "good_2", 2, lambda model, optimizer: None)
    zero_folder(root / "good_3", 3, lambda model, optimizer: None)
    before = digests(root)
    results = read_all(tmp_path, [str(root / name) for name in [*names, "evil", "good_2", "good_3"]])
    assert digests(root) == before
    assert not (tmp_path / "it_ran").exists()
    for stage in (2, 3):
        assert set(results[str(root / f"good_{stage}")]["tensors"]) == {"w", "v"}
    for name in [*names, "evil"]:
        result = results[str(root / name)]
        assert is_clear(result, f"/{name}"), (name, result)
