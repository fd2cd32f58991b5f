"""Resuming with changed data: refused, then accepted; the order equals that of a brute-force walk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.order.digest import add, hex16, row_digest
from data_pipeline.order.stream_order import stream_seed
from data_pipeline.sources.tar import TarWriter
from launch.stage_state import is_done, stage_job
from pretrain.recipe.load import load_recipe
from tests.support import rank, tiny
from tests.support.naive_order import Change, Mixture, Source, simulate_order

LANES = 4


def recipe(folder: Path, steps: int, sources: dict[str, Any], batch: Any) -> Path:
    stream = tiny.pairs_stream(folder, batch=batch) | {"sources": sources, "lanes": LANES}
    written = tiny.flip_recipe(
        folder, data={"pairs": stream}, train={"steps": steps}, checkpoint={"every": 3}
    )
    written["run"] |= {"dir": str(folder / "run")}
    return tiny.write_recipe(folder / "recipe.yaml", written)


def digests(plan: list[Mixture], steps: int) -> list[str]:
    """order_digest of each step, from the brute-force walk. Every sample decodes, so no sample is replaced."""
    seed, found = stream_seed(3, "main", "pairs"), []
    for rows in simulate_order(plan, steps, LANES, seed, lambda samples: min(64, max(1, samples // 16384))):
        if isinstance(rows, Change):
            continue
        total = 0
        for row, (source, epoch, shard, index) in enumerate(rows):
            digest = row_digest("pairs", row, source, f"{shard:05d}.tar", index, 0, epoch, (), -1)
            total = add(total, digest)
        found.append(hex16(total))
    return found


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "main" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def segments(folder: Path, step: int) -> list[dict[str, Any]]:
    path = folder / "run" / "main" / "checkpoints" / f"step_{step:08d}" / "state.json"
    state: dict[str, Any] = json.loads(path.read_text())
    found: list[dict[str, Any]] = state["order"]["pairs"]["segments"]
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tiny.make_data(tmp_path)  # pairs: shards of 17, 16 and 15 samples
    tiny.write_pairs(tmp_path / "more", shards=2, samples=9)  # 9 and 8
    return tmp_path


def test_a_shard_is_added_while_the_batch_ramps_up(data: Path) -> None:
    sources, batch = {"pairs": str(data / "pairs")}, {0: 8, 3: 12}
    code, printed = rank.run(recipe(data, 5, sources, batch))
    assert code == 0, printed
    tiny.write_pairs(data / "pairs", shards=4)  # the same three shards, and one of 14 samples
    code, printed = rank.run(recipe(data, 9, sources, batch))
    assert code == 2
    for words in (
        "samples of source 'pairs' changed from 48 to 62",
        "fingerprints",
        "run.accept_change=true",
    ):
        assert words in printed
    assert len(logged(data)) == 5

    code, printed = rank.run(recipe(data, 9, sources, batch), "run.accept_change=true")
    assert code == 0, printed
    plan = [
        Mixture(0, (Source("pairs", (17, 16, 15)),), batch),
        Mixture(5, (Source("pairs", (17, 16, 15, 14)),), batch),
    ]
    assert [row["order_digest"] for row in logged(data)] == digests(plan, 9)
    assert [row["samples"] for row in logged(data)] == [{"pairs": n} for n in [8] * 3 + [12] * 6]
    # 3 x 8 + 2 x 12 rows were the whole epoch of 48 samples
    assert "data.pairs: samples of source 'pairs' changed from 48 to 62" in printed
    assert "0 samples of unfinished epochs will not be used" in printed
    assert [one["first_step"] for one in segments(data, 9)] == [0, 5]

    code, printed = rank.run(recipe(data, 11, sources, batch))  # an accepted change is not accepted again
    assert code == 0, printed
    assert [row["order_digest"] for row in logged(data)] == digests(plan, 11)


def test_weights_change_then_a_source_is_removed_and_the_batch_grows(data: Path) -> None:
    both = {name: {"path": str(data / name), "weight": 0.5} for name in ("pairs", "more")}
    code, printed = rank.run(recipe(data, 4, both, 8))
    assert code == 0, printed
    other = {"pairs": both["pairs"] | {"weight": 0.75}, "more": both["more"] | {"weight": 0.25}}
    code, printed = rank.run(recipe(data, 7, other, 8))
    assert code == 2
    for words in ("data.pairs.sources.more.weight: 0.5 -> 0.25", "run.accept_change=true"):
        assert words in printed
    code, printed = rank.run(recipe(data, 7, other, 8), "run.accept_change=true")
    assert code == 0, printed
    assert "changed since it was saved: data.pairs.sources.more.weight: 0.5 -> 0.25" in printed
    alone = {"pairs": other["pairs"]}
    code, printed = rank.run(recipe(data, 10, alone, 16), "run.accept_change=true")
    assert code == 0, printed
    assert "source 'more': removed; 12 samples of unfinished epochs will not be used" in printed
    pairs, more = (17, 16, 15), (9, 8)
    plan = [
        Mixture(0, (Source("pairs", pairs, 0.5), Source("more", more, 0.5)), {0: 8}),
        Mixture(4, (Source("pairs", pairs, 0.75), Source("more", more, 0.25)), {0: 8}),
        Mixture(7, (Source("pairs", pairs, 0.75),), {0: 16}),
    ]
    assert [row["order_digest"] for row in logged(data)] == digests(plan, 10)
    assert segments(data, 10)[-1]["unvisited"] == {"more": 12}  # 22 of 2 x 17

    written = recipe(data, 12, alone, 16)
    code, printed = rank.run(written, "data.pairs.lanes=8", "run.accept_change=true")
    assert code == 2
    assert "lanes changed from 4 to 8" in printed


def test_a_length_in_samples_counts_what_was_served_before_the_batch_grew(data: Path) -> None:
    sources = {"pairs": str(data / "pairs")}
    code, printed = rank.run(recipe(data, 3, sources, 8))
    assert code == 0, printed
    grown = recipe(data, 3, sources, 16)
    code, printed = rank.run(grown, "run.accept_change=true", "train.samples=72")
    assert code == 0, printed
    assert [row["samples"]["pairs"] for row in logged(data)] == [8, 8, 8, 16, 16, 16]
    folder, overrides = data / "run", ["train.samples=72"]
    done = load_recipe(grown, overrides)
    assert is_done(folder, stage_job(done, "main"), done)
    shrunk = load_recipe(recipe(data, 3, sources, 4), overrides)
    assert stage_job(shrunk, "main").steps == 18
    assert is_done(folder, stage_job(shrunk, "main"), shrunk)
    longer = load_recipe(grown, ["train.samples=73", "data.pairs.batch=4"])
    assert not is_done(folder, stage_job(longer, "main"), longer)


def test_a_run_resumes_without_the_source_that_stopped_it(data: Path) -> None:
    with TarWriter(data / "noisy" / "00000.tar") as tar:
        for number in range(60):
            picture = b"no image" if number % 5 == 4 else tiny.picture("red", number)
            tar.write(f"{number:09d}", {"jpg": picture, "txt": b"a red square"})
    limit = "loader.max_bad_fraction=0.05"
    code, printed = rank.run(recipe(data, 12, {"noisy": str(data / "noisy")}, 32), limit)
    assert code == 1
    stopped = len(logged(data))
    assert "samples of noisy were replaced, more than loader.max_bad_fraction 0.05" in printed
    without = recipe(data, 12, {"pairs": str(data / "pairs")}, 32)
    code, printed = rank.run(without, limit, "run.accept_change=true")
    assert code == 0, printed
    assert [row["step"] for row in logged(data)] == list(range(1, 13))
    assert stopped < 12
