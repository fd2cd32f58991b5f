"""Vocabularies in plans: refused only if embeddings are mixed; aligned by a spec or mergekit's tokenizer_source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge import merge, open_weights, plan
from pretrain.merge.execute import execute
from pretrain.merge.mergekit.plan import open_mergekit, plan_mergekit
from pretrain.merge.mergekit.yaml_file import parse
from pretrain.merge.output.record import sealed
from pretrain.merge.planning.request import Rule
from pretrain.merge.spec import replan
from pretrain.merge.verify.check_output import verify
from tests.pretrain.merge.vocabulary.test_align import bpe, joined, model, read_config, word_level
from tests.support.merge_inputs import floats, write

A, B = ["<s>", "x", "y"], ["<s>", "y", "z", "w"]
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [
        str(model(tmp_path / n, word_level(w), len(w), i)) for i, (n, w) in enumerate([("a", A), ("b", B)])
    ]


def mergekit(inputs: list[str], **more: Any) -> Any:
    models = [{"model": path, "parameters": {"weight": 0.5}} for path in inputs]
    return parse("m.yml", {"merge_method": "linear", "models": models} | more)


def test_mixed_embeddings_of_other_vocabularies_are_refused(pair: list[str]) -> None:
    with pytest.raises(UserError, match="the vocabularies differ"):
        plan(pair, beta=0.5)
    assert plan(pair, beta=0.5, only="norm", copy_rest="B").jobs
    assert plan(pair, beta=0.5, exclude="embed|lm_head", copy_rest="A").jobs


def test_union_by_a_spec_and_by_mergekit_s_key(pair: list[str], tmp_path: Path) -> None:
    merge(pair, tmp_path / "ours", beta=0.5, vocabulary="union")
    file = mergekit(pair, tokenizer_source="union")
    opened = open_mergekit(file)
    made = plan_mergekit(file, opened, 10**9)
    execute([made], opened, [tmp_path / "theirs"])
    assert replan(made.request)[0] == made
    rows = ["<s>", "x", "y", "z", "w"]
    a, b = (open_weights(path).array(EMBED).astype(np.float64) for path in pair)
    want = [
        0.5 * (a[A.index(t)] if t in A else b[B.index(t)])
        + 0.5 * (b[B.index(t)] if t in B else a[A.index(t)])
        for t in rows
    ]
    for folder in ("ours", "theirs"):
        got = open_weights(str(tmp_path / folder)).array(EMBED)
        np.testing.assert_array_equal(got, np.array(want).astype(np.float32))


def test_only_the_config_that_the_output_has_must_fit(tmp_path: Path) -> None:
    inputs = [
        str(model(tmp_path / n, word_level(w), len(w), i)) for i, (n, w) in enumerate([("a", A), ("b", B)])
    ]
    config = Path(inputs[1]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": B.index("w")}))
    merge(inputs, tmp_path / "out", beta=0.5, vocabulary="intersect")
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert made["vocab_size"] == 2  # <s>, y
    assert made["eos_token_id"] == 0
    with pytest.raises(UserError, match=r"needs the token 'w'.*the output needs the config of .*b$"):
        plan(inputs, beta=0.5, vocabulary="intersect", only="embed|lm_head", copy_rest="B")


def test_mergekit_without_a_tokenizer_source_goes_by_row_and_says_so(tmp_path: Path) -> None:
    words = [["<s>", "x", "y"], ["<s>", "y", "x"]]
    inputs = [str(model(tmp_path / str(i), word_level(w), 3, i)) for i, w in enumerate(words)]
    made = plan_mergekit(file := mergekit(inputs), open_mergekit(file), 10**9)
    (note,) = (note for note in made.notes if "merges rows by index" in note)
    assert "--vocabulary" not in note  # which a mergekit file does not know
    assert "tokenizer_source: base (or union)" in note
    opened = open_mergekit(mergekit(inputs, tokenizer_source="base"))
    second = open_weights(inputs[1]).array("lm_head.weight")
    np.testing.assert_array_equal(opened.sources[1].array("lm_head.weight"), second[[0, 2, 1]])


def test_mergekit_s_base_tokenizer_where_all_are_the_same(tmp_path: Path) -> None:
    inputs = [str(model(tmp_path / str(i), word_level(A), 3, i)) for i in range(2)]
    file = mergekit(inputs, tokenizer_source="base")
    assert plan_mergekit(file, open_mergekit(file), 10**9).notes == ()


def test_models_of_other_kinds_are_told_apart_by_their_tensors(pair: list[str], tmp_path: Path) -> None:
    clip = {"token_embedding.weight": floats(1, 9, 8), "visual.proj": floats(2, 4, 4)}
    with pytest.raises(UserError) as caught:
        plan([pair[0], str(write(tmp_path / "clip", clip))], beta=0.5)
    told = str(caught.value)
    assert "vocabular" not in told
    assert all(f"{name}: only in" in told for name in (EMBED, *clip))


@pytest.mark.parametrize("full", [False, True])
def test_what_is_left_of_the_inputs_of_a_union_is_not_said_to_have_changed(
    pair: list[str], tmp_path: Path, full: bool
) -> None:
    """B takes the rows of A's additional tokens from A, so B cannot be recomputed without A."""
    out = tmp_path / "out"
    merge(pair, out, beta=0.5, vocabulary="union", rules=[Rule("lm_head", copy_from="B")])
    whole = verify(out, full=full)
    assert not whole.wrong
    assert whole.recomputed >= 3
    shutil.rmtree(pair[0])
    report = verify(out, full=full)
    assert [state for _, state in report.inputs] == ["gone", "unchanged"]
    assert not report.wrong, report.lines()


def test_a_union_that_cannot_be_planned_again_is_checked_as_far_as_it_can(
    pair: list[str], tmp_path: Path
) -> None:
    """The record has the paths of the inputs; the requested names are only valid inside their run."""
    record = merge(pair, tmp_path / "out", beta=0.5, vocabulary="union")
    record["asked"]["inputs"] = ["real", "synthetic"]
    (tmp_path / "out/merge.json").write_text(json.dumps(sealed(record)))
    report = verify(tmp_path / "out")
    assert [state for _, state in report.inputs] == ["unchanged", "unchanged"]
    assert not report.wrong, report.lines()


def test_rows_from_elsewhere_are_another_plan(pair: list[str], tmp_path: Path) -> None:
    """Equal shapes, names and tokenizer: a finished or partial output with other rows is not reused."""
    zero = {"source": {"kind": "zero"}, "force": True}
    asked: list[Any] = [{"source": "base"}, {"source": "base", "tokens": {"y": zero}}]
    made = []
    for tokenizer in asked:
        file = mergekit(pair, base_model=pair[0], tokenizer=tokenizer)
        opened = open_mergekit(file)
        made.append((plan_mergekit(file, opened, 10**9), opened))
    hashes = [[source.hashes() for source in opened.sources] for _, opened in made]
    assert hashes[0] == hashes[1]
    assert made[0][0].key(hashes[0]) != made[1][0].key(hashes[1])
    assert made[0][0].key(hashes[0]) == replan(made[0][0].request)[0].key(hashes[0])
    execute([made[0][0]], made[0][1], [tmp_path / "out"])
    with pytest.raises(UserError, match="out has another merge with mergekit"):
        execute([made[1][0]], made[1][1], [tmp_path / "out"])


def test_rows_that_do_not_fit_are_told_with_mergekit_s_key(pair: list[str]) -> None:
    file = mergekit(pair)
    with pytest.raises(UserError) as caught:
        plan_mergekit(file, open_mergekit(file), 10**9)
    for name in (EMBED, "lm_head.weight"):
        assert f"{name}: shapes [3, 6], [4, 6]; set tokenizer_source: base (or union)" in str(caught.value)


def test_models_of_several_vocabularies_are_merged_row_by_row(tmp_path: Path) -> None:
    """Two vocabularies as in InstructBLIP: one of the language model, one of the Q-Former."""
    names = {"language_model.model.embed_tokens.weight": 9, "qformer.embeddings.word_embeddings.weight": 5}
    inputs = []
    for seed in range(2):
        tensors = {name: floats(10 * seed + rows, rows, 4) for name, rows in names.items()}
        inputs.append(str(write(tmp_path / str(seed), tensors)))
    merge(inputs, tmp_path / "out", beta=0.5)
    for name in names:
        one, two, got = (open_weights(path).array(name) for path in (*inputs, str(tmp_path / "out")))
        np.testing.assert_array_equal(got, ((one.astype(np.float64) + two) / 2).astype(np.float32))
    with pytest.raises(UserError, match=r"have different numbers of rows .* no single vocabulary"):
        plan(inputs, beta=0.5, vocabulary="pad")


def test_tokens_of_the_base_that_have_no_row_are_stripped(tmp_path: Path) -> None:
    """As in many fine-tuned Llama models, <pad> has an id but no row."""
    tokens = bpe([("a", "b")], ["<s>", "<pad>"])
    rows = tokens.get_vocab_size() - 1
    inputs = [str(model(tmp_path / name, tokens, rows, seed)) for seed, name in enumerate(("base", "other"))]
    source = open_mergekit(mergekit(inputs, base_model=inputs[0], tokenizer_source="base")).sources[1]
    np.testing.assert_array_equal(source.array(EMBED), open_weights(inputs[1]).array(EMBED))
    assert set(tokens.get_vocab()) - set(joined(source).get_vocab()) == {"<pad>"}
    assert read_config(source)["vocab_size"] == rows
    listed = read_config(source, "tokenizer_config.json")["added_tokens_decoder"]
    assert isinstance(listed, dict)
    assert [one["content"] for one in listed.values()] == ["<s>"]


def test_a_token_with_a_number_far_beyond_all_rows_is_refused(pair: list[str], tmp_path: Path) -> None:
    other = model(tmp_path / "c", word_level(A), 3, seed=5)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 2**30
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="a token has the id 1,073,741,824, beyond its 4 rows"):
        open_mergekit(mergekit(pair, tokenizer_source=str(other)))
