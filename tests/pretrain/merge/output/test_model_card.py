"""The model card: front matter as the hub reads it, formula, whole spec, and no content that varies between runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.base import group
from launch.cli.merging import merge as merge_cli
from pretrain.merge import Rule, merge
from tests.support.merge_inputs import floats, write

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


def test_an_invalid_front_matter_is_ignored(tmp_path: Path) -> None:
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
    assert "transformers.LlamaForCausalLM.from_pretrained" in text


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


def card(out: Path) -> str:
    return (out / "README.md").read_text()


def specs(out: Path) -> str:
    match = re.search(r"```yaml\n(.*?)```", card(out), re.DOTALL)
    assert match is not None
    return match[1]


def test_a_mergekit_file_stands_in_the_card_as_it_is_and_makes_the_same_again(tmp_path: Path) -> None:
    base, a, b = (model(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b")))
    file = {
        "models": [
            {"model": base},
            {"model": a, "parameters": {"weight": 0.5, "density": 0.5}},
            {"model": b, "parameters": {"weight": [0.2, 0.8], "density": 1.0}},
        ],
        "merge_method": "dare_ties",
        "base_model": base,
    }
    (tmp_path / "mk.yml").write_text(yaml.safe_dump(file))
    app = group("test")
    merge_cli.register(app)
    app.command(name="other")(lambda: None)
    for spec, out in (("mk.yml", "one"), ("again.yml", "two")):
        words = ["merge", "--spec", str(tmp_path / spec), "--seed", "3", "--max-shard-size", "1MB"]
        words += ["--out", str(tmp_path / out)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        (tmp_path / "again.yml").write_text(specs(tmp_path / out))
    assert yaml.safe_load(specs(tmp_path / "one")) == file
    assert "`dromos merge --spec FILE --seed 3 --max-shard-size 1000000 --out DIR`" in card(tmp_path / "one")
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    weights = {row.split("|")[1].strip(): row.split("|")[3].strip() for row in card(tmp_path / "one").splitlines()
               if row.startswith(("| A", "| B", "| C"))}  # fmt: skip
    assert (weights["A"], weights["B"]) == ("base", "0.5")


def test_a_spec_with_a_fence_of_its_own_stays_within_its_fence(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    asked = {"rules": [Rule("head|```\\n# Mine", weights=(1.0, 0.0))]}
    merge([a, b], tmp_path / "out", beta=0.4, **asked)
    opening, inner = re.search(r"(?m)^(`+)yaml\n(.*?)^\1$", card(tmp_path / "out"), re.DOTALL).groups()  # type: ignore[union-attr]
    assert len(opening) > 3
    assert yaml.safe_load(inner)["rules"][0]["match"] == asked["rules"][0].match


def test_weights_by_rule_are_said_beside_the_merge_s_own(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    merge([a, b], tmp_path / "out", beta=0.4, rules=[Rule("head", weights=(1.0, 0.0))])
    assert "| 0.4, 0.4 to 1 by rule |" in card(tmp_path / "out")
    assert "| 0.6, 0 to 0.6 by rule |" in card(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_code_names_the_class_and_the_tokenizer_that_are_there(tmp_path: Path, tokenizer: bool) -> None:
    inputs = [model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for folder in inputs if tokenizer else ():
        (Path(folder) / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {}}}')
    merge(inputs, tmp_path / "out", beta=0.3)
    assert 'model = transformers.LlamaForCausalLM.from_pretrained("PATH")' in card(tmp_path / "out")
    assert ("AutoTokenizer" in card(tmp_path / "out")) is tokenizer


@pytest.mark.parametrize("classes", [3, [None], [True], [{}], ["no name"]])
def test_a_class_that_is_none_does_not_end_a_merge_at_its_last_step(tmp_path: Path, classes: Any) -> None:
    inputs = [model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    config = {"model_type": "llama", "architectures": classes}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    merge(inputs, tmp_path / "out", beta=0.3)
    assert 'model = transformers.AutoModel.from_pretrained("PATH")' in card(tmp_path / "out")


def test_bare_weights_of_open_clip_load_there(tmp_path: Path) -> None:
    names = ("logit_scale", "visual.proj", "text_projection")
    for seed, name in enumerate("ab"):
        write(tmp_path / name, {key: floats(seed, 2, 2) for key in names})
    merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", beta=0.3)
    assert 'open_clip.create_model_and_transforms("ARCHITECTURE", pretrained="PATH/model.saf' in card(
        tmp_path / "out"
    )


def test_whoever_gives_the_config_alone_is_named_for_that(tmp_path: Path) -> None:
    bare = [
        str(write(tmp_path / name, {"w": floats(i, 8, 2), "head": floats(i, 3)}))
        for i, name in enumerate("ab")
    ]
    merge(bare, tmp_path / "out", beta=0.3, copy_rest=model(tmp_path / "whole", 3))
    (row,) = (line for line in card(tmp_path / "out").splitlines() if line.startswith("| C |"))
    assert "| config only |" in row
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    merge(bare, tmp_path / "one", weights=(1.0, 0.0))
    (row,) = (line for line in card(tmp_path / "one").splitlines() if line.startswith("| B |"))
    assert "| 0 (not read) |" in row
