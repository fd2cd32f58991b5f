"""The limit on unusable samples in one shard, and what is likely wrong with a shard that passes it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from data_pipeline.sources.tar import IMAGE_EXTENSIONS

Line = dict[str, Any]
"""A line of bad_samples.jsonl."""


class BadShards:
    """Counts unusable samples by shard and epoch, over all ranks: the lines that a step's ranks gathered.

    A sample counts when the order assigns it, once an epoch, and not when it was tried in another's stead. `before` is
    the `state` that a checkpoint kept, so that a resumed run judges as an undisturbed one.
    """

    def __init__(self, limit: int, before: dict[str, list[int]] | None = None) -> None:
        self.limit = limit
        self._counts = {url: (epoch, count) for url, (epoch, count) in (before or {}).items()}

    def state(self) -> dict[str, list[int]]:
        """Url -> latest epoch in which one of its samples was unusable, and how many were in that epoch."""
        return {url: list(each) for url, each in sorted(self._counts.items())}

    def add(self, lines: Iterable[Line]) -> str | None:
        """Count a step's lines; the first of their shards, by name, that holds too many, else None.

        A shard that was over the limit before is not said again unless it goes on: it may have been mended.
        """
        counted = [line for line in lines if line["attempt"] == 0]
        for line in sorted(counted, key=lambda line: (line["url"], line["epoch"])):
            latest, count = self._counts.get(line["url"], (line["epoch"], 0))
            if line["epoch"] >= latest:
                self._counts[line["url"]] = (line["epoch"], count + 1 if line["epoch"] == latest else 1)
        return self.over_limit({line["url"] for line in counted}) if counted else None

    def over_limit(self, urls: Iterable[str] | None = None) -> str | None:
        """The first shard, by name, of these or of all, that holds too many, else None."""
        over = (url for url in sorted(urls or self._counts) if self._counts[url][1] >= self.limit)
        return next(over, None)

    def told(self, url: str, lines: Iterable[Line]) -> str:
        """What to tell the user of a shard over the limit; `lines` are those of bad_samples.jsonl."""
        found = [line for line in lines if line["url"] == url]
        return (
            f"{self._counts[url][1]} samples of {url} are unusable in one epoch, and loader.max_bad_in_shard is "
            f"{self.limit}: {likely_cause(url, found)}. bad_samples.jsonl names them. Mend or leave out that shard, "
            "or raise loader.max_bad_in_shard."
        )


def likely_cause(url: str, lines: list[Line]) -> str:
    """The most frequent reason of a shard's unusable samples, in words that name what to look at."""
    if not lines:
        return "the reasons stand in bad_samples.jsonl"
    (reason, count), *_ = Counter(line["reason"] for line in lines).most_common()
    details = [line["detail"] for line in lines if line["reason"] == reason]
    members = sorted({name for detail in details for name in _members(detail)})
    listed = f"members are {', '.join(f'.{name}' for name in members)}" if members else "there are no members"
    if reason == "missing image":
        return f"no member ending in {'/'.join(IMAGE_EXTENSIONS)} in {count} samples of {url}: {listed}"
    if reason == "missing caption":
        return f"no member txt and no caption in json in {count} samples of {url}: {listed}"
    first = next(line for line in lines if line["reason"] == reason)
    detail = f": {first['detail']}" if first["detail"] else ""
    return f"{count} of them {reason}, for example {first['key']!r}{detail}"


def _members(detail: str) -> list[str]:
    listed = detail.removeprefix("members: ")
    return [] if listed in ("none", detail) else listed.split(", ")


WINDOW = 100
"""Steps over which the fraction of replaced samples is taken."""
AT_LEAST = 200
"""Samples of a source that must have been seen before its fraction counts."""


class TooManyBad(RuntimeError):
    """The share of replaced samples of a source passed the recipe's limit."""


class BadFraction:
    """Watches the share of a source's samples that were replaced over the last steps, summed over ranks.

    `before` is the `state` that a checkpoint kept, so that a resumed run judges as an undisturbed one.
    """

    def __init__(self, limit: float, before: dict[str, list[list[int]]] | None = None) -> None:
        self.limit = limit
        self.steps: dict[str, deque[list[int]]] = {
            source: deque(window, maxlen=WINDOW) for source, window in (before or {}).items()
        }

    def state(self) -> dict[str, list[list[int]]]:
        """[served, replaced] of each of the last steps, by source."""
        return {source: list(window) for source, window in self.steps.items()}

    def add(self, step: int, samples: dict[str, int], skipped: dict[str, dict[str, int]]) -> str | None:
        """Count a step; what to tell the user when a source passes the limit, else None."""
        for source, count in sorted(samples.items()):
            window = self.steps.setdefault(source, deque(maxlen=WINDOW))
            window.append([count, sum(skipped.get(source, {}).values())])
        return self.over_limit(step, skipped)

    def over_limit(self, step: int, skipped: dict[str, dict[str, int]]) -> str | None:
        """What to tell say when a source's last steps pass the limit; `skipped` names the latest step's reasons."""
        for source, window in sorted(self.steps.items()):
            seen, bad = sum(s for s, _ in window), sum(b for _, b in window)
            if seen >= AT_LEAST and bad > self.limit * seen:
                listed = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.get(source, {}).items()))
                return (
                    f"step {step}: {bad} of the last {seen} samples of {source} were replaced, more than "
                    f"loader.max_bad_fraction {self.limit:g}{f' ({listed} in this step)' if listed else ''}. "
                    f"bad_samples.jsonl names them. Mend the source, or raise loader.max_bad_fraction."
                )
        return None
