"""Which of a sample's captions is served: one draw among all there are, or among the best by score."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import ContentError, UserError

JSON_PREFIX = "json."
# Fields of the json member, the first of which that holds a caption is taken where there is no txt. img2dataset and
# most others write `caption`; LAION-COCO has the best of its captions in `top_caption`.
CAPTION_FIELDS = ("caption", "captions", "top_caption", "all_captions")


@dataclass(frozen=True)
class CaptionSpec:
    """Where captions stand, and how many of the best one is drawn from (BLIP-2, Li et al. 2023, section 3.4).

    members: `txt` or another member of text, or `json.FIELD`; each holds one caption or a list of them. All are
    candidates, numbered in this order.
    scores: fields `json.FIELD`, one for each of `members`, that hold their scores in the same shape; None: no scores.
    top: how many of the best are kept, by score (of equal ones the first; without a score last); None: all
    """

    members: tuple[str, ...]
    scores: tuple[str | None, ...] = ()
    top: int | None = None

    def __post_init__(self) -> None:
        if not self.members or "json" in self.members:
            raise UserError("text.captions.from: name members with captions, such as txt or json.caption")
        if self.scores and len(self.scores) != len(self.members):
            raise UserError(
                f"text.captions.scores: {len(self.scores)} for {len(self.members)} members in `from`; write one for "
                "each, null for one that has no scores"
            )
        wrong = next(
            (name for name in self.scores if name is not None and not name.startswith(JSON_PREFIX)), None
        )
        if wrong is not None:
            raise UserError(
                f"text.captions.scores: {wrong}: scores stand in the json member; write json.FIELD"
            )
        if self.top is not None and self.top < 1:
            raise UserError(f"text.captions.top: {self.top} captions cannot be drawn from; write 1 or more")


def pick_caption(
    members: dict[str, bytes], draw: int | None, spec: CaptionSpec | None = None
) -> tuple[str, int]:
    """Caption of a sample and its number among the sample's captions.

    `draw`, below 2**64, chooses among those that come into question; None takes the first, or best, of them. Without
    `spec`, the candidates are the txt member, else those of the first of CAPTION_FIELDS in the json member that has any.
    Raises ContentError `missing caption` if all are blank or absent.
    """
    candidates, scores = _usual(members) if spec is None else _named(members, spec)
    usable = [number for number, text in enumerate(candidates) if _is_text(text)]
    if not usable:
        raise ContentError("missing caption", f"members: {', '.join(members) or 'none'}")
    usable.sort(key=lambda number: -scores[number])
    if spec is not None and spec.top is not None:
        usable = usable[: spec.top]
    choice = usable[0 if draw is None else draw * len(usable) >> 64]
    # A lone surrogate is legal in JSON but not in UTF-8.
    return candidates[choice].encode("utf-8", "replace").decode("utf-8").strip(), choice


def json_member(members: dict[str, bytes]) -> dict[str, Any]:
    """The parsed `json` member, empty if there is none. Raises ContentError `bad json`."""
    if "json" not in members:
        return {}
    try:
        value = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise ContentError("bad json", str(error)) from error
    if not isinstance(value, dict):
        raise ContentError("bad json", f"a {type(value).__name__} where an object is expected")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _usual(members: dict[str, bytes]) -> tuple[list[Any], list[float]]:
    if "txt" in members:
        return [members["txt"].decode("utf-8", "replace")], [0.0]
    about = json_member(members)
    found = (_listed(about.get(field)) for field in CAPTION_FIELDS)
    captions = next((listed for listed in found if any(map(_is_text, listed))), [])
    return captions, [0.0] * len(captions)


def _named(members: dict[str, bytes], spec: CaptionSpec) -> tuple[list[Any], list[float]]:
    """All captions of the members named and a score for each; minus infinity where it has none that is a number."""
    names = (*spec.members, *spec.scores)
    about = (
        json_member(members)
        if any(name is not None and name.startswith(JSON_PREFIX) for name in names)
        else {}
    )

    def values(name: str) -> list[Any]:
        if name.startswith(JSON_PREFIX):
            return _listed(about.get(name.removeprefix(JSON_PREFIX)))
        return [members[name].decode("utf-8", "replace")] if name in members else []

    captions: list[Any] = []
    scores: list[float] = []
    for name, scored_by in zip(spec.members, spec.scores or [None] * len(spec.members), strict=True):
        found = values(name)
        told = [] if scored_by is None else [_number(value) for value in values(scored_by)]
        captions += found
        scores += (told + [-math.inf] * len(found))[: len(found)]
    return captions, scores


def _number(value: Any) -> float:
    """A bool is an int to Python, NaN compares as nothing, and an int may exceed every float: none is a score."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return -math.inf
    try:
        return -math.inf if math.isnan(value) else float(value)
    except OverflowError:
        return -math.inf
