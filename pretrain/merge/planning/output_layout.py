"""Layout of the output: safetensors files of bounded size, their headers, and the index over them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import OutputFile
from pretrain.weights.dtypes import DTYPES, TensorInfo, elements
from pretrain.weights.formats.safetensors_file import layout

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = 5 * 10**9  # bytes of tensors per file at most; the default of Hugging Face


@dataclass(frozen=True)
class Layout:
    """Output files and the index over them.

    index:  content of model.safetensors.index.json; None for a single file.
    places: name -> (file number, byte offset in that file), in the order of the headers.
    """

    files: tuple[OutputFile, ...]
    index: bytes | None
    places: dict[str, tuple[int, int]]


def lay_out(tensors: Mapping[str, TensorInfo], max_shard_size: int = SHARD_SIZE) -> Layout:
    """Fill files with at most `max_shard_size` bytes of tensors each, in the order of `tensors`.

    A tensor that does not fit starts a new file; a tensor larger than the limit gets its own file. A single file is
    model.safetensors; several files are model-00001-of-0000N.safetensors with an index.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        size = _size(info)
        if groups[-1] and filled + size > max_shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += size
    count = len(groups)
    names = (
        [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    files, places = [], {}
    for number, (file, group) in enumerate(zip(names, groups, strict=True)):
        header, offsets = layout(group, {"format": "pt"})
        files.append(OutputFile(file, header, len(header) + sum(_size(info) for info in group.values())))
        places.update({name: (number, offset) for name, offset in offsets.items()})
    return Layout(tuple(files), _index(tensors, names, places) if count > 1 else None, places)


def _index(
    tensors: Mapping[str, TensorInfo], files: list[str], places: Mapping[str, tuple[int, int]]
) -> bytes:
    content = {
        "metadata": {"total_size": sum(_size(info) for info in tensors.values())},
        "weight_map": {name: files[places[name][0]] for name in sorted(tensors)},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _size(info: TensorInfo) -> int:
    return elements(info[1]) * DTYPES[info[0]].itemsize


def parse_size(text: str | int) -> int:
    """Bytes of a size: `5GB` is 5,000,000,000, `512MiB` is 536,870,912, a plain number is bytes. Raises UserError."""
    units = {"": 1, "B": 1} | {
        f"{prefix}{kind}": base**power
        for power, prefix in enumerate("KMGT", 1)
        for kind, base in (("B", 1000), ("IB", 1024), ("", 1000))
    }
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(text).strip().upper())
    if found is None or found[2] not in units or (size := int(float(found[1]) * units[found[2]])) < 1:
        raise UserError(f"max_shard_size {text!r}: write a size such as 5GB, 500MB or 2GiB")
    return size
