"""Stream with a batch ramp-up and with changed data, over ranks, workers and resumes, against the naive order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import Stream
from data_pipeline.batches.spec import Batch, SourceSpec
from data_pipeline.errors import UserError
from data_pipeline.order.stream_order import stream_seed
from tests.support.naive_order import Change, Mixture, Source, simulate_order
from tests.support.samples import LENGTH, write_packed

LANES, SEED = 2, 4


def opened(sources: Any, batch: Any, **given: Any) -> Stream:
    return Stream(sources, batch, length=LENGTH, seed=SEED, lanes=LANES, **given)


def served(batch: Batch) -> list[tuple[str, int]]:
    """(shard, index) of each row, read from its tokens, which are shard * 1000 + index."""
    return [divmod(int(row[0]), 1000) for row in batch.tokens]  # type: ignore[misc]


def expected(plan: list[Mixture], steps: int) -> list[list[tuple[int, int]]]:
    seed = stream_seed(SEED, "stream", "stream")
    found = simulate_order(plan, steps, LANES, seed, lambda samples: max(1, samples // 16384))
    return [[row[2:] for row in rows] for rows in found if not isinstance(rows, Change)]


def test_a_ramp_up_is_the_same_from_ranks_workers_and_resumes(tmp_path: Path) -> None:
    path, ramp = str(write_packed(tmp_path / "t", [40, 0, 33])), {0: 4, 3: 8, 5: 12}
    truth = expected([Mixture(0, (Source("source", (40, 0, 33)),), ramp)], 8)
    with opened(path, ramp) as stream:
        whole = [next(stream) for _ in range(8)]
        state = json.loads(json.dumps(stream.state()))
    assert [served(batch) for batch in whole] == truth
    assert [batch.stop for batch in whole] == [4, 4, 4, 8, 8, 12, 12, 12]
    assert state["consumed"] == {"source": 64}
    parts: list[list[Batch]] = []
    for rank in range(2):
        with opened(path, ramp, rank=rank, world_size=2, workers=1) as stream:
            first = [next(stream) for _ in range(4)]
            saved = stream.state()
        with opened(path, ramp, rank=rank, world_size=2) as stream:
            assert stream.resume(saved) == []
            parts.append([*first, *(next(stream) for _ in range(4))])
    for step, batch in enumerate(whole):
        assert [row for part in parts for row in served(part[step])] == truth[step]
        assert sum(part[step].batch_digest for part in parts) % 2**64 == batch.batch_digest
    with opened(path, 4) as stream, pytest.raises(UserError, match=r"batch changed from .* to 4"):
        stream.resume(state)


def test_a_stream_goes_on_with_a_shard_more_and_other_weights(tmp_path: Path) -> None:
    path = write_packed(tmp_path / "a", [20, 11])
    other = str(write_packed(tmp_path / "b", [7]))
    before = {"a": SourceSpec(str(path), weight=0.5), "b": SourceSpec(other, weight=0.5)}
    with opened(before, 8) as stream:
        found = [served(next(stream)) for _ in range(5)]
        state = json.loads(json.dumps(stream.state(), sort_keys=True))
    write_packed(path, [20, 11, 5])
    after = {"a": SourceSpec(str(path), weight=0.75), "b": SourceSpec(other, weight=0.25)}
    with opened(after, 16, workers=1) as stream:
        with pytest.raises(UserError, match="samples of source 'a' changed from 31 to 36"):
            stream.resume(state)
        notes = " ".join(stream.resume(state, accept_change=True))
        assert (
            "source 'a': 11 samples of unfinished epochs will not be used" in notes
        )  # 20 of 31 were visited
        found += [served(next(stream)) for _ in range(3)]
        state = json.loads(json.dumps(stream.state(), sort_keys=True))
        assert stream.resume(state) == []
        found.append(served(next(stream)))
    with opened(after, 16) as stream:
        assert stream.resume(state) == []  # the state knows of the change
        assert stream.resume(state, accept_change=True) == []
        next(stream)
        found.append(served(next(stream)))
    plan = [
        Mixture(0, (Source("a", (20, 11), 0.5), Source("b", (7,), 0.5)), {0: 8}),
        Mixture(5, (Source("a", (20, 11, 5), 0.75), Source("b", (7,), 0.25)), {0: 16}),
    ]
    assert found == expected(plan, 10)


def test_shares_by_the_square_root_of_size(tmp_path: Path) -> None:
    sources = {"large": write_packed(tmp_path / "l", [50, 50]), "small": write_packed(tmp_path / "s", [4])}
    with opened({name: str(path) for name, path in sources.items()}, 12, share_by="sqrt") as stream:
        batches = [next(stream) for _ in range(5)]
        assert stream.order.weights == (5, 1)
    assert sum(batch.samples["small"] for batch in batches) == 10
