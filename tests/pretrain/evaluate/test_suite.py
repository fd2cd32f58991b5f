"""Held-out metrics against brute force with tarfile and PIL, one sample at a time, for several batches and ranks."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Picture
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.sources.tar import TarWriter
from pretrain.build.objective import load_trained
from pretrain.build.tokenizer import stage_tokenizer
from pretrain.distributed.engine import Runtime
from pretrain.evaluate.held_out import shuffled_images
from pretrain.evaluate.measure import Context
from pretrain.evaluate.suite import EVALUATIONS, SINGLE_PROCESS, evaluate, flat_scalars
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import Evaluation, Perplexity, ZeroShot
from tests.support import tiny

CLASSES = {"red": "crimson", "green": "grassy", "blue": "navy blue", "white": "snow white"}
TEMPLATES = ["a {} square", "{} square number 7", "{}"]
BAD = (4, 20, 21)  # samples whose image cannot be decoded
SAMPLES = 27


@dataclass(frozen=True)
class Sample:
    """One usable sample as tarfile and PIL read it."""

    number: int
    pixels: np.ndarray
    """uint8 `[size, size, 3]`"""
    caption: str
    label: str


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 captioned images in two shards, three of them broken."""
    folder = tmp_path_factory.mktemp("held_out")
    generator = np.random.default_rng(0)
    for shard, numbers in enumerate((range(16), range(16, SAMPLES))):
        with TarWriter(folder / f"{shard:05d}.tar") as tar:
            for number in numbers:
                out = io.BytesIO()
                noise = generator.integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
                Picture.fromarray(noise).save(out, "PNG")
                members = {
                    "png": b"no image" if number in BAD else out.getvalue(),
                    "txt": f"a {list(tiny.COLOURS)[number % 4]} square {'very ' * (number % 5)}wide".encode(),
                    "json": json.dumps({"label": list(CLASSES)[(number + number // 5) % 4]}).encode(),
                }
                tar.write(f"{number:09d}", members)
    return folder


def samples(folder: Path) -> Iterator[Sample]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for key, members in found.items():
            if int(key) in BAD:
                continue
            pixels = np.asarray(Picture.open(io.BytesIO(members["png"])))
            yield Sample(int(key), pixels, members["txt"].decode(), json.loads(members["json"])["label"])


def normalised(sample: Sample, stage: TrainStage, stream: str) -> Tensor:
    """`[1, 3, size, size]`"""
    image = stage.data[stream].image
    assert image is not None
    pixels = (sample.pixels / 255.0 - np.array(image.mean)) / np.array(image.std)
    return torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]


def rank(number: int, world: int) -> Runtime:
    return Runtime(rank=number, world_size=world, local_rank=number, device=torch.device("cpu"))


def result_of(
    name: str, trained: tuple[Any, TrainStage], task: Any, batch: int, runtime: Runtime = SINGLE_PROCESS
) -> Any:
    objective, stage = trained
    context = Context(objective.predict, objective.model, stage, stage_tokenizer(stage), runtime, batch)
    return EVALUATIONS[name].run(context, task)


@pytest.fixture(scope="module")
def flip(tiny_runs: Path) -> tuple[Any, TrainStage]:
    return load_trained(str(tiny_runs / "runs" / "flip" / "main"))


@pytest.fixture(scope="module")
def sphinx(tiny_runs: Path) -> tuple[Any, TrainStage]:
    return load_trained(str(tiny_runs / "runs" / "sphinx" / "main"))


def confusion_by_hand(objective: Any, stage: TrainStage, folder: Path) -> np.ndarray:
    """Confusion counts in numpy: each image alone against the mean prompt feature of each class."""
    tokenizer = stage_tokenizer(stage)
    means = []
    with torch.no_grad():
        for name in CLASSES.values():
            features = []
            for template in TEMPLATES:
                ids = [tokenizer.start_id, *tokenizer.encode(template.replace("{}", name)), tokenizer.end_id]
                row = ids + [tokenizer.pad_id] * (tiny.LENGTH - len(ids))
                assert len(row) == tiny.LENGTH
                feature = objective.model.encode_text(torch.tensor([row]))[0].double().numpy()
                features.append(feature / np.linalg.norm(feature))
            mean = np.mean(features, axis=0)
            means.append(mean / np.linalg.norm(mean))
        counts = np.zeros((len(CLASSES), len(CLASSES)), int)
        for sample in samples(folder):
            feature = objective.model.encode_image(normalised(sample, stage, "pairs"))[0].double().numpy()
            scores = np.array(means) @ (feature / np.linalg.norm(feature))
            assert np.diff(np.sort(scores))[-1] > 1e-6  # no tie that rounding could decide
            counts[list(CLASSES).index(sample.label), int(scores.argmax())] += 1
    return counts


@pytest.mark.parametrize("batch", [1, 10, 27, 64])
def test_zero_shot_is_the_brute_force_count(
    flip: tuple[Any, TrainStage], held_out: Path, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    objective, stage = flip
    task = ZeroShot(path=str(held_out), classes=CLASSES, templates=TEMPLATES)
    found = result_of("zero_shot", flip, task, batch)
    expected = confusion_by_hand(objective, stage, held_out)
    assert found["confusion"] == expected.tolist()
    assert found["samples"] == SAMPLES - len(BAD) == expected.sum()
    assert found["top1"] == pytest.approx(expected.trace() / expected.sum())
    assert found["classes"] == list(CLASSES.values())
    assert "3 unusable samples" in capsys.readouterr().out


def test_slices_of_ranks_add_up(flip: tuple[Any, TrainStage], held_out: Path) -> None:
    """Without a process group every rank returns its own part; the parts add up to the whole."""
    objective, stage = flip
    task = ZeroShot(path=str(held_out), classes=CLASSES, templates=TEMPLATES)
    parts = [result_of("zero_shot", flip, task, 10, rank(number, 2))["confusion"] for number in range(2)]
    assert min(np.sum(part) for part in parts) > 0
    assert np.sum(parts, axis=0).tolist() == confusion_by_hand(objective, stage, held_out).tolist()


def test_a_label_outside_the_classes_is_named(flip: tuple[Any, TrainStage], held_out: Path) -> None:
    for task, label in (
        (ZeroShot(path=str(held_out), classes={"red": "red", "green": "green"}), "label='blue'"),
        (ZeroShot(path=str(held_out), classes=CLASSES, label="colour"), "colour='None'"),
    ):
        with pytest.raises(UserError) as found:
            result_of("zero_shot", flip, task, 8)
        assert label in str(found.value)
        assert str(held_out) in str(found.value)
        assert "sample 00000000" in str(found.value)


def caption_nats(objective: Any, stage: TrainStage, sample: Sample, shown: Sample) -> tuple[float, int]:
    """Nats and tokens of one caption without padding, after the image of `shown`."""
    model, tokenizer = objective.model, stage_tokenizer(stage)
    middle = tokenizer.encode(sample.caption)[: tiny.LENGTH - 2]
    ids = torch.tensor([tokenizer.start_id, *middle, tokenizer.end_id])
    words = model.llm.get_input_embeddings()(ids)
    seen = model.connector[0](model.visual_tokens(normalised(shown, stage, "captions")))[0]
    row = torch.cat([words[:1], model.start_image[0], seen, model.end_image[0], words[1:]])
    logits = model.llm(inputs_embeds=row[None]).logits[0, -len(ids) : -1].double()
    return F.cross_entropy(logits, ids[1:], reduction="sum").item(), len(ids) - 1


def packed_nats(objective: Any, folder: Path) -> tuple[float, int]:
    """Nats and tokens of a packed source, sample by sample."""
    nats, tokens = 0.0, 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy"):
                    data = io.BytesIO(tar.extractfile(member).read())  # type: ignore[union-attr]
                    row = torch.from_numpy(np.load(data, allow_pickle=False).astype(np.int64))
                    logits = objective.model.llm(row[None]).logits[0, :-1].double()
                    nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
                    tokens += len(row) - 1
    return nats, tokens


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_caption_nll_is_the_brute_force_mean(
    sphinx: tuple[Any, TrainStage], held_out: Path, batch: int
) -> None:
    objective, stage = sphinx
    task = Perplexity(path=str(held_out), stream="captions")
    found = result_of("perplexity", sphinx, task, batch)
    with torch.no_grad():
        each = [caption_nats(objective, stage, sample, sample) for sample in samples(held_out)]
    assert len(each) == SAMPLES - len(BAD)
    assert len({tokens for _, tokens in each}) > 3  # captions of different lengths
    assert max(tokens for _, tokens in each) == tiny.LENGTH - 1  # and one that is cut
    assert found == pytest.approx(sum(n for n, _ in each) / sum(t for _, t in each), rel=1e-6)


def test_shuffled_images_belong_to_another_usable_sample(
    sphinx: tuple[Any, TrainStage], held_out: Path
) -> None:
    objective, stage = sphinx
    task = Perplexity(path=str(held_out), stream="captions")
    batch = 10
    usable = list(samples(held_out))
    nats, tokens = 0.0, 0
    for first in range(0, SAMPLES, batch):
        part = [sample for sample in usable if first <= sample.number < first + batch]
        assert len(part) > 1
        with torch.no_grad():
            each = [caption_nats(objective, stage, one, part[n - 1]) for n, one in enumerate(part)]
        nats, tokens = nats + sum(n for n, _ in each), tokens + sum(t for _, t in each)
    found = result_of("perplexity_shuffled", sphinx, task, batch)
    assert found == pytest.approx(nats / tokens, rel=1e-6)
    assert found != pytest.approx(result_of("perplexity", sphinx, task, batch), rel=1e-6)


def test_only_captions_of_images_get_other_images(sphinx: tuple[Any, TrainStage]) -> None:
    _, stage = sphinx
    tasks = {"packed": {"path": "x", "length": 9}, "text": {"path": "x", "stream": "text"}}
    tasks |= {
        "captions": {"path": "x", "stream": "captions"},
        "none": {"path": "x", "stream": "no_such_stream"},
    }
    evaluation = Evaluation.model_validate({"perplexity": tasks})
    assert set(EVALUATIONS["perplexity"].tasks(evaluation, stage)) == {"packed", "text", "captions"}
    assert set(EVALUATIONS["perplexity_shuffled"].tasks(evaluation, stage)) == {"captions"}


def test_no_usable_row_keeps_its_own_image() -> None:
    weights = torch.tensor([0.0, 1, 1, 0, 1, 0, 0])
    images = torch.arange(7.0)[:, None, None, None, None].expand(7, 1, 3, 2, 2)
    none = torch.zeros(7, dtype=torch.long)
    rows = DeviceBatch({"images": images}, weights, none, none, 2)
    shown = shuffled_images(rows).images
    assert shown is not None
    assert shown[weights > 0, 0, 0, 0].tolist() == [4, 1, 2]
    assert rows.fields["images"] is images


@pytest.mark.parametrize(("batch", "world"), [(8, 1), (20, 1), (8, 2), (20, 2), (20, 4)])
def test_text_nll_is_the_brute_force_mean_on_any_number_of_slices(
    sphinx: tuple[Any, TrainStage], tiny_runs: Path, batch: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 samples: with a batch of 20, the last slices hold only padding."""
    from pretrain.evaluate import perplexity

    objective, _ = sphinx
    sums: list[Tensor] = []
    monkeypatch.setattr(perplexity, "all_sum", lambda values: sums.append(values.clone()) or values)
    task = Perplexity(path=str(tiny_runs / "text"), length=tiny.LENGTH)
    found = [result_of("perplexity", sphinx, task, batch, rank(n, world)) for n in range(world)]
    with torch.no_grad():
        nats, tokens = packed_nats(objective, tiny_runs / "text")
    total = torch.stack(sums).sum(0)  # the result of an all-reduce
    assert total[1] == tokens == 30 * (tiny.LENGTH - 1)
    assert (total[0] / total[1]).item() == pytest.approx(nats / tokens, rel=1e-6)
    if world == 1:
        assert found == [pytest.approx(nats / tokens, rel=1e-6)]


def test_the_suite_equals_its_measures(sphinx: tuple[Any, TrainStage], tiny_runs: Path) -> None:
    objective, stage = sphinx
    tasks = {
        "text": {"path": str(tiny_runs / "text"), "length": tiny.LENGTH},
        "pairs": {"path": str(tiny_runs / "pairs"), "stream": "captions"},
        "elsewhere": {"path": str(tiny_runs / "pairs"), "stream": "no_such_stream"},
    }
    evaluation = Evaluation.model_validate({"batch": 8, "perplexity": tasks})
    found = evaluate(
        objective, objective.model, stage, stage_tokenizer(stage), SINGLE_PROCESS, evaluation, shuffle=True
    )
    scalars = flat_scalars(found)
    with torch.no_grad():
        nats, tokens = packed_nats(objective, tiny_runs / "text")
    assert scalars["perplexity/text/nll"] == pytest.approx(nats / tokens, rel=1e-6)
    assert set(scalars) == {
        "perplexity/text/nll", "perplexity/pairs/nll", "perplexity_shuffled/pairs/nll",
    }  # fmt: skip
