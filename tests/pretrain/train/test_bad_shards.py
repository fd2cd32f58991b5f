"""Limit on unusable samples per shard: compared with sets of keys; the error names the likely cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.loader.loader import LocalLoader
from pretrain.train.bad_samples import BadShards, likely_cause
from tests.support.samples import Members, encode, members, pairs, pixels, write_source


def line(url: str, key: str, epoch: int = 0, attempt: int = 0, **rest: str) -> dict[str, Any]:
    given = {"source": "web", "reason": "missing image", "detail": "members: image, json"}
    return {"url": url, "key": key, "epoch": epoch, "attempt": attempt} | given | rest


def test_a_shard_reaches_its_limit_within_one_epoch() -> None:
    """Random steps over three epochs that overlap at their borders, compared with sets of keys."""
    generator = np.random.default_rng(3)
    fired = 0
    for limit in (1, 5, 30):
        limited = BadShards(limit)
        seen: dict[str, tuple[int, set[str]]] = {}
        for step in range(90):
            lines = [
                line(
                    f"{generator.integers(4)}.tar",
                    str(generator.integers(1 << 60)),
                    max(0, step // 30 - int(generator.integers(2)) * (step % 30 < 2)),
                    int(generator.integers(2)),
                )
                for _ in range(generator.integers(4))
            ]
            for each in sorted(lines, key=lambda each: each["epoch"]):
                epoch, keys = seen.get(each["url"], (each["epoch"], set()))
                if each["attempt"] == 0 and each["epoch"] >= epoch:
                    keys = keys | {each["key"]} if each["epoch"] == epoch else {each["key"]}
                    seen[each["url"]] = (each["epoch"], keys)
            touched = {each["url"] for each in lines if each["attempt"] == 0}
            over = sorted(url for url in touched if len(seen[url][1]) >= limit)
            generator.shuffle(lines)  # type: ignore[arg-type]
            assert limited.add(lines) == (over[0] if over else None)
            fired += bool(over)
            limited = BadShards(limit, json.loads(json.dumps(limited.state())))  # as a resume does
    assert fired > 30


def test_a_repaired_shard_does_not_stop_a_resumed_run() -> None:
    limited = BadShards(2)
    assert limited.add([line("a.tar", "1"), line("a.tar", "2")]) == "a.tar"
    again = BadShards(2, limited.state())
    assert again.add([]) is None
    assert again.add([line("b.tar", "1")]) is None
    assert again.over_limit() == "a.tar"
    assert again.add([line("a.tar", "3")]) == "a.tar"


def test_the_cause_of_real_shards_is_named(tmp_path: Path) -> None:
    """Members of an unknown type, missing captions, and bytes that are not an image."""
    plain = [members(0, i) for i in range(6)]
    broken: list[list[Members]] = [
        [{"image": m["png"], "txt": m["txt"], "json": m["json"]} for m in plain],
        [{"png": m["png"]} for m in plain],
        [m | {"png": b"<html>404</html>"} for m in plain],
        [m | {"png": encode(pixels(3, i))} for i, m in enumerate(plain)],
    ]
    replace = {(shard, i): m for shard, samples in enumerate(broken) for i, m in enumerate(samples)}
    spec = pairs(tmp_path, batch=24, laion=write_source(tmp_path / "laion", [6, 6, 6, 6], replace))
    with LocalLoader([spec], 0, 1, 0, builders={"pairs": BatchBuilder(spec)}) as loader:
        lines = json.loads(json.dumps(next(loader.steps(0, 1))["pairs"][0].bad))
    limited = BadShards(6)
    over = limited.add(lines)
    urls = sorted({each["url"] for each in lines})
    assert [url[-9:] for url in urls] == ["00000.tar", "00001.tar", "00002.tar"]
    assert over == urls[0]
    assert {url: count for url, (_, count) in limited.state().items()} == dict.fromkeys(urls, 6)
    message = limited.message(urls[0], lines)
    for part in (
        "6 samples of",
        "loader.max_bad_in_shard is 6",
        "no member ending in jpg/jpeg/png/webp",
        "laion/00000.tar: members are .image, .json, .txt",
        "bad_samples.jsonl",
    ):
        assert part in message
    assert "no member txt and no caption in json" in likely_cause(
        urls[1], [x for x in lines if x["url"] == urls[1]]
    )
    assert "members are .png" in limited.message(urls[1], lines)
    assert "the most frequent reason is undecodable (6 samples), for example '00" in limited.message(
        urls[2], lines
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_several_ranks_count_what_one_rank_counts(tmp_path: Path, world_size: int) -> None:
    replace = {(0, i): {"txt": b"a"} for i in range(0, 20, 2)}
    spec = pairs(tmp_path, batch=12, web=write_source(tmp_path / "web", [20, 30], replace))
    whole, parts = BadShards(8), BadShards(8)
    builder = BatchBuilder(spec)
    loaders = [LocalLoader([spec], rank, world_size, 0, 5) for rank in range(world_size)]
    fired = []
    for step, made in enumerate(zip(*(loader.steps(0, 12) for loader in loaders), strict=True)):
        lines = [each for rank in made for batch in rank["pairs"] for each in batch.bad]
        found = whole.add(builder.make(step, 0, 12).bad)
        assert parts.add(lines) == found
        assert parts.state() == whole.state()
        fired.append(found)
    assert any(fired)
    assert not all(fired)
    for loader in loaders:
        loader.close()
