"""The model card: its front matter as the hub reads it, the formula, the whole spec, and nothing that varies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.merge import merge
from tests.pretrain.merge.build import floats, write

CARD = "---\nlicense: {licence}\nbase_model: org/grandparent\n---\n# A model\n"


def model(folder: Path, seed: int, licence: str | None = "apache-2.0", hub: str | None = None) -> str:
    write(folder, {"w": floats(seed, 8, 2), "head": floats(seed + 9, 3)})
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | ({"_name_or_path": hub} if hub else {})))
    if licence:
        (folder / "README.md").write_text(CARD.format(licence=licence))
    return str(folder)


def matter(out: Path) -> dict[str, Any]:
    text = (out / "README.md").read_text()
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1])


def test_front_matter(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1, hub="org/real"), model(tmp_path / "b", 2)
    merge([a, b], tmp_path / "out", beta=0.3)
    assert matter(tmp_path / "out") == {
        "base_model": ["org/grandparent", "org/real"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["merge", "dromos"],
    }


def test_the_hubs_own_reader_takes_it(tmp_path: Path) -> None:
    cards = pytest.importorskip("huggingface_hub").ModelCard
    merge([model(tmp_path / "a", 1), model(tmp_path / "b", 2)], tmp_path / "out", beta=0.3)
    read = cards.load(tmp_path / "out/README.md")
    assert read.data.base_model == ["org/grandparent"]
    assert read.data.tags == ["merge", "dromos"]


@pytest.mark.parametrize(("mine", "theirs"), [("mit", "apache-2.0"), ("mit", None), (None, None)])
def test_no_licence_is_claimed_that_not_all_inputs_have(
    tmp_path: Path, mine: str | None, theirs: str | None
) -> None:
    merge([model(tmp_path / "a", 1, mine), model(tmp_path / "b", 2, theirs)], tmp_path / "out", beta=0.3)
    assert "license" not in matter(tmp_path / "out")


def test_a_front_matter_that_is_none_is_passed_over(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    (tmp_path / "a/README.md").write_bytes(b"---\n: [ \xff\n---\n")
    (tmp_path / "b/README.md").write_text("---\n- 1\n---\n")
    merge([a, b], tmp_path / "out", beta=0.3)
    assert "license" not in matter(tmp_path / "out")


def test_formula_inputs_spec_and_digests(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a|x", 1), model(tmp_path / "b", 2)
    record = merge([a, b], tmp_path / "out", beta=0.3, only="^w", copy_rest="B")
    text = (tmp_path / "out/README.md").read_text()
    assert "    theta = 0.3 x A + 0.7 x B\n" in text
    assert "1 tensors mixed, 1 copied" in text
    spec = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert spec == json.loads(json.dumps(record["asked"]))
    assert spec["inputs"] == [a, b]
    assert record["output"]["model.safetensors"]["digest"] in text
    for entry in record["inputs"]:
        assert all(digest in text for digest in entry["files"].values())
    row = next(line for line in text.splitlines() if line.startswith("| A |"))
    assert "a\\|x" in row
    assert "AutoModel.from_pretrained" in text


def test_the_same_merge_has_the_same_card(tmp_path: Path) -> None:
    inputs = [model(tmp_path / "a", 1), model(tmp_path / "b", 2)]
    for out in ("one", "two"):
        merge(inputs, tmp_path / out, method="slerp", t=0.25)
    one, two = ((tmp_path / out / "README.md").read_bytes() for out in ("one", "two"))
    assert one == two
    assert b"slerp" in one


def test_a_merge_of_merges_names_the_first_parents(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1, hub="org/real"), model(tmp_path / "b", 2, hub="org/synthetic")
    merge([a, b], tmp_path / "mix", beta=0.3)
    merge([str(tmp_path / "mix"), b], tmp_path / "again", beta=0.5)
    assert matter(tmp_path / "again")["base_model"] == ["org/grandparent", "org/real", "org/synthetic"]
    assert matter(tmp_path / "again")["license"] == "apache-2.0"


def test_without_a_config_it_says_how_to_read_the_file(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, {"w": floats(i, 3)}) for i, name in enumerate("ab"))
    merge([str(a), str(b)], tmp_path / "out", beta=0.3)
    assert 'load_file("PATH/model.safetensors")' in (tmp_path / "out/README.md").read_text()
    assert matter(tmp_path / "out") == {"tags": ["merge", "dromos"]}
