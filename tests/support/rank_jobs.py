"""What the ranks of tests/pretrain/train/test_other_ranks.py do: one process group runs all jobs, one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.errors import ReadError, UserError
from pretrain.build.tokenizer import stage_tokenizer
from pretrain.distributed.collectives import all_sum, barrier, from_rank_0, gather, rank, world_size
from pretrain.distributed.engine import Runtime
from pretrain.evaluate.measure import Context
from pretrain.evaluate.suite import EVALUATIONS
from pretrain.losses.contrastive import contrastive, repeated_caption_floor
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import Perplexity, ZeroShot
from pretrain.train.checkpoint import save, verify_and_read_state
from pretrain.train.resume import check_visible_on_all_ranks
from pretrain.train.step_totals import StepTotals
from tests.support import fake_training
from tests.support.samples import LENGTH, SIZE

ROWS, WIDTH = 4, 6
# Ids of the samples in the rows of three ranks: twins within a rank, across two ranks and across three.
IDS = [0, 1, 2, 0, 4, 1, 6, 0, 8, 4, 10, 1]
SCALE = 9.3
BATCHES = (1, 4, 8, 64)  # rows over all ranks
UNEVEN = (7, 5, 1)  # rows of global batches; of one row some ranks have none


def features(seed: int, world: int) -> torch.Tensor:
    """float32 `[world * ROWS, WIDTH]`, rows of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(world * ROWS, WIDTH, generator=generator), dim=1)


def run_all(folder: Path) -> dict[str, Any]:
    """Run every job; returns their results by name."""
    jobs: dict[str, Callable[[Path], Any]] = {
        "collectives": _collectives,
        "contrastive": _contrastive,
        "floor": _floor,
        "uneven_contrastive": _uneven_contrastive,
        "uneven_floor": _uneven_floor,
        "totals": _totals,
        "checkpoint": _checkpoint,
        "trainings": _trainings,
        "evaluation": _evaluation,
        "lost": _lost,
    }
    return {name: job(folder) for name, job in jobs.items()}


def _collectives(folder: Path) -> dict[str, Any]:
    number = rank()
    return {
        "gathered": gather({"rank": number, "list": [number] * number}),
        "first": from_rank_0(f"from {number}"),
        "sum": all_sum(torch.tensor([number + 1, 10 * number])).tolist(),
    }


def _contrastive(folder: Path) -> list[dict[str, Any]]:
    """Value and gradients of this rank, in one chunk and in chunks of one row."""
    mine = slice(rank() * ROWS, (rank() + 1) * ROWS)
    found = []
    for block in (1 << 24, world_size() * ROWS):
        image, text = (features(seed, world_size())[mine].requires_grad_() for seed in (1, 2))
        scale = torch.tensor([SCALE], requires_grad=True)
        loss = contrastive(image, text, scale, torch.tensor(IDS[mine]), block=block)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append({"loss": loss.item(), "grads": [each.grad.numpy() for each in (image, text, scale)]})
    return found


def _floor(folder: Path) -> float:
    return float(repeated_caption_floor(torch.tensor(IDS[rank() * ROWS : (rank() + 1) * ROWS])))


def _uneven(batch: int) -> tuple[slice, int]:
    """Rows of this rank in a global batch, and the dummy rows behind them."""
    mine = slice(rank() * batch // world_size(), (rank() + 1) * batch // world_size())
    return mine, -(-batch // world_size()) - (mine.stop - mine.start)


def _uneven_contrastive(folder: Path) -> list[dict[str, Any]]:
    """Dummy rows have features that would change every loss, and the ids of samples of the batch."""
    found = []
    for batch in UNEVEN:
        mine, dummies = _uneven(batch)
        for block in (1 << 24, 1):
            image, text = (
                torch.cat([features(seed, world_size())[mine], torch.full((dummies, WIDTH), 30.0)])
                for seed in (1, 2)
            )
            scale = torch.tensor([SCALE], requires_grad=True)
            image, text = image.requires_grad_(), text.requires_grad_()
            weights = torch.tensor([1.0] * (mine.stop - mine.start) + [0.0] * dummies)
            ids = torch.tensor(IDS[mine] + IDS[:dummies])
            loss = contrastive(image, text, scale, ids, block=block, weights=weights)
            loss.backward()  # type: ignore[no-untyped-call]
            grads = [each.grad.numpy() for each in (image, text, scale) if each.grad is not None]
            found.append({"loss": loss.item(), "grads": grads})
    return found


def _uneven_floor(folder: Path) -> list[float]:
    found = []
    for batch in UNEVEN:
        mine, dummies = _uneven(batch)
        keys = torch.tensor(IDS[mine] + IDS[:dummies])
        weights = torch.tensor([1.0] * (mine.stop - mine.start) + [0.0] * dummies)
        found.append(float(repeated_caption_floor(keys, weights)))
    return found


def _totals(folder: Path) -> list[dict[str, Any]]:
    """Totals of: a clean step, steps with replaced rows, a stop on the last rank, a failed read on the last rank."""
    last = rank() == world_size() - 1
    sources = ["even", "odd"]
    objective: Any = fake_training.Objective()
    empty: Any = {name: [] for name in objective.streams}
    found = []
    for step, bad, stop, failed in (
        (0, (), False, False),
        (1, (11,), False, False),
        (2, (0, 3, 7, 10), last, False),
        (3, (), False, last),
    ):
        batches = empty if failed else fake_training.micro_batches(step, bad)
        totals = StepTotals(objective, sources, batches, stop, failed, torch.device("cpu"))
        found.append(dict(vars(totals)))
    return found


def _write(folder: Path, tag: str) -> None:
    """Rank r writes r + 1 files, one of them in a folder below."""
    for number in range(rank() + 1):
        path = folder / tag / ("deep" if number else ".") / f"{rank()}_{number}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"rank {rank()} file {number}".encode() * 9)


def _error(function: Callable[..., Any], *arguments: Any) -> str | None:
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


def _checkpoint(folder: Path) -> dict[str, Any]:
    """Save, and verify while one file after another is damaged; each rank hashes some of the files."""
    path = save(folder / "checkpoints", 5, {"written by": rank()}, _write, keep=2)
    result: dict[str, Any] = {"state": verify_and_read_state(path), "damaged": {}}
    for name in sorted(str(p.relative_to(path)) for p in path.rglob("*.pt")):
        whole = (path / name).read_bytes()
        barrier()
        if rank() == 0:
            (path / name).write_bytes(b"?" + whole[1:])
        barrier()
        result["damaged"][name] = _error(verify_and_read_state, path)
        barrier()
        if rank() == 0:
            (path / name).write_bytes(whole)
        barrier()
    elsewhere = path if rank() < world_size() - 1 else path.with_name("step_00000009")
    result["seen"] = _error(check_visible_on_all_ranks, path)
    result["unseen"] = str(_error(check_visible_on_all_ranks, elsewhere)).partition(": ")[2]  # after its path
    return result


def _trainings(folder: Path) -> dict[str, Any]:
    """Short trainings; in most of them something happens on the last rank alone."""
    last = rank() == world_size() - 1
    only_last: dict[str, dict[str, Any]] = {
        "read": {"fails": 3, "failure": ReadError("the disk is gone")},
        "changed": {"fails": 3, "failure": UserError("a.tar is shorter than before")},
        "first": {"fails": 0, "failure": MemoryError()},
        "signal": {"stops": 2},
        "hours": {"hours": 0.0},
    }
    on_all: dict[str, dict[str, Any]] = {
        "whole": {"bad": (0, 7, 11)},
        "nan": {"nan": (11,)},
        "too many nan": {"nan": (11,), "nan_steps": (1, 2, 3), "max_skipped": 1},
        "shard": {"bad": (9, 11), "max_bad_in_shard": 3},
    }
    cases = {name: options if last else {} for name, options in only_last.items()} | on_all
    return {name: _train(folder / name, options) for name, options in cases.items()}


def _train(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    trainer, engine = fake_training.trainer(folder, **options)
    result: dict[str, Any] = {}
    try:
        result["finished"] = trainer.run(0)
    except Exception as error:
        result["error"] = (type(error).__name__, str(error))
    trainer.close()
    barrier()
    return result | {"updates": engine.updates}


def colours(images: torch.Tensor | None = None, tokens: torch.Tensor | None = None) -> dict[str, Any]:
    """For three classes: an image belongs to the class of its darkest channel, a prompt to that of its word."""
    if images is not None:
        return {"image": -images.mean(dim=(2, 3))}
    assert tokens is not None
    return {"text": F.one_hot((tokens[:, 1] + 2) % 3, 3).float()}  # the word "0" has token 10


def sum_of_targets(forward: Any, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As the NLL of a row; all tokens but the first are its targets."""
    return given.tokens[:, 1:].float().sum(1), given.used - 1


def embed(forward: Any, **given: Any) -> dict[str, Any]:
    return colours(**given)


def _stage(folder: Path) -> TrainStage:
    return TrainStage.model_validate(
        {
            "data": {
                "pairs": {
                    "sources": {"x": str(folder.parent / "images")},
                    "batch": 6,
                    "image": {"size": SIZE},
                    "text": {"tokenizer": str(folder.parent / "tokenizer"), "length": LENGTH},
                }
            },
            "objective": {"kind": "contrastive"},
            "train": {"steps": 1},
        }
    )


def _tasks(folder: Path) -> dict[str, Any]:
    return {
        "perplexity": Perplexity(path=str(folder.parent / "packed"), length=LENGTH),
        "zero_shot": ZeroShot(
            path=str(folder.parent / "images"), classes={"0": "0", "1": "1", "2": "2"}, templates=["{}"]
        ),
    }


def _context(folder: Path, batch: int, predict: dict[str, Any]) -> Context:
    stage = _stage(folder)
    runtime = Runtime(rank(), world_size(), rank(), torch.device("cpu"))
    return Context(predict, colours, stage, stage_tokenizer(stage), runtime, batch)


def _evaluation(folder: Path) -> dict[str, Any]:
    """Measures over held-out sources, in batches that the ranks share unevenly, or of which some rank has no row."""
    rows: dict[str, list[int]] = {"perplexity": [], "zero_shot": []}

    def counted_sum(forward: Any, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows["perplexity"].append(len(given))
        return sum_of_targets(forward, given)

    def counted_embed(forward: Any, **given: Any) -> dict[str, Any]:
        rows["zero_shot"].extend(len(each) for each in (given.get("images"),) if each is not None)
        return embed(forward, **given)

    predict = {"nll": counted_sum, "embed": counted_embed}
    results: dict[str, Any] = {
        name: [EVALUATIONS[name].run(_context(folder, batch, predict), task) for batch in BATCHES]
        for name, task in _tasks(folder).items()
    }
    return results | {"rows": (rows["perplexity"], rows["zero_shot"])}


def _lost(folder: Path) -> dict[str, Any]:
    """The error of each measure on this rank while only the last rank loses its data, in different places."""
    last = rank() == world_size() - 1
    context, tasks = _context(folder, 4, {"nll": sum_of_targets, "embed": embed}), _tasks(folder)
    make, opened = EvaluationPass.make, EvaluationPass.__init__
    found: dict[str, Any] = {}

    def unreadable(self: EvaluationPass, number: int, start: int, stop: int, dummies: int = 0) -> Any:
        if last and number == 1:
            raise ReadError("the disk is gone")
        return make(self, number, start, stop, dummies)

    def vanished(self: EvaluationPass, *arguments: Any, **options: Any) -> None:
        if last:
            raise FileNotFoundError(2, "No such file or directory", "held/00000.tar")
        opened(self, *arguments, **options)

    def grown(self: EvaluationPass) -> int:
        return int(self._ends[-1]) + last

    for name, attribute, replacement in (
        ("make", "make", unreadable),
        ("open", "__init__", vanished),
        ("grown", "samples", property(grown)),
        ("label", "make", make),
    ):
        if name == "label":  # the last sample, which is a row of the last rank, has label 2
            labelled = tasks["zero_shot"]
            classes = {"0": "0", "1": "1"} if last else labelled.classes
            tasks = {"zero_shot": labelled.model_copy(update={"classes": classes})}
        with mock.patch.object(EvaluationPass, attribute, replacement):
            for measure, task in tasks.items():
                found[f"{name} {measure}"] = _error(EVALUATIONS[measure].run, context, task)
    return found | {"after": EVALUATIONS["perplexity"].run(context, _tasks(folder)["perplexity"])}
