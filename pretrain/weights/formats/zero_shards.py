"""DeepSpeed ZeRO 0-3 checkpoints read in place: every tensor is a list of pieces of the ranks' fp32 master shards."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import DTYPES, MAX_DIMENSIONS, TensorInfo, elements, narrow
from pretrain.weights.folder import Folder
from pretrain.weights.formats.safetensors_file import is_name, short
from pretrain.weights.formats.torch_file import TorchFile
from pretrain.weights.formats.torch_pickle import Stub
from pretrain.weights.formats.torch_tensor import Tensor

OPTIMIZER = re.compile(r"^(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
MODEL = re.compile(r"^(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
EXPERTS = re.compile(r"(^|_)expert_\d+_|^expp_rank_\d+_")
ELEMENTS_PER_COMPARISON = 1 << 18  # per block of a comparison
PARALLEL_OPENS = 8  # remote files opened concurrently
LAYERS = re.compile(r"^layer_\d+")


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flat parameter, stored in `shard` from element `offset` on."""

    start: int
    stop: int
    shard: Tensor
    offset: int


@dataclass(frozen=True)
class Entry:
    """One parameter and its pieces in order; `stops` are the `stop`s of the pieces, for bisection."""

    info: TensorInfo
    pieces: tuple[Piece, ...]
    stops: tuple[int, ...]


def is_zero_folder(folder: Folder) -> bool:
    """True if DeepSpeed's engine wrote this folder."""
    return bool(folder.matching("*_model_states.pt")) and "zero" not in folder.folders


class ZeroShards:
    """Weights of one checkpoint folder: the fp32 masters if it has them, else the module's own tensors.

    tied:   name -> stored name of the same weight.
    frozen: names of the stored parameters that did not train.
    Raises UserError for a folder that is incomplete, tensor-, pipeline- or expert-parallel, or not DeepSpeed's.
    """

    def __init__(self, folder: Folder | Path | str) -> None:
        self.folder = folder if isinstance(folder, Folder) else Folder(folder)
        self.url = self.folder.url
        self._entries: dict[str, Entry] = {}
        self.tied: dict[str, str] = {}
        self.frozen: frozenset[str] = frozenset()
        self.files: list[ByteFile] = []
        self._refuse_parallel()
        models = self._ranks(MODEL)
        optimizers = self._ranks(OPTIMIZER)
        if not models:
            raise UserError(f"{self.url}: not a DeepSpeed checkpoint (no *_model_states.pt)")
        self._opened = self._open(models)
        try:
            self._read(self._opened[0], optimizers)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{self.url}: its files do not have DeepSpeed's layout: {type(error).__name__}: {short(str(error))}"
            ) from None

    def _read(self, model: TorchFile, optimizers: list[str]) -> None:
        state = model.content
        if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
            raise UserError(f"{model.name}: not a DeepSpeed model file (it has no `module`)")
        for name in state["module"]:
            if not is_name(name):
                raise UserError(f"{model.name}: the tensor name {ascii(name)[:80]} is not printable text")
        shapes = state.get("param_shapes")
        if optimizers and shapes:
            self._read_sharded(optimizers, [_shapes(group, model.name) for group in shapes], state)
        else:
            self._read_unsharded(state)

    def names(self) -> list[str]:
        return list(self._entries)

    def info(self, name: str) -> TensorInfo:
        return self._entries[name].info

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flat tensor in its storage type; a view if one piece covers them."""
        entry = self._entries[name]
        at = bisect_right(entry.stops, start)
        if at < len(entry.pieces) and stop <= entry.stops[at]:
            piece = entry.pieces[at]
            return piece.shard.read(start + piece.offset - piece.start, stop + piece.offset - piece.start)
        out = np.empty(stop - start, DTYPES[entry.info[0]])
        self.read_into(name, start, stop, out)
        return out

    def read_into(self, name: str, start: int, stop: int, buffer: np.ndarray) -> None:
        """Copy elements [start, stop) into `buffer`, an array `[stop - start]` of the storage type."""
        entry = self._entries[name]
        at, done = bisect_right(entry.stops, start), start
        while done < stop:
            piece = entry.pieces[at]
            high, shift = min(stop, piece.stop), piece.offset - piece.start
            buffer[done - start : high - start] = piece.shard.read(done + shift, high + shift)
            at, done = at + 1, high

    def _open(self, names: Sequence[str]) -> list[TorchFile]:
        files = [self.folder.open(name) for name in names]
        self.files += files
        if not self.folder.remote:
            return [TorchFile(file) for file in files]
        with ThreadPoolExecutor(PARALLEL_OPENS) as pool:
            return list(pool.map(TorchFile, files))

    def _refuse_parallel(self) -> None:
        for name in self.folder.names:
            if EXPERTS.search(name):
                raise UserError(
                    f"{self.url}/{name}: expert-parallel checkpoints (DeepSpeed MoE) are not supported; first export "
                    "the model with DeepSpeed"
                )
            if LAYERS.match(name) and name.endswith("model_states.pt"):
                raise UserError(
                    f"{self.url}/{name}: pipeline-parallel checkpoints are not supported; first export the model"
                )

    def _ranks(self, pattern: re.Pattern[str]) -> list[str]:
        """Files that match `pattern`, in the order of their ranks."""
        found: dict[int, str] = {}
        for name in self.folder.names:
            if match := pattern.match(name):
                if int(match[2]) > 0:
                    raise UserError(
                        f"{self.url}/{name}: tensor- and pipeline-parallel checkpoints are not supported; "
                        "convert it to a universal checkpoint"
                    )
                if int(match[1] or 0) in found:
                    raise UserError(
                        f"{self.url}: {name} and {found[int(match[1] or 0)]} have the same rank; remove the wrong one"
                    )
                found[int(match[1] or 0)] = name
        missing = sorted(set(range(max(found, default=0))) - set(found))
        if missing:
            ranks = ", ".join(map(str, missing[:20]))
            raise UserError(f"{self.url}: the file of rank {ranks} is missing; copy it too")
        return [found[rank] for rank in sorted(found)]

    def _read_unsharded(self, state: dict[str, Any]) -> None:
        """Without ZeRO: the module's tensors; DeepSpeed's 16-bit wrapper adds fp32 masters, which replace them."""
        for name, tensor in state["module"].items():
            if isinstance(tensor, Tensor):
                self._add(name, tensor)
        self._find_ties()
        optimizer = state.get("optimizer")
        groups = optimizer.get("fp32_groups") if isinstance(optimizer, dict) else None
        for group in groups if isinstance(groups, list) else []:
            self._take_masters([master for master in group if isinstance(master, Tensor)])

    def _find_ties(self) -> None:
        seen: dict[object, str] = {}
        for name, entry in list(self._entries.items()):
            shard = entry.pieces[0].shard
            if shard.numel == 0:
                continue
            first = seen.setdefault(shard.memory_key, name)
            if first != name:
                self.tied[name] = first
                del self._entries[name]

    def _take_masters(self, masters: Sequence[Tensor]) -> None:
        """Assign each master to the first name, in the module's order, whose tensor equals the rounded master.

        The wrapper stores masters without names. Two masters can be swapped only if they round to equal tensors; the
        error is then below the rounding.
        """
        for master in masters:
            for name, entry in self._entries.items():
                fits = entry.info in (("BF16", master.shape), ("F16", master.shape))
                if fits and self._rounds_to(master, name):
                    self._add(name, master)
                    break

    def _rounds_to(self, master: Tensor, name: str) -> bool:
        """True if the rounded master equals the stored tensor, compared block by block."""
        dtype = self.info(name)[0]
        for at in range(0, master.numel, ELEMENTS_PER_COMPARISON):
            stop = min(at + ELEMENTS_PER_COMPARISON, master.numel)
            stored = self.read(name, at, stop).view(np.uint16)
            if not np.array_equal(narrow(master.read(at, stop), dtype).view(np.uint16), stored):
                return False
        return True

    def _read_sharded(
        self, optimizers: list[str], groups: list[dict[str, tuple[int, ...]]], state: dict[str, Any]
    ) -> None:
        opened = self._open(optimizers)
        states = [_optimizer_state(file) for file in opened]
        world = _world_size(states[0])
        if world is not None and world != len(optimizers):
            raise UserError(
                f"{self.url}: {world} ranks wrote this checkpoint, but it has the optimizer files of "
                f"{len(optimizers)} ranks; copy the files of all ranks"
            )
        if "fp32_flat_groups" in states[0]:
            self._stage_3(
                [_tensors(s, "fp32_flat_groups", f) for s, f in zip(states, opened, strict=True)], groups
            )
        else:
            partitions = [
                _tensors(s, "single_partition_of_fp32_groups", f) for s, f in zip(states, opened, strict=True)
            ]
            self._stage_1_and_2(partitions, groups, states[0].get("param_alignment_paddings"))
        self._add_module(state)

    def _stage_1_and_2(
        self, partitions: list[list[Tensor]], groups: list[dict[str, tuple[int, ...]]], paddings: Any
    ) -> None:
        """ZeRO 1 and 2: a parameter group is one flat vector, split over the ranks, in the order of `param_shapes`."""
        for rank, vectors in enumerate(partitions):
            if len(vectors) != len(groups):
                raise UserError(
                    f"{self.url}: the model file has {len(groups)} parameter groups, but the optimizer file of rank "
                    f"{rank} has {len(vectors)} flat vectors; copy the files of one save"
                )
        for number, group in enumerate(groups):
            vector = [rank[number] for rank in partitions]
            at = 0
            for place, (name, shape) in enumerate(group.items()):
                self._set_entry(name, ("F32", shape), _pieces_of_range(vector, at, elements(shape)))
                at += elements(shape) + (_size(paddings[number][place]) if paddings else 0)
            self._check_length(at, sum(shard.numel for shard in vector), slack=2 * len(partitions))

    def _stage_3(self, flat: list[list[Tensor]], groups: list[dict[str, tuple[int, ...]]]) -> None:
        """ZeRO 3: every parameter is padded and split into equal parts, one per rank, at the same offset."""
        at = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            count = elements(shape)
            part = -(-count // len(flat))
            pieces: list[Piece] = []
            for rank, vectors in enumerate(flat):
                start = rank * part
                length = max(0, min(part, count - start))
                pieces += [
                    Piece(start + p.start, start + p.stop, p.shard, p.offset)
                    for p in _pieces_of_range(vectors, at, length)
                ]
            self._set_entry(name, ("F32", shape), pieces)
            at += part
        self._check_length(at, sum(shard.numel for shard in flat[0]), slack=0)

    def _check_length(self, used: int, available: int, slack: int) -> None:
        if not available - slack <= used <= available + slack:
            raise UserError(
                f"{self.url}: the parameters have {used} elements, the shards {available}; the folder mixes files "
                "of different checkpoints"
            )

    def _add_module(self, state: dict[str, Any]) -> None:
        """Add the tensors that are not in the shards (buffers, frozen parameters), and the tied names."""
        shared = state.get("shared_params") or {}
        self.tied = {alias: name for alias, name in shared.items() if name in self._entries}
        buffers = set(state.get("buffer_names") or ())
        fragments = [
            file.content.get("frozen_param_fragments") or {}
            for file in self._opened
            if isinstance(file.content, dict)
        ]
        frozen_shapes = state.get("frozen_param_shapes") or {}
        for name, sides in frozen_shapes.items():
            shape = _shape(sides)
            parts = [rank[name] for rank in fragments if isinstance(rank.get(name), Tensor)]
            if parts:
                self._set_entry(name, (parts[0].dtype, shape), _pieces_of_range(parts, 0, elements(shape)))
        for name, tensor in state["module"].items():
            if (
                isinstance(tensor, Tensor)
                and name not in self._entries
                and name not in self.tied
                and (name in buffers or tensor.numel)
            ):
                self._add(name, tensor)
        owned = set(state["module"]) - buffers
        masters = {name for group in state["param_shapes"] for name in group}
        self.frozen = frozenset((set(frozen_shapes) | (owned - masters)) & set(self._entries))

    def _add(self, name: str, tensor: Tensor) -> None:
        self._set_entry(name, (tensor.dtype, tensor.shape), [Piece(0, tensor.numel, tensor, 0)])

    def _set_entry(self, name: str, info: TensorInfo, pieces: Iterable[Piece]) -> None:
        pieces = tuple(pieces)
        self._entries[name] = Entry(info, pieces, tuple(piece.stop for piece in pieces))


def _pieces_of_range(vectors: Sequence[Tensor], at: int, count: int) -> Iterator[Piece]:
    """Pieces of elements [at, at + count) of the concatenated vectors."""
    base = 0
    for vector in vectors:
        low, high = max(at, base), min(at + count, base + vector.numel)
        if low < high or (count == 0 and vector is vectors[0]):
            yield Piece(low - at, high - at, vector, low - base) if count else Piece(0, 0, vector, 0)
        base += vector.numel
    if at + count > base:
        raise UserError(
            f"{vectors[0].storage.file.name}: the shards are shorter than the parameters; a file is truncated"
        )


def _shapes(group: Any, file: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(group, dict) or not all(is_name(name) for name in group):
        raise UserError(f"{file}: its param_shapes is not a list of groups")
    return {name: _shape(shape) for name, shape in group.items()}


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("it contains a shape that is not a short list of integers")
    return tuple(_size(side) for side in shape)


def _size(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise ValueError("it contains a size that is not an integer of at least 0")
    return number


def _optimizer_state(file: TorchFile) -> dict[str, Any]:
    content = file.content
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{file.name}: not a DeepSpeed optimizer file (it has no `optimizer_state_dict`)")
    return state


def _tensors(state: dict[str, Any], key: str, file: TorchFile) -> list[Tensor]:
    found = state.get(key)
    vectors = [v for v in found if isinstance(v, Tensor)] if isinstance(found, list) else []
    if not vectors or any(v.dtype != "F32" or len(v.shape) != 1 or not v.contiguous for v in vectors):
        raise UserError(f"{file.name}: has no flat fp32 master weights ({key})")
    return vectors


def _world_size(state: dict[str, Any]) -> int | None:
    count = state.get("partition_count")
    if isinstance(count, list | tuple):
        count = max(count)
    if isinstance(count, Stub):
        count = count.args[0] if count.args else None
    return count if isinstance(count, int) else None
