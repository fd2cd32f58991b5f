"""A system that Dromos does not know, from this module alone: kind, encoder, text format, measure, export.

It predicts the number in a caption from image and letters. Every rank and worker imports this module, because
DROMOS_PLUGINS names it (pretrain/recipe/plugins.py); importing it in a test adds nothing.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from data_pipeline import RowArray, TextFormat, TextRow
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import ContentError
from launch.cli.app import app
from pretrain.build import encoders, objective
from pretrain.build.encoders import EncoderKind, build_encoder
from pretrain.build.module_weights import save_tensors
from pretrain.build.objective import BuildContext, Built
from pretrain.build.streams import evaluation_spec
from pretrain.distributed.collectives import all_sum
from pretrain.evaluate import suite
from pretrain.evaluate.held_out import open_pass, rank_slices
from pretrain.evaluate.measure import Context
from pretrain.export import write_folder
from pretrain.losses.normalisation import count_rows, part_of_global_mean
from pretrain.models.encoders.base import Encoder
from pretrain.objectives.base import Forward, Loss, Objective
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe import architectures, kinds
from pretrain.recipe.kinds.base import KindSpec, ObjectiveOptions, Sections
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.plugins import VARIABLE
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections import evaluation, text_formats
from pretrain.recipe.sections.evaluation import Evaluation, Task
from pretrain.recipe.sections.model import Vision
from pretrain.recipe.sections.text_formats import TextOptions
from tests.support import tiny
from tests.support.forks import wait_all
from tests.support.rank import start_ranks

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
PATCH, WIDTH = 8, 6
ROOT = Path(__file__).resolve().parents[2]


# The text format: letters in place of tokens, a mask that a draw decides, and the number that is to be predicted.


@dataclass(frozen=True)
class Letters(TextFormat):
    length: int
    tokenizer = None

    @property
    def arrays(self) -> Mapping[str, RowArray]:
        return {
            "letters": RowArray("uint8", (self.length,)),
            "seen": RowArray("bool", (self.length,)),
            "number": RowArray("float32"),
        }

    @property
    def expected(self) -> str:
        return "a caption that ends with a number (txt)"

    def row(self, members: Mapping[str, bytes], tokenizer: object, draw: int | None) -> TextRow:
        text = members["txt"].decode()
        if not text.split()[-1].isdigit():
            raise ContentError("no number", text)
        return TextRow(self._arrays(text, draw or 0) | {"number": int(text.split()[-1]) / 10}, text=text)

    def dummy(self, tokenizer: object) -> Mapping[str, np.ndarray | int]:
        return self._arrays("", 0) | {"number": 0}

    def _arrays(self, text: str, draw: int) -> dict[str, Any]:
        letters = np.zeros(self.length, np.uint8)
        codes = text.encode()[: self.length]
        letters[: len(codes)] = list(codes)
        seen = np.array([not (draw >> place) & 1 for place in range(self.length)])
        return {"letters": letters, "seen": seen & (letters > 0)}


class LettersOptions(TextOptions):
    arrays = ("letters", "seen", "number")

    format: Literal["letters"]
    length: int

    def row_format(self) -> TextFormat:
        return Letters(self.length)


# The encoder: a linear layer on patches. `arch: toy://patches`.


class Patches(Encoder):
    def __init__(self) -> None:
        self.module = nn.Linear(3 * PATCH * PATCH, WIDTH)

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def token_count(self) -> int:
        return (tiny.SIZE // PATCH) ** 2

    def tokens(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        embedded: Tensor = self.module(patches.to(self.module.weight.dtype))  # type: ignore[arg-type]
        return embedded


def open_patches(tower: Vision, run_dir: Path | None) -> tuple[Encoder, dict[str, Any]]:
    return Patches(), {"arch": tower.arch}


def arch_mistake(arch: str) -> str | None:
    return None if arch == "toy://patches" else f"{arch}: there is only toy://patches"


# The kind and its objective.


class NumberOptions(ObjectiveOptions):
    kind: Literal["number"]
    scale: float = 1.0


def check(stage: Sections) -> Iterator[tuple[tuple[str, ...], str]]:
    if not stage.model.vision:
        yield ("model", "vision"), "is missing; number needs arch: toy://patches"


def needed_arrays(stage: Sections) -> Mapping[str, tuple[str, ...]]:
    return dict.fromkeys(stage.data, ("pixels", "letters", "seen", "number"))


class Model(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.vision = nn.ModuleList([encoder.module])
        self.letters = nn.Embedding(256, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, images: Tensor, letters: Tensor, seen: Tensor) -> Tensor:
        """The predicted number of each row, fp32 `[rows]`."""
        words = (self.letters(letters) * seen[:, :, None]).sum(1) / seen.sum(1).clamp(min=1)[:, None]
        features = torch.tanh(self.encoder.tokens(images).mean(1) + words)
        predicted: Tensor = self.head(features)[:, 0].float()
        return predicted


def predict_numbers(forward: Forward, rows: DeviceBatch) -> Tensor:
    predicted: Tensor = forward(rows.images, rows.fields["letters"], rows.fields["seen"])
    return predicted


class Number(Objective):
    exports = ("numbers",)

    def __init__(self, model: Model, stage: TrainStage) -> None:
        self.model = model
        self.main = main_stream(stage)
        self.streams = (self.main,)
        self.scale = stage.options(NumberOptions).scale

    @property
    def predict(self) -> Mapping[str, Callable[..., object]]:
        return {"numbers": predict_numbers}

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        return count_rows(batch)

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        errors = (predict_numbers(forward, rows) - self.scale * rows.fields["number"]) ** 2
        total = part_of_global_mean((errors * rows.weights).sum(), loss_denominator)
        return Loss(total, {"squared_error": total.detach()})


def build_number(context: BuildContext) -> Built:
    assert context.stage.model.vision is not None
    encoder, description, _ = build_encoder(
        context.stage.model.vision[0], context.run_dir, context.frozen
    )
    return Built(Number(Model(encoder), context.stage), description, frozenset())


# The measure and the export.


class NumberError(Task):
    needs = ("numbers",)
    needs_words = "a model that predicts numbers"

    most: float = 1e9


@dataclass(frozen=True)
class NumberErrorMeasure:
    needs = ("numbers",)
    on_request = False

    def tasks(self, evaluation: Evaluation, stage: TrainStage) -> Mapping[str, NumberError]:
        return evaluation.of(NumberError)

    def spec(self, task: NumberError, stage: TrainStage, batch: int) -> StreamSpec:
        return evaluation_spec("held_out", task, stage.data[main_stream(stage)], batch)

    def run(self, context: Context, task: NumberError) -> float:
        predict = cast("Callable[..., Tensor]", context.predict["numbers"])
        image = context.stage.data[main_stream(context.stage)].image
        total = torch.zeros(2, dtype=torch.float64)
        spec = self.spec(task, context.stage, context.batch)
        with torch.no_grad(), closing(open_pass(spec, context.cache)) as one_pass:
            for rows, _ in rank_slices(one_pass, spec, image, context.runtime):
                errors = (predict(context.forward, rows) - rows.fields["number"]).abs().clamp(max=task.most)
                total += torch.stack([(errors.double() * rows.weights).sum(), rows.weights.double().sum()])
        error, count = all_sum(total).tolist()
        return float(error / count)

    def scalars(self, result: float) -> dict[str, float]:
        return {"mae": result}


def write_numbers(objective: Objective, stage: TrainStage, folder: Path) -> None:
    save_tensors(folder / "numbers.safetensors", objective.model.state_dict())


@dataclass
class Entries:
    """What this module adds to the dicts of Dromos."""

    of: list[tuple[MutableMapping[str, Any], str, Any]] = field(
        default_factory=lambda: [
            (
                kinds.KINDS,
                "number",
                KindSpec(NumberOptions, check, lambda stage: iter(()), needed_arrays, predicts=("numbers",)),
            ),
            (objective.BUILDERS, "number", build_number),
            (text_formats.TEXT_FORMATS, "letters", LettersOptions),
            (architectures.OTHER_SCHEMES, "toy", arch_mistake),
            (encoders.ENCODERS, "toy", EncoderKind(open_patches, lambda described: Patches(), trained=False)),
            (evaluation.TASKS, "number_error", NumberError),
            (suite.EVALUATIONS, "number_error", NumberErrorMeasure()),
            (write_folder.FORMATS, "numbers", write_numbers),
        ]
    )

    def add(self) -> None:
        for place, name, entry in self.of:
            place[name] = entry


if __name__ in os.environ.get(VARIABLE, "").split(","):
    Entries().add()


# The tests.


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries in this process, and the variable with which ranks and commands add them themselves."""
    for place, name, entry in Entries().of:
        monkeypatch.setitem(place, name, entry)
    monkeypatch.setenv(VARIABLE, __name__)


def recipe_of(root: Path, **sections: Any) -> Path:
    image = {
        "size": tiny.SIZE,
        "crop": [0.5, 1.0],
        "flip": True,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.5, 0.5, 0.5],
    }
    recipe = {
        "run": {"name": "seven", "dir": str(root / "runs" / "seven"), "seed": 5},
        "data": {
            "pairs": {
                "sources": {"pairs": str(root / "pairs")},
                "batch": 7,
                "image": image,
                "text": {"format": "letters", "length": 20},
            }
        },
        "model": {"vision": {"arch": "toy://patches"}, "freeze": ["vision"]},
        "objective": {"kind": "number", "scale": 0.5},
        "optimizer": {"lr": 0.1},
        "train": {"steps": 2},
        "engine": {"zero": 3},
        "loader": {"workers": 2},
        "eval": {"batch": 5, "number_error": {"held": {"path": str(root / "pairs"), "most": 3.0}}},
    }
    return tiny.write_recipe(root / "recipe.yaml", recipe | sections)


def rows(stage: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


def held_out(root: Path) -> Iterator[tuple[np.ndarray, str]]:
    """(image, uint8 `[size, size, 3]`; caption) of all samples, read by tarfile and Pillow."""
    for path in sorted((root / "pairs").glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in sorted(content):
            if name.endswith(".jpg"):
                text = content[name.replace(".jpg", ".txt")].decode()
                yield np.asarray(Image.open(io.BytesIO(content[name])).convert("RGB")), text


def by_hand(weights: Mapping[str, np.ndarray], pixels: np.ndarray, text: str) -> float:
    """The model's prediction, in numpy."""
    image = (pixels / 255.0 - [0.4, 0.5, 0.6]) / 0.5
    tokens = []
    for y in range(0, tiny.SIZE, PATCH):
        for x in range(0, tiny.SIZE, PATCH):
            patch = image[y : y + PATCH, x : x + PATCH].transpose(2, 0, 1).ravel()
            tokens.append(weights["vision.0.weight"] @ patch + weights["vision.0.bias"])
    words = np.mean([weights["letters.weight"][code] for code in text.encode()[:20]], axis=0)
    features = np.tanh(np.mean(tokens, axis=0) + words)
    return float((weights["head.weight"] @ features + weights["head.bias"])[0])


@pytest.mark.usefixtures("registered")
def test_it_trains_on_two_ranks_with_two_workers_is_evaluated_and_exported(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tiny.make_data(tmp_path)
    recipe = recipe_of(tmp_path)
    shown = CliRunner().invoke(app, ["recipe", "check", str(recipe), "--model"])
    assert shown.exit_code == 0, shown.output
    assert "number for 2 steps" in shown.output

    wait_all(start_ranks(recipe, world=2))
    stage = tmp_path / "runs" / "seven" / "main"
    trained = rows(stage)
    assert [row["step"] for row in trained] == [1, 2]
    assert trained[0]["loss"] == trained[0]["squared_error"] > 0

    # One rank without workers computes the same: rows, draws and dummy rows do not depend on them.
    alone = tmp_path / "runs" / "alone"
    wait_all(start_ranks(recipe, f"run.dir={alone}", "loader.workers=0", "engine.zero=0", world=1))
    for one, two in zip(rows(alone / "main"), trained, strict=True):
        assert one["batch_digest"] == two["batch_digest"]
        for name in ("loss", "squared_error", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-5)

    # In a process of its own, which has no entries but those that the variable adds.
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "export", str(stage), "--format", "numbers", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "out" / "numbers.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {
        "vision.0.weight": (WIDTH, 3 * PATCH * PATCH),
        "vision.0.bias": (WIDTH,),
        "letters.weight": (256, WIDTH),
        "head.weight": (1, WIDTH),
        "head.bias": (1,),
    }
    errors = [
        min(3.0, abs(by_hand(weights, pixels, text) - int(text.split()[-1]) / 10))
        for pixels, text in held_out(tmp_path)
    ]
    assert len(errors) == 48
    expected = float(np.mean(errors))
    assert trained[1]["eval"]["number_error/held/mae"] == pytest.approx(expected, rel=1e-5)
    measured = CliRunner().invoke(app, ["eval", str(stage)])
    assert measured.exit_code == 0, measured.output
    assert f"{expected:.4f}"[:5] in measured.output


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.pairs.text={format: caption}",
            "caption gives no letters and seen and number, which number needs",
        ),
        ("data.pairs.text.length=[]", "data.pairs.text.length: must be a whole number, not []"),
        ("model.vision.arch=toy://cubes", "there is only toy://patches"),
        ("objective={kind: contrastive}", "contrastive builds open_clip://ARCH, no other architecture"),
        ("objective={kind: contrastive}", "letters gives letters and seen and number, which contrastive does not read"),
        ("eval.number_error.held.mos=1", "unknown key; did you mean 'most'"),
        (
            "eval.zero_shot={a: {path: x}}",
            "needs an image tower and a text tower, as objective.kind: contrastive has",
        ),
        ("objective.weights={a: 1}", "it is a key of generative"),
    ],
)
def test_its_rules_are_those_of_every_system(tmp_path: Path, override: str, words: str) -> None:
    shown = CliRunner().invoke(app, ["recipe", "check", str(recipe_of(tmp_path)), override])
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


def test_without_the_variable_nobody_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(recipe_of(tmp_path))
    shown = CliRunner().invoke(app, ["recipe", "check", recipe])
    assert shown.exit_code == 2
    assert "objective.kind: 'number' is none of contrastive, generative" in " ".join(shown.output.split())
    for name, content in (("a_syntax", "def"), ("a_bug", "1 / 0"), ("an_end", "raise SystemExit(3)")):
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv(VARIABLE, name)
        shown = CliRunner().invoke(app, ["recipe", "check", recipe])
        assert shown.exit_code == 2
        assert f"DROMOS_PLUGINS: {name} cannot be imported: " in " ".join(shown.output.split())
        assert "correct the name" not in shown.output
    monkeypatch.setenv(VARIABLE, "no_such_module")
    shown = CliRunner().invoke(app, ["recipe", "check", recipe])
    assert shown.exit_code == 2
    assert "DROMOS_PLUGINS: no_such_module cannot be imported" in " ".join(shown.output.split())
