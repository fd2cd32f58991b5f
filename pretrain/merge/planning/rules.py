"""Weights of a tensor: those of the first rule that matches its name, else those of the merge; layer curves."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from pretrain.merge.planning.request import Request, Rule, compiled, normalized

LAYER = re.compile(r"^(|.*?\.)(layers|layer|blocks|block|resblocks|h)\.(\d+)\.(.+)$")


def split_layer(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers`, 3, `mlp.up_proj.weight`); None outside layers."""
    found = LAYER.match(name)
    return (found[1] + found[2], int(found[3]), found[4]) if found else None


def layer_of(name: str) -> int | None:
    """The layer number in a tensor name; None outside layers."""
    found = split_layer(name)
    return found[1] if found else None


def interpolate(points: Sequence[float], at: float) -> float:
    """The value at `at` of a piecewise linear curve whose points are at equal distances over [0, 1]."""
    if len(points) == 1:
        return points[0]
    place = at * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    share = place - left
    return points[left] * (1 - share) + points[left + 1] * share


class Rules:
    """The `only`, `exclude` and `rules` of a request, applied to tensor names."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._only = compiled(request.only, "only") if request.only is not None else None
        self._exclude = compiled(request.exclude, "exclude") if request.exclude is not None else None
        self._rules = [(compiled(rule.match, "rule"), rule) for rule in request.rules]

    def mixes(self, name: str) -> bool:
        """True if `only`, `exclude` and the rules allow a tensor to be mixed."""
        rule = self.first_match(name)
        excluded = rule is not None and (rule.exclude or rule.copy_from is not None)
        excluded = excluded or (self._exclude is not None and self._exclude.search(name) is not None)
        return not excluded and not self.not_matched_by_only(name)

    def not_matched_by_only(self, name: str) -> bool:
        """True if `only` is set and does not match the name."""
        return self._only is not None and not self._only.search(name)

    def first_match(self, name: str) -> Rule | None:
        """The first rule that applies to a tensor."""
        for pattern, rule in self._rules:
            if pattern.search(name) and (rule.layers is None or _within(rule.layers, name)):
                return rule
        return None

    def unmatched(self, names: Collection[str]) -> list[str]:
        """Descriptions of the patterns and layer ranges that match none of `names`, usually a typing error."""
        found = []
        if self._exclude is not None and not any(map(self._exclude.search, names)):
            found.append(f"exclude '{self._exclude.pattern}' matches no tensor")
        for pattern, rule in self._rules:
            matched = [name for name in names if pattern.search(name)]
            if not matched:
                found.append(f"rule '{rule.match}' matches no tensor")
            elif rule.layers is not None:
                end = max(
                    (number + 1 for name in matched if (number := layer_of(name)) is not None), default=0
                )
                first, stop = rule.layers
                if end <= first or (rule.curve is not None and end < stop):
                    there = f"the model has layers 0:{end}" if end else "no name has a layer"
                    what = f"rule '{rule.match}'" if rule.match else "the curve"
                    found.append(f"{what} is for layers {first}:{stop}, but {there}")
        return found

    def weights(self, name: str, default: Sequence[float]) -> tuple[float, ...]:
        """One resolved weight per input for a mixed tensor; `default`: the weights without a rule."""
        rule = self.first_match(name)
        if rule is None:
            return tuple(default)
        if rule.t is not None:
            return (1.0 - rule.t, rule.t)
        if rule.curve is not None:
            beta = _on_curve(rule, name)
            return (beta, 1.0 - beta)
        assert rule.weights is not None
        divide = self._request.method == "slerp" or (
            self._request.method == "linear" and self._request.normalize
        )
        return normalized(rule.weights, f"rule {rule.match!r}: weights") if divide else rule.weights


def _within(layers: tuple[int, int], name: str) -> bool:
    number = layer_of(name)
    return number is not None and layers[0] <= number < layers[1]


def _on_curve(rule: Rule, name: str) -> float:
    assert rule.layers is not None
    assert rule.curve is not None
    number = layer_of(name)
    assert number is not None
    first, stop = rule.layers
    return interpolate(rule.curve, (number - first) / max(stop - first - 1, 1))
