"""Chooses one of a sample's captions: a random draw among all of them, or among the best k by score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import ContentError, UserError
from data_pipeline.text_encoding import check_text, decode_text

JSON_PREFIX = "json."
# Fields of the json member that may contain captions, in order of preference; read if txt is absent or blank.
# img2dataset and most other tools write `caption`; LAION-COCO writes the best of its captions to `top_caption`.
CAPTION_FIELDS = ("caption", "captions", "top_caption", "all_captions")


MAX_LISTED = 8  # names of members or fields in a message


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
    Without `spec`, the candidates are the txt member if it has text, else the first of CAPTION_FIELDS in the json
    member with a caption. The draw has no influence on the verdict: one bad candidate makes the sample unusable.
    Raises ContentError: `missing caption` if all are blank or absent, `bad json`, `not UTF-8`, `NUL in text`.
    """
    candidates, scores = _default_candidates(members) if spec is None else _candidates(members, spec)
    usable = [number for number, text in enumerate(candidates) if text]
    if not usable:
        raise ContentError("missing caption", _description(members))
    usable.sort(key=lambda number: -scores[number])
    if spec is not None and spec.top is not None:
        usable = usable[: spec.top]
    choice = usable[0 if draw is None else draw * len(usable) >> 64]
    return candidates[choice], choice


def _description(members: Mapping[str, bytes]) -> str:
    """What a sample without caption has: its members, and the fields of its json, one of which may be the caption."""
    listed = f"members: {', '.join(list(members)[:MAX_LISTED]) or 'none'}"
    with suppress(ContentError):
        fields = list(json_member(members))[:MAX_LISTED]
        if fields:
            listed += (
                f"; json has {', '.join(fields)}; text.captions.from can name another field (json.FIELD)"
            )
    return listed


def json_member(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The parsed `json` member; empty if there is none. Raises ContentError: `bad json`, `not UTF-8`, `NUL in text`."""
    if "json" not in members:
        return {}
    text = decode_text(members["json"])  # json would also accept UTF-16 without a mark, and lone surrogates
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContentError("bad json", str(error)) from error
    if not isinstance(value, dict):
        raise ContentError("bad json", f"a {type(value).__name__} where an object is expected")
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts(value: Any) -> list[str]:
    """The captions of a json field, stripped; "" for an entry that is no text. Raises ContentError."""
    return [check_text(text).strip() if isinstance(text, str) else "" for text in _as_list(value)]


def _default_candidates(members: Mapping[str, bytes]) -> tuple[list[str], list[float]]:
    """Captions without a CaptionSpec, all with the same score."""
    if "txt" in members:
        text = decode_text(members["txt"]).strip()
        if text or "json" not in members:
            return [text], [0.0]
    fields = json_member(members)
    lists = (_texts(fields.get(field)) for field in CAPTION_FIELDS)
    captions = next((texts for texts in lists if any(texts)), [])
    return captions, [0.0] * len(captions)


def _candidates(members: Mapping[str, bytes], spec: CaptionSpec) -> tuple[list[str], list[float]]:
    """Captions of the members that `spec` names, and one score each; minus infinity if its score is not a number."""
    names = (*spec.members, *spec.scores)
    fields = (
        json_member(members)
        if any(name is not None and name.startswith(JSON_PREFIX) for name in names)
        else {}
    )

    def texts(name: str) -> list[str]:
        if name.startswith(JSON_PREFIX):
            return _texts(fields.get(name.removeprefix(JSON_PREFIX)))
        return [decode_text(members[name]).strip()] if name in members else []

    captions: list[str] = []
    scores: list[float] = []
    for name, scored_by in zip(spec.members, spec.scores or [None] * len(spec.members), strict=True):
        found = texts(name)
        numbers = [] if scored_by is None else _as_list(fields.get(scored_by.removeprefix(JSON_PREFIX)))
        captions += found
        scores += ([_score(value) for value in numbers] + [-math.inf] * len(found))[: len(found)]
    return captions, scores


def _score(value: Any) -> float:
    """A score as float; minus infinity for anything else, such as a bool, NaN, or an int beyond the range of float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return -math.inf
    try:
        return -math.inf if math.isnan(value) else float(value)
    except OverflowError:
        return -math.inf
