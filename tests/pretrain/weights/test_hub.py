"""hf:// addresses through the installed huggingface_hub, against a local server that implements the hub's API."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.merge import merge
from tests.support import commands
from tests.support.hub_server import SIGNATURE, TOKEN, Hub, hub_server
from tests.support.merge_inputs import floats, read_bytes, write

pytest.importorskip("huggingface_hub")

CONFIG = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "README.md": b"# A model\n"}
NOT_NEEDED = {
    "pytorch_model.bin": b"pickle", "model.fp16.safetensors": b"half", "consolidated.safetensors": b"twice",
    "weights-Q4.gguf": b"gguf", "onnx/model.onnx": b"onnx", "onnx/model.safetensors": b"onnx", "tf_model.h5": b"h5",
    "flax_model.msgpack": b"flax", "modeling_x.py": b"raise SystemExit", "original/model.safetensors": b"original",
    "training_args.bin": b"pickle", "runs/events.out": b"log",
}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def model(folder: Path, seed: int, shards: bool = False) -> Path:
    tensors = {f"layers.{i}.w": floats(10 * seed + i, 40, 50) for i in range(4)}
    folder.mkdir(parents=True)
    for name, content in CONFIG.items():
        (folder / name).write_bytes(content)
    if not shards:
        return write(folder, tensors)
    placed: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[:1], list(tensors)[1:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write(folder, {name: tensors[name] for name in names}, file)
        placed |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.fixture
def pair(hub: Hub, tmp_path: Path) -> tuple[Path, Path]:
    """org/a in two shards and org/b in one file, with additional files that a merge does not need."""
    a, b = model(tmp_path / "a", 1, shards=True), model(tmp_path / "b", 2)
    hub.add("org/a", files_of(a) | NOT_NEEDED)
    hub.add("org/b", files_of(b) | NOT_NEEDED)
    return a, b


def dromos(hub: Hub, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process without the hub's variables, except those of the server and of a cache in `folder`."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
    }
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return commands.run(*words, cwd=folder, env=clean | environment)


def refused(found: subprocess.CompletedProcess[str]) -> str:
    """The one-line message of a command that ends with a user error."""
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1, found.stderr
    return lines[0]


def test_a_merge_from_the_hub_is_that_of_local_folders(
    hub: Hub, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    merge([str(pair[0]), str(pair[1])], tmp_path / "local", beta=0.3)
    made = dromos(
        hub,
        tmp_path,
        "merge",
        "hf://org/a",
        f"hf://org/b@{hub.commits['org/b']}",
        "--beta",
        "0.3",
        "--out",
        "out",
    )
    assert made.returncode == 0, made.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert sorted(hub.fetched) == sorted(
        [*CONFIG, *CONFIG, "model.safetensors", "model.safetensors.index.json",
         "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    )  # fmt: skip
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert [entry["address"] for entry in record["inputs"]] == [
        "hf://org/a",
        f"hf://org/b@{hub.commits['org/b']}",
    ]
    assert all(
        hub.commits[f"org/{n}"] in entry["path"] for n, entry in zip("ab", record["inputs"], strict=True)
    )
    hub.forget()
    again = dromos(hub, tmp_path, "verify", "out")
    assert again.returncode == 0, again.stdout
    assert hub.asked == []
    once_more = dromos(hub, tmp_path, "merge", "hf://org/a", "hf://org/b", "--beta", "0.5", "--out", "half")
    assert once_more.returncode == 0, once_more.stderr
    assert hub.fetched == []


def test_pickles_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {"w": torch.from_numpy(floats(1, 30, 40)), "v": torch.from_numpy(floats(2, 5))}
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        key = "w" if "00001" in name else "v"
        torch.save({key: tensors[key]}, tmp_path / name)
    index = {"weight_map": {"w": "pytorch_model-00001-of-00002.bin", "v": "pytorch_model-00002-of-00002.bin"}}
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.bin")}
    files |= {
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
        "training_args.bin": b"code",
        **CONFIG,
    }
    hub.add("org/old", files | {"x.gguf": b"gguf"})
    (tmp_path / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "one.bin")
    made = dromos(hub, tmp_path, "merge", "hf://org/old", "hf://org/old", "--beta", "1", "--out", "out")
    assert made.returncode == 0, made.stderr
    assert read_bytes(tmp_path / "out/model.safetensors") == {
        name: tensor.numpy().tobytes() for name, tensor in tensors.items()
    }
    assert sorted(hub.fetched) == sorted(
        [
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
            "pytorch_model.bin.index.json",
            *CONFIG,
        ]
    )


def test_what_is_no_model_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/gguf", {"x.gguf": b"gguf", "README.md": b"#"})
    hub.add("org/two", {"one.safetensors": b"1", "two.safetensors": b"2"})
    assert "org/gguf" in refused(dromos(hub, tmp_path, "diff", "hf://org/gguf", "hf://org/gguf"))
    assert "hf://org/two" in refused(dromos(hub, tmp_path, "diff", "hf://org/two", "hf://org/two"))
    assert hub.fetched == []


ERRORS: dict[str, tuple[str, str]] = {
    "hf://org/nothing": (
        "hf://org/nothing: the repository does not exist or needs a login (hf auth login)",
        "",
    ),
    "hf://org/a@v9": ("hf://org/a@v9: the revision does not exist; correct the text after @", ""),
    "hf://org/a/b": ("hf://org/a/b: not a valid repository name; write hf://ORG/NAME[@REVISION]", ""),
    "hf://org/gated": (
        "hf://org/gated: the repository is gated; request access on its page and log in (hf auth login)",
        "",
    ),
    "hf://org/hidden": (
        "hf://org/hidden: the repository does not exist or needs a login (hf auth login)",
        "",
    ),
}


@pytest.mark.parametrize("address", ERRORS)
def test_what_cannot_be_had_is_one_line(
    hub: Hub, pair: tuple[Path, Path], tmp_path: Path, address: str
) -> None:
    for name in ("gated", "hidden"):
        hub.add(f"org/{name}", files_of(pair[1]))
        getattr(hub, name).add(f"org/{name}")
    assert refused(dromos(hub, tmp_path, "diff", address, str(pair[0]))).endswith(ERRORS[address][0])
    assert hub.fetched == []


def test_with_a_token_what_is_gated_is_had_and_the_token_is_said_nowhere(
    hub: Hub, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.add("org/gated", files_of(pair[1]))
    hub.add("org/broken", files_of(pair[0]))
    hub.gated.add("org/gated")
    words = ("merge", "hf://org/gated", str(pair[0]), "--beta", "0.5", "--out", "out")
    made = dromos(hub, tmp_path, *words, HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert made.returncode == 0, made.stderr
    assert hub.tokens
    assert not [path for path in hub.tokens if path.startswith("/lfs/")]
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert TOKEN.encode() not in written
    assert TOKEN not in made.stdout
    quiet = dromos(hub, tmp_path, *words[:-1], "again", HF_TOKEN=TOKEN)
    assert TOKEN not in quiet.stdout + quiet.stderr
    hub.breaks = {"model-00001-of-00002.safetensors": 1000}
    broken = dromos(hub, tmp_path, "diff", "hf://org/broken", str(pair[0]), HF_TOKEN=TOKEN)
    assert TOKEN not in broken.stdout + broken.stderr
    assert SIGNATURE not in broken.stdout + broken.stderr


def test_a_connection_that_breaks_in_the_middle(hub: Hub, pair: tuple[Path, Path], tmp_path: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    hub.breaks = {shard: 1}
    words = ("merge", "hf://org/a", str(pair[1]), "--beta", "0.3", "--out", "out")
    made = dromos(hub, tmp_path, *words)
    assert made.returncode == 0, made.stderr
    assert hub.fetched.count(shard) == 2
    merge([str(pair[0]), str(pair[1])], tmp_path / "local", beta=0.3)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_download_that_never_ends_well(hub: Hub, pair: tuple[Path, Path], tmp_path: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    hub.breaks = {shard: 1000}
    words = ("merge", "hf://org/a", str(pair[1]), "--beta", "0.3", "--out", "out")
    line = refused(dromos(hub, tmp_path, *words, HF_HUB_DOWNLOAD_TIMEOUT="2"))
    assert "hf://org/a: is not in the cache" in line
    assert not (tmp_path / "out").exists()
    assert SIGNATURE not in line
    hub.status = 503
    offline = refused(dromos(hub, tmp_path, *words))
    assert "is incomplete" in offline
    assert shard in offline
    hub.status, hub.breaks = 0, {}
    made = dromos(hub, tmp_path, *words)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no server", "503"])
def test_without_the_hub_the_cache_is_enough(
    hub: Hub, pair: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    words = ("merge", "hf://org/a", "hf://org/b", "--beta", "0.3", "--out")
    warm = dromos(hub, tmp_path, *words, "warm")
    assert warm.returncode == 0, warm.stderr
    hub.forget()
    environment: dict[str, Any] = {}
    if how == "HF_HUB_OFFLINE":
        environment["HF_HUB_OFFLINE"] = "1"
    elif how == "no server":
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    else:
        hub.status = 503
    found = dromos(hub, tmp_path, *words, "offline", **environment)
    assert found.returncode == 0, found.stderr
    assert hub.fetched == []
    assert how != "HF_HUB_OFFLINE" or hub.asked == []
    name = "model.safetensors"
    assert (tmp_path / "offline" / name).read_bytes() == (tmp_path / "warm" / name).read_bytes()
    (tmp_path / "cold").mkdir()
    cold = dromos(hub, tmp_path / "cold", *words, "out", **environment)
    said = {"HF_HUB_OFFLINE": "", "no server": r" \(ConnectError: .*\)", "503": r" \(HTTP status 503\)"}[how]
    line = rf"dromos: hf://org/a: is not in the cache, and the hub does not answer{said}; go online, or .*"
    assert re.fullmatch(line, refused(cold))
