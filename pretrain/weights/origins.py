"""Where weights say that they come from: the files beside them, read for names of models and addresses."""

from __future__ import annotations

import re
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.weights.folder import Folder

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
FRONT_MATTER = re.compile(rb"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
CARD_LIMIT = 4 << 20


def origins(address: str, folder: Folder | None) -> frozenset[str]:
    """Names of what weights were made from, hub names as hf://ORG/NAME: `base_model` of the model card, `_name_or_path`
    of the config, inputs of merge.json and their origins; and the weights' own hub name. Empty where nothing is said.
    """
    found = {address.partition("@")[0]} if address.startswith("hf://") else set()
    if folder is None:
        return frozenset(found)
    for name, read in (("merge.json", _of_merge), ("config.json", _of_config), ("README.md", _of_card)):
        if name in folder:
            try:
                found |= read(folder, name)
            except UserError:  # who cannot be read says nothing
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
            found |= {one for one in lineage if isinstance(one, str)} if isinstance(lineage, list) else set()
    return found


def _of_config(folder: Folder, name: str) -> set[str]:
    config = folder.json(name)
    return _hub(config.get("_name_or_path")) if isinstance(config, dict) else set()


def _of_card(folder: Folder, name: str) -> set[str]:
    """`base_model` of the front matter: one name or several."""
    match = FRONT_MATTER.match(folder.bytes(name, CARD_LIMIT))
    try:
        matter: Any = yaml.safe_load(match[1].decode("utf-8", "replace")) if match else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return set()
    base = matter.get("base_model") if isinstance(matter, dict) else None
    names = base if isinstance(base, list) else [base]
    return {one for name in names for one in _hub(name)}


def _hub(name: Any) -> set[str]:
    return {f"hf://{name}"} if isinstance(name, str) and HUB_NAME.match(name) else set()
