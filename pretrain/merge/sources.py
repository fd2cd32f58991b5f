"""Weights at an address, whatever wrote them: names, shapes, and flat ranges read in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from pretrain.address import Located, locate
from pretrain.merge.safetensors_io import DTYPES, Info, SafetensorsFile, elements
from pretrain.merge.torch_zip import Tensor, TorchFile
from pretrain.merge.zero_shards import ZeroShards

FROZEN = "frozen.safetensors"
INDEX = "model.safetensors.index.json"
SINGLE = ("model.safetensors", "open_clip_model.safetensors")
COMPANIONS = (
    "config.json", "generation_config.json", "open_clip_config.json", "preprocessor_config.json",
    "processor_config.json", "chat_template*", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
BLOCK = 1 << 20


class Reader(Protocol):
    """What holds tensors: one safetensors file, one torch file, one ZeRO checkpoint."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> Info: ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray: ...


class StateDict:
    """A flat state dict in a file of torch.save, at its top or under `state_dict`, `model` or `module`."""

    def __init__(self, path: Path) -> None:
        content = TorchFile(path).content
        for key in ("state_dict", "model", "module"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no state dict")
        self._tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if not self._tensors:
            raise UserError(f"{path}: holds no tensors at its top nor under state_dict, model or module")

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> Info:
        return self._tensors[name].dtype, self._tensors[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name].read(start, stop)


class WeightSource:
    """The weights at one address.

    address:    as it was written.
    located:    where it led.
    frozen:     names of parameters that did not train (from frozen.safetensors or the checkpoint itself).
    tied:       name -> the name under which the same weight is stored; not in `names()`.
    files:      every file that holds tensors.
    companions: file name -> path of config, tokenizer and the like beside HF weights.
    """

    def __init__(
        self,
        address: str,
        located: Located,
        readers: Mapping[Path, Reader],
        files: Sequence[Path],
        tied: Mapping[str, str] | None = None,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.address, self.located = address, located
        self.tied, self.frozen, self.files = dict(tied or {}), frozen, list(files)
        self._holder: dict[str, Reader] = {}
        for path, reader in readers.items():
            for name in reader.names():
                if name in self._holder and path.name != FROZEN:
                    raise UserError(f"{address}: {name} is in two files, one of them {path}")
                self._holder.setdefault(name, reader)
        folder = Path(located.path)
        found = (
            sorted(path for pattern in COMPANIONS for path in folder.glob(pattern)) if folder.is_dir() else []
        )
        keep = located.kind in ("folder", "hf")
        self.companions = {
            path.name: path for path in found if keep and path.name != INDEX and path.is_file()
        }

    def names(self) -> list[str]:
        """Every stored tensor once, frozen ones included."""
        return list(self._holder)

    def info(self, name: str) -> Info:
        """dtype as safetensors spells it (F32, BF16, ...) and shape."""
        return self._holder[name].info(name)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flat tensor, read-only, in the storage type; BF16 comes as its bits, uint16."""
        return self._holder[name].read(name, start, stop)

    def array(self, name: str) -> np.ndarray:
        """A whole tensor in its shape; BF16 as float32, which holds it exactly."""
        dtype, shape = self.info(name)
        flat = self.read(name, 0, elements(shape))
        if dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(shape)

    def equal(self, name: str, other: WeightSource) -> bool:
        """True where both hold the same bytes under `name`, in the same shape and dtype."""
        if self.info(name) != other.info(name):
            return False
        count = elements(self.info(name)[1])
        blocks = range(0, count, BLOCK)
        return all(
            self.read(name, at, min(at + BLOCK, count)).tobytes()
            == other.read(name, at, min(at + BLOCK, count)).tobytes()
            for at in blocks
        )

    @property
    def frozen_file(self) -> Path | None:
        """frozen.safetensors of the stage that wrote the weights, if it froze anything."""
        return next((path for path in self.files if path.name == FROZEN), None)

    def hashes(self) -> dict[str, str]:
        """File -> xxh64 of every file that holds tensors; from the checkpoint's own manifest where it has one."""
        known: dict[str, str] = {}
        manifest = Path(self.located.path) / "manifest.json"
        if self.located.kind == "checkpoint" and manifest.is_file():
            known = {name: entry["xxh64"] for name, entry in json.loads(manifest.read_text()).items()}
        return {path.name: known.get(path.name) or hash_file(path) for path in self.files}


def open_weights(address: str, run_dir: Path | None = None) -> WeightSource:
    """Open the weights at `address` (see pretrain.address); nothing but headers is read.

    Raises UserError naming what is missing, damaged, or not readable.
    """
    located = locate(address, run_dir)
    if located.kind == "hf":
        located = _download(address, located)
    path = Path(located.path)
    if located.path.startswith("s3://"):
        raise UserError(f"{address}: weights on S3 cannot be read in place yet; copy them to a disk first")
    if located.kind == "open_clip":
        raise UserError(f"{address}: save the model as safetensors first; open_clip:// serves training only")
    tied: Mapping[str, str] = {}
    frozen: frozenset[str] = frozenset()
    readers: dict[Path, Reader] = {}
    if located.kind == "checkpoint":
        shards = ZeroShards(path)
        readers[path], files = shards, list(shards.files)
        tied, frozen = shards.tied, shards.frozen
    elif located.kind == "file" and path.suffix != ".safetensors":
        readers[path], files = StateDict(path), [path]
    else:
        files = [path] if path.is_file() else _folder_files(path, address)
        readers = {file: SafetensorsFile(file) for file in files}
        record = path / "merge.json"
        tied = json.loads(record.read_text()).get("tied", {}) if record.is_file() else {}
    aside = located.stage_dir / FROZEN if located.stage_dir is not None else None
    if aside is not None and aside.is_file():
        readers[aside] = SafetensorsFile(aside)
        frozen |= frozenset(readers[aside].names())
        files.append(aside)
    return WeightSource(address, located, readers, files, tied, frozen)


def _folder_files(folder: Path, address: str) -> list[Path]:
    """The safetensors files of a folder: through its index, or the one file there is."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of safetensors (no weight_map)") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index}: names {name!r}, which is no file of this folder")
            if not (folder / name).is_file():
                raise UserError(f"{index}: names {name}, which is not there; fetch the folder again")
        return [folder / name for name in names]
    for name in SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    found = sorted(path for path in folder.glob("*.safetensors") if path.name != FROZEN)
    if len(found) == 1:
        return found
    what = (
        f"{len(found)} safetensors files and no {INDEX}" if found else "no safetensors file and no checkpoint"
    )
    raise UserError(f"{address}: {what} in {folder}; name one file, or RUN/STAGE")


def _download(address: str, located: Located) -> Located:
    name, _, revision = located.path.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{address}: needs huggingface_hub; pip install 'dromos[train]'") from None
    patterns = ["*.safetensors", INDEX, *COMPANIONS]
    try:
        path = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise UserError(f"{address}: cannot be fetched: {error}") from None
    return Located("hf", path)


def hash_file(path: Path) -> str:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def nbytes(info: Info) -> int:
    return elements(info[1]) * DTYPES[info[0]].itemsize
