"""`KINDS`: what the recipe knows of each objective kind: the keys of its `objective` section, its rules, its arrays.

Imports no torch, so that `dromos recipe check` starts fast. A new kind is a file beside this one and one line in KINDS;
`BUILDERS` in pretrain/build/objective.py has the same keys.
"""

from __future__ import annotations

from pretrain.recipe.kinds import contrastive, generative
from pretrain.recipe.kinds.base import KindSpec

KINDS: dict[str, KindSpec] = {"contrastive": contrastive.SPEC, "generative": generative.SPEC}
