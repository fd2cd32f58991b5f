"""The demo's report: the numbers of the summary, the masks of training, generated captions, missing parts named."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.errors import UserError
from data_pipeline.hashing import Purpose, hash64
from launch.demo.pictures import caption_cards, masked_cards, sample_cards
from launch.demo.report import write
from pretrain.build.objective import build, load_trained
from pretrain.build.saved_stage import read_stage
from pretrain.build.streams import stage_specs
from pretrain.build.tokenizer import stage_tokenizer
from pretrain.objectives.device_batch import to_device
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.load import load_recipe
from tests.support import tiny
from tests.support.report_runs import (
    ParsedPage,
    check_self_contained,
    masked_rows,
    step_row,
    write_run,
    write_stage,
)

CLASSES = ["zero", "one", "two"]
# Invented numbers, not from a run.
SUMMARY: dict[str, Any] = {
    "flip": {
        "zero_shot_top1": 0.87654,
        "held_out": 311,
        "classes": CLASSES,
        "confusion": [[101, 2, 0], [0, 99, 7], [3, 0, 98]],
        "step_seconds": {"0": 1.11, "0.5": 0.77, "0.75": 0.44},
    },
    "sphinx": {
        "ln_vocabulary": 7.6246,
        "text_nll": {"before": 5.4321, "with_text": 5.3434, "without_text": 6.9876},
        "caption_nll": {
            "real": {"real": 1.2345, "synthetic": 4.3211},
            "mix": {"real": 1.5432, "synthetic": 1.6543},
        },
        "caption_nll_shuffled": {
            "real": {"real": 2.7654, "synthetic": 4.9},
            "mix": {"real": 2.8, "synthetic": 2.9},
        },
    },
    "merge": {
        "sweep": [
            {"beta": beta, "nll_real": 2 - beta + 0.0123, "nll_synthetic": 1 + beta**2, "nll_text": 5.3}
            for beta in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
    },
    "seconds": {"data": 11.5, "flip/masked": 64.25},
}
STAGE = {"kind": "train", "train": {"steps": 40}}
NLL = "perplexity/text/nll"


def untrained(run: Path, name: str, recipe: dict[str, Any]) -> None:
    """Write a finished stage with the initial weights."""
    from safetensors.torch import save_file

    run.mkdir(parents=True, exist_ok=True)
    loaded = load_recipe(tiny.write_recipe(run.parent / f"{run.name}-{name}.yaml", recipe))
    folder = run / name
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "resolved.yaml").write_text(dump_plain(stage_record(loaded, name)))
    objective = build(loaded.stages[name], name, 3, run).objective  # type: ignore[arg-type]
    save_file(dict(objective.model.state_dict()), folder / "weights" / "model.safetensors")
    (folder / "result.json").write_text(json.dumps({"step": 0, "eval": {}}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/{flip,sphinx}` on tiny data: handwritten metrics, initial weights."""
    base = tmp_path_factory.mktemp("demo")
    tiny.make_data(base)
    flip, sphinx = base / "runs" / "flip", base / "runs" / "sphinx"
    write_run(flip, {"masked": STAGE, "tuned": STAGE}, "flip")
    for name in ("masked", "tuned"):
        untrained(flip, name, tiny.flip_recipe(base) | {"stages": {"masked": {}, "tuned": {}}})
        write_stage(flip / name, masked_rows(40), {"zero_shot/digits/top1": 0.9})
    stages = dict.fromkeys(("lm", "real", "real_no_text", "synthetic"), STAGE)
    write_run(
        sphinx, stages | {"mix": {"kind": "merge", "inputs": {"real": 0.5, "synthetic": 0.5}}}, "sphinx"
    )
    recipe = tiny.sphinx_recipe(base)
    recipe["model"]["vision"]["init"] = "flip/tuned"
    held_out = {"path": str(base / "pairs"), "stream": "captions"}
    recipe["eval"] = {"perplexity": {"real": held_out, "synthetic": held_out}}
    untrained(sphinx, "real", recipe | {"stages": {"real": {}}})
    for name, slope in (("real", -0.001), ("real_no_text", 0.05)):
        rows = [step_row(step, {"captions": 3.0}, {"captions": 8}) for step in range(1, 41)]
        for row in rows[9::10]:
            row["eval"] = {NLL: 5.4321 + slope * row["step"]}
        write_stage(sphinx / name, rows, {NLL: rows[-1]["eval"][NLL]})
    return base / "runs"


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    out = write(root, SUMMARY)
    assert out == root / "report.html"
    return out.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside_and_is_small(page: str) -> None:
    check_self_contained(page)
    assert len(page) < 3_000_000


def test_the_numbers_are_those_of_the_summary(page: str) -> None:
    seen = ParsedPage(page)
    for expected in (
        "87.7%", "311 held-out digits", "5.43 → 6.99 nats", "it reaches 5.34", "+1.56 nats", "−0.09 nats",
        "ln V = 7.62", "before (lm): 5.43", "1.23 nats per token with the right image, 2.77 with another",
        "a step takes 0.44 s instead of 1.11 s", "0.77", "The demo took 1 min 16 s",
    ):  # fmt: skip
        assert expected in seen.text, expected
    assert seen.row("real", "real")[2:] == ["1.234", "2.765", "+1.531"]
    assert seen.row("mix", "synthetic")[2:] == ["1.654", "2.900", "+1.246"]
    for row in SUMMARY["merge"]["sweep"]:
        written = [f"{row[key]:.3f}" for key in ("nll_real", "nll_synthetic", "nll_text")]
        assert seen.row(f"{row['beta']:g}")[1:] == written
    assert seen.row("flip/masked", "64.2")[2] == "85%"
    # The least sum of both caption domains, found by hand: (2 - beta) + (1 + beta^2) at beta 0.5.
    assert "at β = 0.5, 1.51 nats on alt text and 1.25 on sentences" in seen.text.replace("\u00a0", " ")
    for true, row in zip(CLASSES, SUMMARY["flip"]["confusion"], strict=True):
        assert [cell.strip() for cell in seen.row(true)[1:]] == [str(count or "·") for count in row]
    assert json.loads(page_json(page)) == SUMMARY


def page_json(page: str) -> str:
    """Return the text of the collapsible summary.json."""
    import html

    return html.unescape(page.split("<summary>summary.json</summary>")[1].split(">", 1)[1].split("</pre>")[0])


def test_every_section_is_on_the_page(page: str) -> None:
    text = ParsedPage(page).text
    for expected in (
        "lower bound of the loss (repeated captions)", "Zero-shot accuracy", "Confusion", "with text (real)",
        "without text (real_no_text)", "alt text captions (real)", "sentence captions (synthetic)", "patches masked",
        "Throughput", "none were replaced", "true (real)", "nats per token",
    ):  # fmt: skip
        assert expected in text, expected


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))).transpose(2, 0, 1)


def test_the_masks_are_those_of_the_training(root: Path) -> None:
    """Compare with whole batches and the masking rule in numpy: of 16 patches, keep the 8 with the lowest noise."""
    masked = masked_cards(root / "flip" / "masked", count=3)
    assert (masked.kept, masked.patches, masked.ratio) == (8, 16, 0.5)
    _, stage = read_stage(root / "flip" / "masked")
    batch = BatchBuilder(stage_specs(stage, 3, "masked", ("pairs",))[0]).make(0, 0, 8)
    assert len(masked.cards) == 3
    for row, card in enumerate(masked.cards):
        served, seen = (decoded(picture.source) for picture in card.pictures)
        np.testing.assert_array_equal(served, batch.images[row])  # type: ignore[index]
        noise = hash64(batch.row_keys[row], int(Purpose.IMAGE_MASK), np.arange(16))
        kept = set(np.argsort(noise.view(np.int64), kind="stable")[:8].tolist())
        for patch in range(16):
            y, x = patch // 4 * 4, patch % 4 * 4
            hole = seen[:, y : y + 4, x : x + 4]
            assert (hole[3] == (255 if patch in kept else 0)).all()
            if patch in kept:
                np.testing.assert_array_equal(hole[:3], served[:, y : y + 4, x : x + 4])
        assert card.lines[0][1].startswith("a ")


def test_samples_are_shown_with_their_own_captions(root: Path) -> None:
    (cards,) = sample_cards(root / "flip" / "masked", rows=4).values()
    for number, card in enumerate(cards):
        colour = list(tiny.COLOURS)[number]
        assert card.lines == [("", f"a {colour} square number {number}")]
        expected = np.asarray(Image.open(io.BytesIO(tiny.picture(colour, number)))).transpose(2, 0, 1)
        # Two JPEG decoders may differ by a level or two.
        assert np.abs(decoded(card.pictures[0].source).astype(int) - expected).max() <= 3


def test_captions_are_the_most_likely_token_at_every_step(root: Path) -> None:
    cards, missing = caption_cards(root / "sphinx", ("real", "mix"), count=2)
    assert len(cards) == 4
    (line,) = missing
    assert line.startswith("No captions by mix: ")
    objective, stage = load_trained(str(root / "sphinx" / "real"))
    tokenizer = stage_tokenizer(stage)
    spec = {spec.name: spec for spec in stage_specs(stage, 3, "real", objective.streams)}["captions"]
    rows = to_device(BatchBuilder(spec).make(0, 0, 1), stage.data["captions"].image, torch.device("cpu"))
    image = decoded(cards[0].pictures[0].source)
    settings = stage.data["captions"].image
    assert settings is not None
    mean, std = (np.array(values)[:, None, None] for values in (settings.mean, settings.std))
    assert rows.images is not None
    rows.images[0] = torch.from_numpy((image / 255 - mean) / std).float()
    # Brute force over the vocabulary: the summed loss of the start token, the caption so far, and one more token.
    generated: list[int] = []
    while len(generated) < 5:
        tokens = torch.tensor(
            [[tokenizer.start_id, *generated, token] for token in range(tokenizer.vocab_size)]
        )
        images = rows.images.expand(len(tokens), -1, -1, -1)
        with torch.no_grad():
            nll = objective.model(tokens, torch.full((len(tokens),), tokens.shape[1]), images)
        generated.append(int(nll.argmin()))
        if generated[-1] == tokenizer.end_id:
            break
    # Five tokens may end inside a multi-byte character.
    expected = tokenizer.decode([token for token in generated if token != tokenizer.end_id]).rstrip("\ufffd")
    assert expected
    assert cards[0].lines[1][0] == "real"
    assert cards[0].lines[1][1].startswith(expected)
    assert cards[0].lines[0] == ("true (real)", "a red square number 0")


def test_the_summary_is_read_from_its_file(root: Path, page: str) -> None:
    (root / "summary.json").write_text(json.dumps(SUMMARY))
    assert write(root).read_text(encoding="utf-8") == page
    (root / "summary.json").unlink()
    with pytest.raises(UserError, match=r"summary\.json"):
        write(root)


def test_missing_parts_are_named_and_do_not_stop_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "sphinx", {"lm": STAGE}, "sphinx")
    seen = check_self_contained(write(tmp_path, {}).read_text(encoding="utf-8"))
    for line in (
        "Samples cannot be shown", "Masks cannot be shown", "Stage masked of flip has not run",
        "no zero-shot accuracy", "no confusion", "no step times", "no text_nll.without_text",
        "Stage real_no_text has no evaluation of text", "no caption_nll", "no merge.sweep", "no seconds",
        "No captions by real",
    ):  # fmt: skip
        assert line in seen.text, line


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "no-demo"
    folder.mkdir()
    with pytest.raises(UserError, match="no-demo"):
        write(folder, SUMMARY)
    (folder / "flip").mkdir()
    with pytest.raises(UserError, match="no-demo/flip"):
        write(folder, SUMMARY)
    assert not (folder / "report.html").exists()


def test_a_hostile_caption_stays_text(tmp_path: Path) -> None:
    from data_pipeline.sources.tar import TarWriter

    tiny.make_data(tmp_path)
    hostile = "<script>alert(1)</script><img src=x>"
    with TarWriter(tmp_path / "hostile" / "00000.tar") as tar:
        for number in range(8):
            tar.write(f"{number:04d}", {"jpg": tiny.picture("red", number), "txt": hostile.encode()})
    recipe = tiny.flip_recipe(tmp_path) | {"stages": {"masked": {}}}
    recipe["data"]["pairs"]["sources"] = {"pairs": str(tmp_path / "hostile")}
    untrained(tmp_path / "runs" / "flip", "masked", recipe)
    page = write(tmp_path / "runs", SUMMARY | {"seconds": {hostile: 1.0}}).read_text(encoding="utf-8")
    seen = check_self_contained(page)
    assert "<script" not in page
    assert any(hostile in picture["alt"] for picture in seen.pictures)
    assert seen.text.count(hostile) > 5


def test_the_page_does_not_claim_forgetting_without_evidence(root: Path) -> None:
    """If the text loss did not rise, the page says that nothing was forgotten."""
    kept = {"before": 5.4, "with_text": 5.3, "without_text": 5.1}
    summary = SUMMARY | {"sphinx": SUMMARY["sphinx"] | {"text_nll": kept}}
    text = ParsedPage(write(root, summary).read_text(encoding="utf-8")).text
    assert "forgets nothing: 5.40 → 5.10" in text
    assert "−0.30 nats" in text
