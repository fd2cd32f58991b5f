"""What other ranks hold, count, damage or report counts on every rank: two and three gloo ranks against one process."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from tests.support import fake_training as fake
from tests.support import rank_groups, rank_jobs
from tests.support.samples import SIZE, encode, members, write_packed, write_source, write_tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
Results = list[dict[str, Any]]  # of every rank, by job


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out sources of 11 samples, the last of which is unusable."""
    folder = tmp_path_factory.mktemp("ranks")
    write_tokenizer(folder / "tokenizer")
    labelled = {
        (shard, index): members(shard, index) | {"png": plain(darkest(shard, index))}
        for shard, count in enumerate(COUNTS)
        for index in range(count)
    }
    labelled[BROKEN] = members(*BROKEN) | {"png": b"no image"}
    write_source(folder / "images", COUNTS, labelled)
    write_packed(folder / "packed", COUNTS, broken={BROKEN})
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, root: Path) -> tuple[Results, Path]:
    """The results of all jobs on every rank, and the folder in which the ranks wrote."""
    folder = root / f"world_{request.param}"
    return rank_groups.run(request.param, "tests.support.rank_jobs", "run_all", folder), folder


def of_job(ranks: tuple[Results, Path], name: str) -> list[Any]:
    return [result[name] for result in ranks[0]]


def the_same(results: list[Any]) -> Any:
    """The result of a job that must be equal on all ranks."""
    assert all(result == results[0] for result in results)
    return results[0]


def test_collectives_are_in_rank_order_and_over_all_ranks(ranks: tuple[Results, Path]) -> None:
    found, world = the_same(of_job(ranks, "collectives")), len(ranks[0])
    assert found["gathered"] == [{"rank": n, "list": [n] * n} for n in range(world)]
    assert found["first"] == "from 0"
    assert found["sum"] == [sum(range(1, world + 1)), 10 * sum(range(world))]


def row_losses(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The symmetric loss of every row of the global batch, row by row; twins are not negatives."""
    losses = []
    for row in range(len(image)):
        total = torch.zeros((), dtype=torch.float64)
        for query, keys in ((image, text), (text, image)):
            others = [k for k in range(len(image)) if rank_jobs.IDS[k] != rank_jobs.IDS[row] or k == row]
            logits = torch.stack([scale[0] * (query[row] * keys[k]).sum() for k in others])
            total = total + torch.logsumexp(logits, 0) - scale[0] * (query[row] * keys[row]).sum()
        losses.append(total / 2)
    return torch.stack(losses)


@pytest.mark.parametrize("chunked", [False, True])
def test_contrastive_negatives_and_twins_are_those_of_all_ranks(
    ranks: tuple[Results, Path], chunked: bool
) -> None:
    """Value and gradient equal those of one process that holds all rows, with the formula in float64."""
    found, world, rows = of_job(ranks, "contrastive"), len(ranks[0]), rank_jobs.ROWS
    image, text = (rank_jobs.features(seed, world).double().requires_grad_() for seed in (1, 2))
    scale = torch.tensor([rank_jobs.SCALE], dtype=torch.float64, requires_grad=True)
    losses = row_losses(image, text, scale)
    losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert image.grad is not None
    assert text.grad is not None
    for rank, result in enumerate(each[chunked] for each in found):
        mine = slice(rank * rows, (rank + 1) * rows)
        assert result["loss"] == pytest.approx(losses[mine].sum().item(), rel=1e-5)
        (of_scale,) = torch.autograd.grad(losses[mine].sum(), scale, retain_graph=True)
        # A rank's rows are also negatives of the other ranks' rows: that part of their gradient comes from there.
        expected = (image.grad[mine], text.grad[mine], of_scale)
        for gradient, truth in zip(result["grads"], expected, strict=True):
            np.testing.assert_allclose(gradient, truth.numpy(), rtol=1e-4, atol=1e-5)


def test_the_floor_counts_the_captions_of_all_ranks(ranks: tuple[Results, Path]) -> None:
    keys = rank_jobs.IDS[: len(ranks[0]) * rank_jobs.ROWS]
    expected = sum(math.log(keys.count(key)) for key in keys) / len(keys)
    assert the_same(of_job(ranks, "floor")) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("number", "batch"), enumerate(rank_jobs.UNEVEN))
@pytest.mark.parametrize("chunked", [False, True])
def test_dummy_rows_are_neither_positives_nor_negatives(
    ranks: tuple[Results, Path], number: int, batch: int, chunked: bool
) -> None:
    """Value and gradient are those of one process that holds the other rows alone, with the formula in float64."""
    found, world = of_job(ranks, "uneven_contrastive"), len(ranks[0])
    image, text = (rank_jobs.features(seed, world)[:batch].double().requires_grad_() for seed in (1, 2))
    scale = torch.tensor([rank_jobs.SCALE], dtype=torch.float64, requires_grad=True)
    losses = row_losses(image, text, scale)
    losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert image.grad is not None
    assert text.grad is not None
    for rank, result in enumerate(each[2 * number + chunked] for each in found):
        mine = slice(rank * batch // world, (rank + 1) * batch // world)
        assert result["loss"] == pytest.approx(losses[mine].sum().item(), rel=1e-5, abs=1e-6)
        (of_scale,) = torch.autograd.grad(losses[mine].sum(), scale, retain_graph=True)
        padding = torch.zeros(-(-batch // world) - (mine.stop - mine.start), rank_jobs.WIDTH)
        expected = (torch.cat([image.grad[mine], padding]), torch.cat([text.grad[mine], padding]), of_scale)
        for gradient, truth in zip(result["grads"], expected, strict=True):
            np.testing.assert_allclose(gradient, truth.numpy(), rtol=1e-4, atol=1e-5)


def test_the_floor_leaves_dummy_rows_out(ranks: tuple[Results, Path]) -> None:
    for found, batch in zip(the_same(of_job(ranks, "uneven_floor")), rank_jobs.UNEVEN, strict=True):
        keys = rank_jobs.IDS[:batch]
        expected = sum(math.log(keys.count(key)) for key in keys) / batch
        assert found == pytest.approx(expected, rel=1e-6)


def expected_totals(step: int, bad: tuple[int, ...], stop: bool) -> dict[str, Any]:
    """The totals of a step, row by row of the global batch."""
    rows, lines = range(fake.ROWS), [fake.bad_line("pairs", step, row) for row in bad]
    skipped: dict[str, Counter[str]] = {}
    for line in lines:
        skipped.setdefault(line["source"], Counter())[line["reason"]] += 1
    digests = [
        sum(fake.digest_of(name, at, row) for name in fake.STREAMS for row in rows) % 2**64
        for at in (step, step + 1)
    ]
    return {
        "loss_denominators": {"pairs": fake.ROWS, "text": sum(row % fake.LENGTH for row in rows)},
        "rows": {"pairs": fake.ROWS, "text": fake.ROWS},
        "samples": Counter(fake.source_of(step, row) for _ in fake.STREAMS for row in rows),
        "skipped": skipped,
        "bad": lines,
        "batch_digest": f"{digests[0]:016x}",
        "order_digest": f"{digests[1]:016x}",
        "stop": stop,
        "failed": False,
    }


def test_step_totals_are_those_of_all_ranks_in_row_order(ranks: tuple[Results, Path]) -> None:
    """Replaced rows, a stop and a failure are on some ranks only; micro-batches are uneven."""
    clean, one, stopped, failed = the_same(of_job(ranks, "totals"))
    assert clean == expected_totals(0, (), False)
    assert one == expected_totals(1, (11,), False)
    assert stopped == expected_totals(2, (0, 3, 7, 10), True)
    assert failed["failed"]
    assert not failed["stop"]


def test_a_checkpoint_has_the_files_of_all_ranks_and_damage_on_any_rank_is_named_on_all(
    ranks: tuple[Results, Path],
) -> None:
    found, world = the_same(of_job(ranks, "checkpoint")), len(ranks[0])
    path = ranks[1] / "checkpoints" / "step_00000005"
    assert found["state"] == {"written by": 0}
    names = {f"{'deep/' if n else ''}{rank}_{n}.pt" for rank in range(world) for n in range(rank + 1)}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == names | {"state.json"}
    for name, entry in manifest.items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "xxh64": xxhash.xxh64_hexdigest(data)}
    assert set(found["damaged"]) == names
    for name, error in found["damaged"].items():
        assert f"{name} is damaged" in error
    assert found["seen"] is None
    assert f"rank {world - 1} does not see this checkpoint" in found["unseen"]


def trainings(ranks: tuple[Results, Path], name: str) -> tuple[list[dict[str, Any]], list[int], list[str]]:
    """The result of a training on every rank, the steps in its log, and its checkpoints."""
    folder = ranks[1] / name
    logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = sorted(path.name for path in folder.glob("checkpoints/step_*"))
    return [of_rank[name] for of_rank in of_job(ranks, "trainings")], logged, saved


def test_the_log_has_the_losses_and_replaced_rows_of_all_ranks(ranks: tuple[Results, Path]) -> None:
    results, logged, saved = trainings(ranks, "whole")
    assert the_same(results) == {"finished": True, "updates": fake.STEPS}
    assert logged == list(range(1, fake.STEPS + 1))
    assert saved == [f"step_{fake.STEPS:08d}"]
    rows = [json.loads(line) for line in (ranks[1] / "whole/metrics.jsonl").read_text().splitlines()]
    for step, row in enumerate(rows):
        totals, tokens = expected_totals(step, (0, 7, 11), False), sum(step + r for r in range(fake.ROWS))
        parts = {name: fake.LENGTH * tokens / n for name, n in totals["loss_denominators"].items()}
        assert {f"loss/{name}": row[f"loss/{name}"] for name in parts} == pytest.approx(
            {f"loss/{name}": part for name, part in parts.items()}
        )
        assert row["loss"] == pytest.approx(sum(parts.values()))
        assert row["skipped"] == totals["skipped"]
        assert (row["batch_digest"], row["order_digest"]) == (totals["batch_digest"], totals["order_digest"])
    bad = [json.loads(line) for line in (ranks[1] / "whole/bad_samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["row"]) for line in bad] == [
        (step, row) for step in range(1, fake.STEPS + 1) for row in (0, 7, 11)
    ]


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks: tuple[Results, Path]) -> None:
    """Row 11 is of the last rank. Step and data go on; the line of the step says what happened, in valid JSON."""
    results, logged, saved = trainings(ranks, "nan")
    assert the_same(results) == {"finished": True, "updates": fake.STEPS - 1}
    assert logged == list(range(1, fake.STEPS + 1))
    assert saved == [f"step_{fake.STEPS:08d}"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (ranks[1] / "nan/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    whole = [json.loads(line) for line in (ranks[1] / "whole/metrics.jsonl").read_text().splitlines()]
    for row, other in zip(rows, whole, strict=True):
        assert ("non_finite" in row) == (row["step"] == 3)
        for key in ("samples", "lr", "batch_digest", "order_digest", "loss/text"):
            assert row[key] == other[key]
    assert [rows[2][key] for key in ("loss", "loss/pairs", "grad_norm")] == [None, None, None]
    assert rows[2]["non_finite"] == {
        "values": ["loss", "loss/pairs"],
        "origin": {"stream": "pairs", "kind": "loss", "module": None},
        "in_a_row": 1,
    }
    said = [(ranks[1] / f"rank_{rank}.log").read_text() for rank in range(len(ranks[0]))]
    assert (
        "step 3: loss, loss/pairs is not finite (first in the loss, stream pairs); the step was skip"
        in said[0]
    )
    assert not any("was skipped" in log for log in said[1:])


def test_more_skipped_steps_in_a_row_than_allowed_stop_all_ranks_after_a_save(
    ranks: tuple[Results, Path],
) -> None:
    results, logged, saved = trainings(ranks, "too many nan")
    kind, message = the_same(results)["error"]
    assert kind == "NonFinite"
    assert message.startswith("step 3: loss, loss/pairs is not finite (first in the loss, stream pairs).")
    assert "train.max_skipped is 1" in message
    assert "saved at step 2" in message
    assert results[0]["updates"] == 1
    assert (logged, saved) == ([1, 2], ["step_00000002"])
    state = json.loads((ranks[1] / "too many nan/checkpoints/step_00000002/state.json").read_text())
    assert state["skipped_in_a_row"] == 1


@pytest.mark.parametrize(
    ("name", "step", "kind", "own"),
    [
        ("read", 3, "UnreadableData", "the disk is gone"),
        ("changed", 3, "UserError", "a.tar is shorter than before"),
        (
            "first",
            0,
            "UnreadableData",
            "out of memory: lower loader.workers or train.micro_batch, which change no result, or give the run more "
            "memory",
        ),
    ],
)
def test_a_rank_that_cannot_read_stops_all_after_a_save(
    ranks: tuple[Results, Path], name: str, step: int, kind: str, own: str
) -> None:
    results, logged, saved = trainings(ranks, name)
    *others, failed = [result["error"] for result in results]
    end = f"The run is saved at step {step}" if step else "No step was done yet"
    assert failed[0] == kind
    assert failed[1] == f"step {step + 1}: {own}. {end}; run it again to resume."
    for other in others:
        assert other[0] == "UnreadableData"
        assert other[1].startswith(f"step {step + 1}: another rank could not read its data")
        assert end in other[1]
    assert logged == list(range(1, step + 1))
    assert saved == ([f"step_{step:08d}"] if step else [])
    assert [result["updates"] for result in results] == [step] * len(results)


@pytest.mark.parametrize(("name", "step"), [("signal", 3), ("hours", 1)])
def test_a_stop_that_one_rank_knows_of_stops_all_at_the_same_step(
    ranks: tuple[Results, Path], name: str, step: int
) -> None:
    results, logged, saved = trainings(ranks, name)
    assert the_same(results) == {"finished": False, "updates": step}
    assert logged == list(range(1, step + 1))
    assert saved == [f"step_{step:08d}"]


def test_a_shard_that_reaches_its_limit_over_all_ranks_stops_all(ranks: tuple[Results, Path]) -> None:
    """Rows 9 and 11 are of the last rank; each step adds two samples to one of the two shards."""
    results, logged, saved = trainings(ranks, "shard")
    kind, message = the_same(results)["error"]
    assert kind == "TooManyBadSamples"
    assert "4 samples of odd.tar are unusable" in message
    assert logged == [1, 2, 3]
    assert saved == ["step_00000003"]


COUNTS, BROKEN = [6, 3, 2], (2, 1)


def darkest(shard: int, index: int) -> int:
    """The channel that an image lacks, which is the class that the fake model gives it."""
    return (shard + index // 2) % 3


def plain(channel: int) -> bytes:
    pixels = np.full((SIZE, SIZE, 3), 200, np.uint8)
    pixels[..., channel] = 0
    return encode(pixels)


def test_an_evaluation_sums_over_the_rows_of_all_ranks(ranks: tuple[Results, Path]) -> None:
    """Also with fewer rows than ranks, and where only the last rank meets the sample that cannot be read."""
    found = the_same(of_job(ranks, "evaluation"))
    usable = [(s, i) for s, count in enumerate(COUNTS) for i in range(count) if (s, i) != BROKEN]
    mean = sum(1000 * shard + index for shard, index in usable) / len(usable)
    assert found["perplexity"] == pytest.approx([mean] * len(rank_jobs.BATCHES), rel=1e-6)
    confusion = np.zeros((3, 3), int)
    for shard, index in usable:
        confusion[index % 3, darkest(shard, index)] += 1
    # Every rank computes as many batches of as many rows: those of the rank with most rows, never none.
    sizes = [
        rows
        for batch in rank_jobs.BATCHES
        for rows in [-(-batch // len(ranks[0]))] * -(-sum(COUNTS) // batch)
    ]
    assert found["rows"] == (sizes, sizes)
    for result in found["zero_shot"]:
        assert result["confusion"] == confusion.tolist()
        assert result["samples"] == len(usable)
        assert result["top1"] == pytest.approx(confusion.trace() / len(usable))
    said = [(ranks[1] / f"rank_{rank}.log").read_text() for rank in range(len(ranks[0]))]
    # Once per evaluation; the last one is that of the job `lost`.
    assert said[0].count("1 unusable samples were left out") == 2 * len(rank_jobs.BATCHES) + 1
    assert not any("unusable" in log for log in said[1:])


def test_held_out_data_that_one_rank_cannot_read_is_the_same_error_on_all(
    ranks: tuple[Results, Path],
) -> None:
    """No rank waits for the failed one, and the next evaluation works."""
    found = the_same(of_job(ranks, "lost"))
    assert found["make perplexity"] == found["make zero_shot"] == "the disk is gone"
    assert found["open perplexity"] == found["open zero_shot"] == "held/00000.tar: No such file or directory"
    assert found["grown perplexity"].startswith("ranks see different numbers of samples: ")
    assert found["grown zero_shot"].startswith("ranks see different numbers of samples: ")
    assert "has label='2', which is not in eval.zero_shot classes (0, 1)" in found["label zero_shot"]
    assert found["after"] == of_job(ranks, "evaluation")[0]["perplexity"][1]
