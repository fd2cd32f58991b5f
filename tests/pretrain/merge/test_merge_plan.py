"""The key of a merge: each ingredient of the output changes it, what the output does not depend on does not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.merge import open_weights, plan
from pretrain.merge.merge_plan import OutputFile, Plan, TensorJob, Term
from pretrain.merge.planning.request import Rule
from pretrain.merge.vocabulary.remapped_source import RowMap
from tests.support.ingredients import assert_distinct, assert_each_changes
from tests.support.merge_inputs import floats, write

TERM = Term(0, "w", 0.25, 0.5)
TERMS = (TERM, Term(1, "w", 0.75))
JOB = TensorJob("w", "F32", (4, 6), "ties", TERMS, Term(2, "w"), (("lambda", 1.0),), "mixed", 0, 80)
FILES = (OutputFile("model.safetensors", b"head", 100),)
BASE: dict[str, Any] = {
    "jobs": (JOB, dataclasses.replace(JOB, name="v")),
    "files": FILES,
    "left_out": ("x", "yz"),
    "companions": {"config.json": b"{}", "tokenizer.json": b"[]"},
    "rows_digests": ("", "00"),
    "frozen": None,
    "hashes": [{"model.safetensors": "5-aa"}, {"model.safetensors": "5-bb"}],
}


def made(**changes: Any) -> Plan:
    fields = {key: value for key, value in BASE.items() if key != "hashes"} | {
        "addresses": ("a", "b", "c"), "inputs": 2, "method": "ties", "weights": (0.25, 0.75), "request": {},
        "index": None, "tied": {}, "stage_dir": None,
    }  # fmt: skip
    return Plan(**fields | changes)


def key(hashes: list[dict[str, str]], **fields: Any) -> str:
    return made(**fields).key(hashes)


def jobs(**changes: Any) -> tuple[TensorJob, ...]:
    return (dataclasses.replace(JOB, **changes), BASE["jobs"][1])


def terms(**changes: Any) -> tuple[TensorJob, ...]:
    return jobs(terms=(dataclasses.replace(TERM, **changes), TERMS[1]))


def test_every_ingredient_of_an_output_changes_its_key() -> None:
    near = float(np.nextafter(0.25, 1))  # the last bit of a weight
    others: list[tuple[str, Any]] = [
        *(("jobs", jobs(**{name: value})) for name, value in {
            "name": "u", "dtype": "BF16", "shape": (6, 4), "method": "dare_ties", "base": None, "file": 1,
            "options": (("lambda", 1.5),),
        }.items()),
        ("jobs", jobs(base=Term(2, "u"))), ("jobs", jobs(base=Term(1, "w"))), ("jobs", jobs(options=(("t", 1.0),))),
        ("jobs", jobs(options=())), ("jobs", jobs(options=(("lambda", 1.0), ("seed", 3)))),
        ("jobs", jobs(terms=TERMS[::-1])), ("jobs", jobs(terms=TERMS[:1])),
        ("jobs", terms(source=1)), ("jobs", terms(name="u")), ("jobs", terms(weight=near)),
        ("jobs", terms(density=near)),
        ("jobs", terms(weight=0.5, density=0.25)), ("jobs", BASE["jobs"][::-1]), ("jobs", BASE["jobs"][:1]),
        ("files", (OutputFile("other.safetensors", b"head", 100),)), ("files", FILES * 2),
        ("left_out", ("x",)), ("left_out", ("xy", "z")), ("left_out", ()),
        ("companions", {"config.json": b"{ }", "tokenizer.json": b"[]"}),
        ("companions", {"config.json": b"[]", "tokenizer.json": b"{}"}),
        ("companions", {"config.json": b"{}"}), ("companions", {"config.json": b"{}", "other.json": b"[]"}),
        ("rows_digests", ("00", "")), ("rows_digests", ("", "01")), ("rows_digests", ()),
        ("frozen", Path("frozen.safetensors")),
        ("hashes", [{"model.safetensors": "5-ab"}, {"model.safetensors": "5-bb"}]),
        ("hashes", BASE["hashes"][::-1]), ("hashes", BASE["hashes"][:1]),
        ("hashes", [{"a.safetensors": "5-aa"}, {"model.safetensors": "5-bb"}]),
    ]  # fmt: skip
    assert_each_changes(key, BASE, others)


def test_a_companion_is_its_content_not_its_path(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes(b"{}")
    keys = [
        key(BASE["hashes"], companions={"config.json": content, "tokenizer.json": b"[]"})
        for content in (b"{}", tmp_path / "a" / "config.json", tmp_path / "b" / "config.json")
    ]
    assert set(keys) == {key(BASE["hashes"])}
    (tmp_path / "b" / "config.json").write_bytes(b"{ }")
    changed = made(companions={"config.json": tmp_path / "b" / "config.json", "tokenizer.json": b"[]"})
    assert changed.key(BASE["hashes"]) != keys[0]


def test_addresses_and_notes_are_not_part_of_a_key() -> None:
    same = made(addresses=("x/a", "y/b", "c"), notes=("a note",), frozen=None)
    assert same.key(BASE["hashes"]) == key(BASE["hashes"])
    shared = [made(frozen=Path(f"{folder}/frozen.safetensors")).key(BASE["hashes"]) for folder in "ab"]
    assert shared[0] == shared[1]


OPTIONS: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.25},
    "the last bit of beta": {"beta": float(np.nextafter(0.5, 1))},
    "weights": {"weights": [3, 1]},
    "dtype": {"beta": 0.5, "dtype": "bf16"},
    "only": {"beta": 0.5, "only": "w", "copy_rest": "A"},
    "copy_rest": {"beta": 0.5, "only": "w", "copy_rest": "B"},
    "exclude": {"beta": 0.5, "exclude": "w", "copy_rest": "B"},
    "max_shard_size": {"beta": 0.5, "max_shard_size": 600},
    "a rule": {"beta": 0.5, "rules": [Rule("h", weights=(0.25, 0.75))]},
    "a rule of another pattern": {"beta": 0.5, "rules": [Rule("w", weights=(0.25, 0.75))]},
    "slerp": {"method": "slerp", "beta": 0.5},
    "ties": {"method": "ties", "weights": [1, 1], "base": "c", "density": [0.5, 0.5]},
    "densities": {"method": "ties", "weights": [1, 1], "base": "c", "density": [0.5, 0.25]},
    "densities swapped": {"method": "ties", "weights": [1, 1], "base": "c", "density": [0.25, 0.5]},
    "base": {"method": "ties", "weights": [1, 1], "base": "d", "density": [0.5, 0.5]},
    "lambda": {"method": "ties", "weights": [1, 1], "base": "c", "density": [0.5, 0.5], "scale": 0.5},
    "normalize": {"method": "ties", "weights": [1, 1], "base": "c", "density": [0.5, 0.5], "normalize": False},
    "dare": {"method": "dare_linear", "weights": [1, 1], "base": "c", "density": [0.5, 0.5]},
    "seed": {"method": "dare_linear", "weights": [1, 1], "base": "c", "density": [0.5, 0.5], "seed": 1},
    "rescale": {"method": "dare_linear", "weights": [1, 1], "base": "c", "density": [0.5, 0.5], "rescale": False},
}  # fmt: skip


def asked(folder: Path, **options: Any) -> str:
    """Key of a merge of the models `a` and `b` in a folder."""
    if "base" in options:
        options["base"] = str(folder / options["base"])
    addresses = [str(folder / "a"), str(folder / "b")]
    made = plan(addresses, **options)
    return made.key([open_weights(address).hashes() for address in made.addresses])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate("abcd"):
        write(tmp_path / "models" / name, {"w": floats(seed, 50, 3), "h": floats(seed, 7)})
    return tmp_path / "models"


def test_every_option_and_every_input_changes_the_key_of_a_merge(models: Path, tmp_path: Path) -> None:
    keys = {"beta 0.5": asked(models, beta=0.5)}
    keys |= {name: asked(models, **options) for name, options in OPTIONS.items()}
    shutil.copytree(models, tmp_path / "elsewhere")
    assert asked(tmp_path / "elsewhere", beta=0.5) == keys["beta 0.5"]
    assert asked(models, weights=[2, 2]) == keys["beta 0.5"]
    for name in ("a", "b"):
        changed = shutil.copytree(models, tmp_path / name)
        raw = bytearray((changed / name / "model.safetensors").read_bytes())
        raw[-1] ^= 1
        (changed / name / "model.safetensors").write_bytes(raw)
        keys[f"a bit of {name}"] = asked(changed, beta=0.5)
    swapped = shutil.copytree(models, tmp_path / "swapped")
    (swapped / "a").rename(swapped / "x")
    (swapped / "b").rename(swapped / "a")
    (swapped / "x").rename(swapped / "b")
    keys["inputs swapped"] = asked(swapped, beta=0.5)
    assert_distinct(keys.items())


def test_a_row_map_is_its_owners_its_rows_and_its_means() -> None:
    def digest(owner: list[int], row: list[int], means: dict[int, Any]) -> str:
        return RowMap.of(np.array(owner, np.int64), np.array(row, np.int64), means).digest

    base = {"owner": [0, 1, -1], "row": [2, 3, 0], "means": {2: ((0, 1), (1, 1))}}
    others = [
        ("owner", [1, 0, -1]), ("owner", [0, 0, -1]), ("row", [3, 2, 0]), ("row", [2, 3, 1]),
        ("means", {}), ("means", {2: ((0, 1), (1, 2))}), ("means", {2: ((1, 1), (0, 1))}),
        ("means", {1: ((0, 1), (1, 1))}),
        ("means", {2: ()}), ("means", {2: None}),
    ]  # fmt: skip
    assert_each_changes(digest, base, others)
    assert digest([0, 1], [2, 3], {}) != digest([0, 1, 2], [3, 0, 0], {}) != digest([0], [1], {})
