"""`open_weights` and `WeightSource`: names, shapes and flat ranges of the weights at any address, read in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.storage.files import is_remote
from pretrain.run.address import AT_STEP, Located, locate
from pretrain.run.folder import step_of
from pretrain.weights import companions, hub
from pretrain.weights.byte_file import ByteFile, LocalFile, open_file
from pretrain.weights.digests import fingerprint
from pretrain.weights.dtypes import TensorInfo, elements
from pretrain.weights.folder import FROZEN, UNSUPPORTED, Folder, refuse_pointer, weight_files
from pretrain.weights.formats.accessory import AccessoryCheckpoint, is_accessory
from pretrain.weights.formats.dcp import DcpCheckpoint, is_dcp
from pretrain.weights.formats.safetensors_file import SafetensorsFile, short
from pretrain.weights.formats.state_dict import StateDict
from pretrain.weights.formats.zero_shards import ZeroShards, is_zero_folder
from pretrain.weights.formats.zero_universal import UniversalCheckpoint, is_universal
from pretrain.weights.origins import origins
from pretrain.weights.tied_weights import tie_setting, tied_names
from pretrain.weights.unusable import refuse_empty
from pretrain.weights.wrapper_names import unwrapped

ELEMENTS_PER_COMPARISON = 1 << 20


class Reader(Protocol):
    """Tensors of one safetensors file, one torch file or one ZeRO checkpoint."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray: ...


class WeightSource:
    """The weights at one address.

    address:      as the user wrote it.
    located:      the resolved address.
    frozen:       names of parameters that did not train (from frozen.safetensors or the checkpoint itself).
    tied:         name -> stored name of the same weight; tied names are not in `names()`.
    files:        every file that holds tensors.
    folder:       the folder of config, tokenizer and other companions; None for a checkpoint, and for a
                  single file whose folder is not used.
    config_error: the reason why an output cannot use this source's config; None if it can use it.
    rows_digest:  digest of the row maps of its embeddings; empty if the rows are read as stored.
    key:          the key of the state dict that was chosen in its torch files; None if none was chosen.
    folder_notes: notes about the choice of weight files.
    renamed:      name in the files, without wrappers -> name, where `rename` changed it.
    reading:      notes about tensors that are read otherwise than stored; a merge shows them for every input.
    """

    config_error: str | None = None
    rows_digest: str = ""
    key: str | None = None
    folder_notes: Sequence[str] = ()

    def __init__(
        self,
        address: str,
        located: Located,
        readers: Mapping[str, Reader],
        files: Sequence[ByteFile],
        tied: Mapping[str, str] | None = None,
        frozen: frozenset[str] = frozenset(),
        folder: Folder | None = None,
    ) -> None:
        self.address, self.located = address, located
        self.frozen, self.files, self.folder = frozen, list(files), folder
        self._reader_by_name: dict[str, Reader] = {}
        for file, reader in readers.items():
            for name in reader.names():
                if name in self._reader_by_name:
                    raise UserError(f"{address}: {name} is stored in two files, one of them {file}")
                self._reader_by_name.setdefault(name, reader)
        self.reading: list[str] = []
        self.renamed: dict[str, str] = {}
        self._stored: dict[str, str] = {}  # name -> its stored name, if they differ
        self.tied: dict[str, str] = {}
        self._tie(self._unwrap(tied or {}))

    def _unwrap(self, tied: Mapping[str, str]) -> Mapping[str, str]:
        """Remove the wrappers from all names; returns `tied` with the new names."""
        new, removed = unwrapped([*self._reader_by_name, *tied])
        if removed is None:
            return tied
        self._stored = {new[name]: name for name in self._reader_by_name}
        self._reader_by_name = {new[name]: reader for name, reader in self._reader_by_name.items()}
        self.frozen = frozenset(new.get(name, name) for name in self.frozen)
        self.reading.append(f"{self.address}: {removed}")
        return {new[alias]: new.get(name, name) for alias, name in tied.items()}

    def _tie(self, tied: Mapping[str, str]) -> None:
        self.tied |= {alias: name for alias, name in tied.items() if name in self._reader_by_name}
        for alias in self.tied:
            self._reader_by_name.pop(alias, None)

    def _add_frozen(self, file: ByteFile) -> None:
        """Add the frozen tensors that a stage stores beside its checkpoints; the checkpoint takes precedence."""
        reader = SafetensorsFile(file)
        self.files.append(file)
        self.frozen |= frozenset(reader.names())
        for name in reader.names():
            self._reader_by_name.setdefault(name, reader)

    def names(self) -> list[str]:
        """Names of all stored tensors, including frozen ones."""
        return list(self._reader_by_name)

    def info(self, name: str) -> TensorInfo:
        """dtype in safetensors spelling (F32, BF16, ...) and shape."""
        return self._reader_by_name[name].info(self._stored.get(name, name))

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flat tensor, read-only, in the storage type (BF16: its bits as uint16).

        Raises UserError if the file changed since it was opened, ReadError if the object store does not answer.
        """
        return self._reader_by_name[name].read(self._stored.get(name, name), start, stop)

    def array(self, name: str) -> np.ndarray:
        """A whole tensor in its shape; BF16 is widened to float32, which is exact."""
        dtype, shape = self.info(name)
        flat = self.read(name, 0, elements(shape))
        if dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(shape)

    def equal(self, name: str, other: WeightSource) -> bool:
        """True if both sources hold the same bytes, shape and dtype under `name`."""
        return same_tensor(self, name, other, name)

    @cached_property
    def _companions_and_notes(self) -> tuple[dict[str, Path | bytes], list[str]]:
        return companions.companions_of(self.folder) if self.folder is not None else ({}, [])

    @property
    def companions(self) -> dict[str, Path | bytes]:
        """File name -> path or content of the config, tokenizer and other companions."""
        return self._companions_and_notes[0]

    @property
    def notes(self) -> list[str]:
        """Notes for the user about files that are used or left out."""
        return [*self.folder_notes, *self._companions_and_notes[1]]

    @cached_property
    def lineage(self) -> frozenset[str]:
        """Recorded origins of the weights (see pretrain.weights.origins)."""
        return origins(self.address, self.folder)

    @property
    def frozen_file(self) -> Path | None:
        """frozen.safetensors of the stage that wrote the weights; None if the stage froze nothing."""
        return next((Path(file.name) for file in self.files if Path(file.name).name == FROZEN), None)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names: name -> new name."""
        for name, new in names.items():
            self._reader_by_name[new] = self._reader_by_name.pop(name)
            self._stored[new] = self._stored.pop(name, name)
        self.frozen = frozenset(names.get(name, name) for name in self.frozen)
        self.tied = {names.get(alias, alias): names.get(name, name) for alias, name in self.tied.items()}
        self.renamed = dict(names)

    def check_unchanged(self) -> None:
        """Raises UserError if a file differs from the one that was opened."""
        for file in self.files:
            file.check_unchanged()

    def hashes(self) -> dict[str, str]:
        """Weight file -> content hash: its xxh64 in the checkpoint's manifest if it has one, else its fingerprint."""
        known: dict[str, str] = {}
        if self.located.kind == "checkpoint":
            known = _manifest(Folder(self.located.path))
        return {name: known.get(name) or fingerprint(file) for name, file in _short_names(self.files).items()}


def open_weights(address: str, run_dir: Path | None = None, key: str | None = None) -> WeightSource:
    """Open the weights at `address` (see pretrain.run.address). Reads headers only.

    key: of the state dict to read in torch files that hold several (`model_ema`, `model.encoder`); other formats
         ignore it, and `WeightSource.key` stays None.
    Raises UserError naming the missing, damaged or unreadable file.
    """
    located = locate(address, run_dir)
    if located.kind == "hf":
        located = Located("hf", hub.fetch(address, located.path))
    elif located.kind == "open_clip":
        located = Located("file", hub.fetch_open_clip(address, located.path))
    if located.kind == "file":
        source = _open_file(address, located, key)
    else:
        source = _open_folder(address, *_resolve_folder(located, address), key)
    frozen_file = located.stage_dir / FROZEN if located.stage_dir is not None else None
    if frozen_file is not None and frozen_file.is_file():
        source._add_frozen(LocalFile(frozen_file))
    refuse_empty(address, source)
    return source


def _open_file(address: str, located: Located, key: str | None) -> WeightSource:
    """Open a weight file, with its folder's companions if the folder holds no other weights."""
    if located.path.endswith(".gguf"):
        raise UserError(f"{address}: {UNSUPPORTED['*.gguf']}")
    folder, note = (None, None) if is_remote(located.path) else _enclosing_folder(located.path)
    file = refuse_pointer(open_file(located.path)) if folder is None else folder.open(Path(located.path).name)
    if located.path.endswith(".safetensors"):
        source = WeightSource(address, located, {file.name: SafetensorsFile(file)}, [file], folder=folder)
    else:
        state = StateDict(file, key)
        source = WeightSource(address, located, {file.name: state}, [file], state.tied, folder=folder)
        source.key = key
    if folder is not None:
        source._tie(_recorded_ties(source))
    source.folder_notes = [note] if note else []
    return source


def _enclosing_folder(path: str) -> tuple[Folder | None, str | None]:
    """The folder of a file if it holds no other weights; else None and, if the folder has a config, a note why."""
    folder, name = Folder(os.path.dirname(path) or "."), os.path.basename(path)
    if "config.json" not in folder and "open_clip_config.json" not in folder:
        return None, None
    try:
        files, _ = weight_files(folder, path)
    except UserError:
        files = {}
    if set(files) == {name}:
        return folder, None
    if name in files:
        return None, f"{path} is one of {len(files)} shards; name the folder for the whole model"
    return None, f"{path} is one of several weight files: config and tokenizer of its folder are not used"


def _resolve_folder(located: Located, address: str) -> tuple[Located, Folder]:
    """The folder of the weights: the folder itself, the one that its `latest` file names, or a step of a stage."""
    if is_remote(located.path) and (match := AT_STEP.match(located.path)):
        return _remote_step(match["base"], match["at"], address)
    folder = Folder(located.path)
    if is_universal(folder):
        return replace(located, kind="folder"), folder
    if located.kind == "checkpoint" or is_zero_folder(folder):
        return replace(located, kind="checkpoint"), folder
    if "latest" in folder:
        tag = folder.bytes("latest", 4096).decode("utf-8", "replace").strip()
        if tag not in folder.folders:
            raise UserError(f"{folder.url}/latest: names {tag[:100]!r}, which is not a folder beside it")
        below = folder.subfolder(tag)
        return Located("folder" if is_universal(below) else "checkpoint", below.url), below
    return located, folder


def _remote_step(stage: str, which: str, address: str) -> tuple[Located, Folder]:
    checkpoints = Folder(f"{stage}/checkpoints")
    steps = {step: name for name in checkpoints.folders if (step := step_of(name)) is not None}
    complete = {step: name for step, name in steps.items() if "COMPLETE" in checkpoints.subfolder(name)}
    if which == "best" or not complete or (which.isdigit() and int(which) not in complete):
        have = ", ".join(map(str, sorted(complete))) or "none"
        raise UserError(
            f"{address}: name a complete checkpoint of a remote stage by step or @latest; complete steps: {have}"
        )
    step = max(complete) if which == "latest" else int(which)
    folder = checkpoints.subfolder(complete[step])
    return Located("checkpoint", folder.url, None, step), folder


def _open_folder(address: str, located: Located, folder: Folder, key: str | None) -> WeightSource:
    if located.kind == "checkpoint":
        shards = ZeroShards(folder)
        return WeightSource(
            address,
            located,
            {folder.url: shards},
            shards.files,
            shards.tied,
            shards.frozen,
            _folder_of(folder),
        )
    if is_universal(folder):
        universal = UniversalCheckpoint(folder)
        return WeightSource(
            address,
            located,
            {folder.url: universal},
            universal.files,
            universal.tied,
            folder=_folder_of(folder),
        )
    if is_dcp(folder) or is_accessory(folder):
        parts = DcpCheckpoint(folder, key) if is_dcp(folder) else AccessoryCheckpoint(folder, key)
        source = WeightSource(address, located, {folder.url: parts}, parts.files, folder=folder)
        source.key = key
        return source
    readers: dict[str, Reader] = {}
    files: list[ByteFile] = []
    tied: dict[str, str] = {}
    placed, folder_notes = weight_files(folder, address)
    for name, expected in placed.items():
        files.append(file := folder.open(name))
        reader = SafetensorsFile(file) if name.endswith(".safetensors") else StateDict(file, key)
        if isinstance(reader, StateDict):
            tied |= reader.tied
        absent = sorted(expected - {*reader.names(), *tied})
        if absent:
            raise UserError(
                f"{file.name}: has no tensor {short(absent[0])}, although the index of its folder lists it"
            )
        readers[file.name] = reader
    source = WeightSource(address, located, readers, files, tied, frozenset(), folder)
    source.folder_notes = folder_notes
    source.key = key if any(isinstance(reader, StateDict) for reader in readers.values()) else None
    source._tie(_recorded_ties(source))
    return source


def _folder_of(checkpoint: Folder) -> Folder | None:
    """The folder above a DeepSpeed checkpoint if it holds config and tokenizer, as transformers' Trainer has it."""
    above, _, name = checkpoint.url.rstrip("/").rpartition("/")
    if not above or not name:
        return None
    try:
        folder = Folder(above)
    except UserError:  # unreadable
        return None
    return folder if "latest" in folder and "config.json" in folder else None


def _recorded_ties(source: WeightSource) -> dict[str, str]:
    """Tied names from merge.json, else from config.json."""
    folder = source.folder
    assert folder is not None
    record: Any = folder.json("merge.json") if "merge.json" in folder else None
    if isinstance(record, dict) and isinstance(record.get("tied"), dict):
        recorded = {str(alias): str(name) for alias, name in record["tied"].items()}
        stored = set(source.names())
        # A record beside weights that were written later may call a tensor tied that is stored with other values.
        return {
            alias: name
            for alias, name in recorded.items()
            if alias not in stored or (name in stored and same_tensor(source, alias, source, name))
        }
    config: Any = folder.json("config.json") if "config.json" in folder else None

    def equal(name: str, stored: str) -> bool:
        return not folder.remote and same_tensor(source, name, source, stored)

    return tied_names(source.names(), config, equal if tie_setting(config) else None)


def same_tensor(a: WeightSource, name_a: str, b: WeightSource, name_b: str) -> bool:
    """True if both tensors have the same bytes, shape and dtype."""
    if a.info(name_a) != b.info(name_b):
        return False
    count = elements(a.info(name_a)[1])
    return all(
        np.array_equal(
            a.read(name_a, at, min(at + ELEMENTS_PER_COMPARISON, count)).view(np.uint8),
            b.read(name_b, at, min(at + ELEMENTS_PER_COMPARISON, count)).view(np.uint8),
        )
        for at in range(0, count, ELEMENTS_PER_COMPARISON)
    )


def _manifest(folder: Folder) -> dict[str, str]:
    if "manifest.json" not in folder:
        return {}
    content: Any = folder.json("manifest.json")
    try:
        return {str(name): str(entry["xxh64"]) for name, entry in content.items()}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{folder.url}/manifest.json: not a checkpoint manifest") from None


def _short_names(files: Sequence[ByteFile]) -> dict[str, ByteFile]:
    """File name -> file; with the parent folder in the name if two files have the same name."""
    named = {Path(file.name).name: file for file in files}
    if len(named) == len(files):
        return named
    return {"/".join(Path(file.name).parts[-2:]): file for file in files}
