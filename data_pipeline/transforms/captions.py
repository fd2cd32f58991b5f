"""Chooses one of a sample's captions: a random draw among all of them, or among the best k by score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import ContentError, UserError

JSON_PREFIX = "json."
# Fields of the json member that may contain captions, in order of preference; read if there is no txt member.
# img2dataset and most other tools write `caption`; LAION-COCO writes the best of its captions to `top_caption`.
CAPTION_FIELDS = ("caption", "captions", "top_caption", "all_captions")


@dataclass(frozen=True)
class CaptionSpec:
    """Location of the captions in a sample, and how many of the best to draw from (BLIP-2, Li et al. 2023, 3.4).

    members: text members such as `txt`, or fields `json.FIELD`; each has one caption or a list of captions. All are
        candidates, numbered in this order
    scores: one field `json.FIELD` per entry of `members`, with the scores in the same shape; None: no scores
    top: number of captions kept, highest scores first. Of equal scores the first caption counts as better; captions
        without a score are last. None: all
    """

    members: tuple[str, ...]
    scores: tuple[str | None, ...] = ()
    top: int | None = None

    def __post_init__(self) -> None:
        if not self.members or "json" in self.members:
            raise UserError(
                "text.captions.from (in Python: CaptionSpec.members): write the members that contain captions, such as "
                "txt or json.caption"
            )
        if self.scores and len(self.scores) != len(self.members):
            raise UserError(
                f"text.captions.scores: {len(self.scores)} entries for {len(self.members)} members in `from`; "
                "write one entry per member, null for a member without scores"
            )
        invalid = next(
            (name for name in self.scores if name is not None and not name.startswith(JSON_PREFIX)), None
        )
        if invalid is not None:
            raise UserError(
                f"text.captions.scores: {invalid}: scores are read from the json member; write json.FIELD"
            )
        if self.top is not None and self.top < 1:
            raise UserError(f"text.captions.top is {self.top}; it must be at least 1")


def pick_caption(
    members: Mapping[str, bytes], draw: int | None, spec: CaptionSpec | None = None
) -> tuple[str, int]:
    """One caption of a sample, and its number among the sample's captions.

    `draw`, below 2**64, chooses one of the usable captions (of the best `spec.top`); None takes the first or best one.
    Without `spec`, the candidates are the txt member, else the first of CAPTION_FIELDS in the json member with a
    caption. Raises ContentError: `missing caption` if all are blank or absent, `bad json`.
    """
    candidates, scores = _default_candidates(members) if spec is None else _candidates(members, spec)
    usable = [number for number, text in enumerate(candidates) if _is_text(text)]
    if not usable:
        raise ContentError("missing caption", f"members: {', '.join(members) or 'none'}")
    usable.sort(key=lambda number: -scores[number])
    if spec is not None and spec.top is not None:
        usable = usable[: spec.top]
    choice = usable[0 if draw is None else draw * len(usable) >> 64]
    # A lone surrogate is legal in JSON but not in UTF-8.
    return candidates[choice].encode("utf-8", "replace").decode("utf-8").strip(), choice


def json_member(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The parsed `json` member; empty if there is none. Raises ContentError `bad json`."""
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


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _default_candidates(members: Mapping[str, bytes]) -> tuple[list[Any], list[float]]:
    """Captions without a CaptionSpec, all with the same score."""
    if "txt" in members:
        return [members["txt"].decode("utf-8", "replace")], [0.0]
    fields = json_member(members)
    lists = (_as_list(fields.get(field)) for field in CAPTION_FIELDS)
    captions = next((texts for texts in lists if any(map(_is_text, texts))), [])
    return captions, [0.0] * len(captions)


def _candidates(members: Mapping[str, bytes], spec: CaptionSpec) -> tuple[list[Any], list[float]]:
    """Captions of the members that `spec` names, and one score each; minus infinity if its score is not a number."""
    names = (*spec.members, *spec.scores)
    fields = (
        json_member(members)
        if any(name is not None and name.startswith(JSON_PREFIX) for name in names)
        else {}
    )

    def values(name: str) -> list[Any]:
        if name.startswith(JSON_PREFIX):
            return _as_list(fields.get(name.removeprefix(JSON_PREFIX)))
        return [members[name].decode("utf-8", "replace")] if name in members else []

    captions: list[Any] = []
    scores: list[float] = []
    for name, scored_by in zip(spec.members, spec.scores or [None] * len(spec.members), strict=True):
        texts = values(name)
        known = [] if scored_by is None else [_score(value) for value in values(scored_by)]
        captions += texts
        scores += (known + [-math.inf] * len(texts))[: len(texts)]
    return captions, scores


def _score(value: Any) -> float:
    """A score as float; minus infinity for anything else, such as a bool, NaN, or an int beyond the range of float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return -math.inf
    try:
        return -math.inf if math.isnan(value) else float(value)
    except OverflowError:
        return -math.inf
