"""Recorded origins of weights: the models that merge.json, config.json and the model card name."""

from __future__ import annotations

import re
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.run.address import HUB_NAME
from pretrain.weights.folder import Folder

FRONT_MATTER = re.compile(rb"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
CARD_LIMIT = 4 << 20


def origins(address: str, folder: Folder | None) -> frozenset[str]:
    """Addresses of the models that the weights derive from, and their own hub address; hub names as hf://ORG/NAME.

    Sources: `base_model` of the model card, `_name_or_path` of the config, the inputs of merge.json and their recorded
    origins. Empty if none is recorded.
    """
    found = {address.partition("@")[0]} if address.startswith("hf://") else set()
    if folder is None:
        return frozenset(found)
    for name, read in (("merge.json", _of_merge), ("config.json", _of_config), ("README.md", _of_card)):
        if name in folder:
            try:
                found |= read(folder, name)
            except UserError:  # an unreadable file adds nothing
                continue
    return frozenset(found)


def _of_merge(folder: Folder, name: str) -> set[str]:
    record = folder.json(name)
    inputs = record.get("inputs") if isinstance(record, dict) else None
    found: set[str] = set()
    for entry in inputs if isinstance(inputs, list) else []:
        if isinstance(entry, dict):
            address, lineage = entry.get("address"), entry.get("lineage")
            if isinstance(address, str) and "://" in address:
                found.add(address.partition("@")[0])
            found |= (
                {name for name in lineage if isinstance(name, str)} if isinstance(lineage, list) else set()
            )
    return found


def _of_config(folder: Folder, name: str) -> set[str]:
    config = folder.json(name)
    return _hub(config.get("_name_or_path")) if isinstance(config, dict) else set()


def _of_card(folder: Folder, name: str) -> set[str]:
    """`base_model` of the front matter: a name or a list of names."""
    match = FRONT_MATTER.match(folder.bytes(name, CARD_LIMIT))
    try:
        matter: Any = yaml.safe_load(match[1].decode("utf-8", "replace")) if match else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return set()
    base = matter.get("base_model") if isinstance(matter, dict) else None
    names = base if isinstance(base, list) else [base]
    return {address for name in names for address in _hub(name)}


def _hub(name: Any) -> set[str]:
    return {f"hf://{name}"} if isinstance(name, str) and HUB_NAME.match(name) else set()
