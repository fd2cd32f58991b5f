"""`LeftOut`: counts what a tar holds that is in no sample: links, names without extension, images behind a second dot.

A tar keeps its samples whatever else it holds, so nothing here is an error; whoever opens a source says it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# webdataset skips members such as __index__/x.json: they describe the tar and belong to no sample.
META_MEMBER = re.compile(r"__[^/]*__($|/)")
SYMBOLIC, HARD, SPECIAL, NAMELESS, HIDDEN, DOTTED = (
    "symbolic links",
    "hard links to files that are not in the tar",
    "devices and pipes",
    "files without an extension in their name",
    "files whose name begins with a dot",
    "images with more than one dot in their name",
)
WITH_LINKS = "write the tars with: tar --dereference --hard-dereference"
# Reason -> what to do.
ADVICE = {
    SYMBOLIC: WITH_LINKS,
    HARD: WITH_LINKS,
    SPECIAL: "remove them from the tars",
    NAMELESS: "name the files of a sample KEY.jpg, KEY.txt",
    HIDDEN: "remove them, or rename them if they are data",
    DOTTED: "rename them with _ in place of all dots but the last",
}
NOTED_SHARE = 0.01  # per sample; more than that is a problem of `data show`
MAX_NAME = 120  # characters of a name in a message


class LeftOutWarning(UserWarning):
    """A source holds files that are in no sample."""


@dataclass
class LeftOut:
    """counts: reason -> members; first: reason -> name of the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str, number: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + number
        self.first.setdefault(reason, name)

    def add_name(self, name: str) -> None:
        """Count a regular file whose name gives no key and extension."""
        if name[:2] == "__" and META_MEMBER.match(name):
            return
        self.add(HIDDEN if name[name.rfind("/") + 1 :].startswith(".") else NAMELESS, name)

    def merge(self, other: LeftOut, shard: str) -> None:
        """Add the counts of one tar; `shard` is its path, for the names."""
        for reason, number in other.counts.items():
            self.add(reason, f"{_short(other.first[reason])} in {shard}", number)

    def sentences(self, where: str) -> dict[str, str]:
        """Reason -> one sentence: what, where, what to do."""
        return {
            reason: f"{where}: {self.counts[reason]:,} {reason} {_fate(reason)}; the first is {self.first[reason]}; "
            f"{advice}"
            for reason, advice in ADVICE.items()
            if reason in self.counts
        }

    def is_problem(self, reason: str, samples: int) -> bool:
        """True if it is probably data that is lost; few of them, or hidden files, are only noted."""
        return reason != HIDDEN and self.counts[reason] > NOTED_SHARE * samples

    def to_json(self) -> str:
        return json.dumps(
            {reason: [number, _short(self.first[reason])] for reason, number in self.counts.items()}
        )


def from_json(text: str) -> LeftOut:
    """The inverse of `LeftOut.to_json`; entries of another shape are ignored."""
    found = LeftOut()
    for reason, value in json.loads(text).items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], int):
            found.add(reason, str(value[1]), value[0])
    return found


def dotted_images(extensions: Iterable[str], image_extensions: Iterable[str]) -> list[str]:
    """Members of a sample that are probably images of other samples.

    Webdataset's rule that an extension begins at the first dot makes of `cdn.org_1.jpg` and `cdn.org_2.jpg` one sample
    with the members `org_1.jpg` and `org_2.jpg`. A second image beside the sample's own, such as `seg.png`, is none of
    them, unless it has a caption of its own.
    """
    present = dict.fromkeys(extensions)
    images = frozenset(image_extensions)
    dotted = [name for name in present if "." in name and name.rpartition(".")[2] in images]
    if not dotted or images.isdisjoint(present):
        return dotted
    return [name for name in dotted if f"{name.rpartition('.')[0]}.txt" in present]


def combined(found: Mapping[str, LeftOut]) -> LeftOut:
    """Sum over tars; `found` maps the path of a tar to what it leaves out."""
    total = LeftOut()
    for shard, left_out in found.items():
        total.merge(left_out, shard)
    return total


def _fate(reason: str) -> str:
    if reason == DOTTED:
        return "are no image of a sample, because an extension begins at the first dot of a name"
    return "are in no sample"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
