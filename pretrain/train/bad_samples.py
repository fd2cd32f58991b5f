"""Limits on replaced samples: per shard and epoch, and per source over the last steps; names the likely cause.

Both limits count over all ranks and keep their counts in the checkpoint, so that a resumed run stops at the same step
as an uninterrupted one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from data_pipeline.sources.tar import IMAGE_EXTENSIONS
from pretrain.run.failures import RunStopped

# Steps over which the fraction of replaced samples is taken.
WINDOW_STEPS = 100
# Samples that a source must have served in the window before its fraction is judged.
MIN_SAMPLES = 200

Line = dict[str, Any]  # a line of bad_samples.jsonl


class TooManyBadSamples(RunStopped):
    """A source or a shard has more unusable samples than the recipe's limit."""


class BadShards:
    """Counts the unusable samples of each shard and epoch, over all ranks.

    A sample is counted once per epoch, when the order assigns it; tries as a replacement are not counted.

    limit:          the run stops when a shard has this many unusable samples in one epoch (loader.max_bad_in_shard)
    previous_state: the `state()` in a checkpoint
    """

    def __init__(self, limit: int, previous_state: dict[str, list[int]] | None = None) -> None:
        self.limit = limit
        self._counts = {url: (epoch, count) for url, (epoch, count) in (previous_state or {}).items()}

    def state(self) -> dict[str, list[int]]:
        """URL -> [latest epoch with an unusable sample, unusable samples in that epoch]."""
        return {url: list(entry) for url, entry in sorted(self._counts.items())}

    def add(self, lines: Iterable[Line]) -> str | None:
        """Count the bad_samples.jsonl lines of one step; return the first shard, by name, at the limit, else None.

        Only shards with new unusable samples are judged: the user may have repaired a shard after an earlier run.
        """
        counted = [line for line in lines if line["attempt"] == 0]
        for line in sorted(counted, key=lambda line: (line["url"], line["epoch"])):
            latest, count = self._counts.get(line["url"], (line["epoch"], 0))
            if line["epoch"] >= latest:
                self._counts[line["url"]] = (line["epoch"], count + 1 if line["epoch"] == latest else 1)
        return self.over_limit({line["url"] for line in counted}) if counted else None

    def over_limit(self, urls: Iterable[str] | None = None) -> str | None:
        """The first shard, by name, of `urls` (default: all) that is at the limit, else None."""
        over = (url for url in sorted(urls or self._counts) if self._counts[url][1] >= self.limit)
        return next(over, None)

    def message(self, url: str, lines: Iterable[Line]) -> str:
        """The error text for a shard at the limit; `lines` are those of bad_samples.jsonl."""
        of_shard = [line for line in lines if line["url"] == url]
        return (
            f"{self._counts[url][1]} samples of {url} are unusable in one epoch, and loader.max_bad_in_shard is "
            f"{self.limit}: {likely_cause(url, of_shard)}. bad_samples.jsonl lists them. Repair or remove that shard, "
            "or raise loader.max_bad_in_shard."
        )


class BadFraction:
    """Fraction of a source's samples that were replaced over the last WINDOW_STEPS steps, over all ranks.

    limit:          largest accepted fraction (loader.max_bad_fraction)
    previous_state: the `state()` in a checkpoint
    """

    def __init__(self, limit: float, previous_state: dict[str, list[list[int]]] | None = None) -> None:
        self.limit = limit
        self.steps: dict[str, deque[list[int]]] = {
            source: deque(window, maxlen=WINDOW_STEPS) for source, window in (previous_state or {}).items()
        }

    def state(self) -> dict[str, list[list[int]]]:
        """Source -> [served, replaced] samples of each step in the window."""
        return {source: list(window) for source, window in self.steps.items()}

    def add(self, step: int, samples: dict[str, int], skipped: dict[str, dict[str, int]]) -> str | None:
        """Count one step; return the error text when a source is over the limit, else None."""
        for source, count in sorted(samples.items()):
            window = self.steps.setdefault(source, deque(maxlen=WINDOW_STEPS))
            window.append([count, sum(skipped.get(source, {}).values())])
        return self.over_limit(step, skipped)

    def over_limit(self, step: int, skipped: dict[str, dict[str, int]]) -> str | None:
        """The error text when a source is over the limit, else None; `skipped`: reasons of the latest step."""
        for source, window in sorted(self.steps.items()):
            served, replaced = sum(s for s, _ in window), sum(r for _, r in window)
            if served >= MIN_SAMPLES and replaced > self.limit * served:
                reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.get(source, {}).items()))
                return (
                    f"step {step}: {replaced} of the last {served} samples of {source} were replaced, more than "
                    f"loader.max_bad_fraction {self.limit:g}{f' ({reasons} in this step)' if reasons else ''}. "
                    f"bad_samples.jsonl lists them. Repair the source, or raise loader.max_bad_fraction."
                )
        return None


def likely_cause(url: str, lines: list[Line]) -> str:
    """The most frequent reason among a shard's unusable samples, with the members or the sample to look at."""
    if not lines:
        return "unknown cause"
    # A sample has a line for every try, also as a replacement: count each sample once per reason.
    samples = dict.fromkeys((line["reason"], line["key"]) for line in lines)
    (reason, count), *_ = Counter(reason for reason, _ in samples).most_common()
    details = [line["detail"] for line in lines if line["reason"] == reason]
    members = sorted({name for detail in details for name in _members(detail)})
    listed = f"members are {', '.join(f'.{name}' for name in members)}" if members else "there are no members"
    if reason == "missing image":
        return f"no member ending in {'/'.join(IMAGE_EXTENSIONS)} in {count} samples of {url}: {listed}"
    if reason == "missing caption":
        return f"no member txt and no caption in json in {count} samples of {url}: {listed}"
    first = next(line for line in lines if line["reason"] == reason)
    detail = f": {first['detail']}" if first["detail"] else ""
    number = "1 sample" if count == 1 else f"{count} samples"
    return f"the most frequent reason is {reason} ({number}), for example {first['key']!r}{detail}"


def _members(detail: str) -> list[str]:
    """Member names in the detail of a missing image or caption; empty for any other detail."""
    listed = detail.removeprefix("members: ").partition(";")[0]
    return [] if listed == "none" or not detail.startswith("members: ") else listed.split(", ")
