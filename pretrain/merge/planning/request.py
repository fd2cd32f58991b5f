"""What is asked for, as plain data: inputs, method, weights, rules. Flags, a spec file and Python all become this."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import BASED, METHODS, letter
from pretrain.merge.planning.output_layout import SHARD_SIZE
from pretrain.weights.dtypes import FLOATS

SUMMED = ("task_arithmetic", "dare_linear")
"""methods with a base whose weights --normalize divides by their sum; the others divide entry by entry"""


@dataclass(frozen=True)
class Rule:
    """What is done with tensors in whose name `match` is found; the first rule that matches wins.

    match:     regular expression, found anywhere in the name.
    weights:   one share for each input, in place of the request's.
    t:         slerp: the share of the second input.
    exclude:   not mixed: taken from `copy_rest`, or wherever all inputs agree.
    copy_from: taken as it is from this input (address or letter) or from another address.
    layers:    [start, stop) of the layer numbers that the rule holds for.
    curve:     for two inputs: the weight of the first, given at equal distances over `layers`, linear in between.
    """

    match: str
    weights: tuple[float, ...] | None = None
    t: float | None = None
    exclude: bool = False
    copy_from: str | None = None
    layers: tuple[int, int] | None = None
    curve: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Request:
    """A merge as it is asked for. Defaults are filled in; nothing has been opened.

    inputs:     addresses (pretrain.run.address).
    weights:    resolved: one for each input.
    method:     one of pretrain.merge.merge_plan.METHODS.
    base:       address, or an input's letter; for the methods that add differences to it.
    densities:  one for each input: the share of entries that TIES and DARE keep.
    scale:      lambda: factor of the summed differences.
    normalize:  divide by the sum of the weights; for TIES by those that agree at each entry. In linear merges it
                has been done to `weights` here, and is done to the weights of rules.
    rescale:    DARE: divide what is kept by the density.
    seed:       DARE's random entries.
    only, exclude, rules, copy_rest, dtype, max_shard_size, vocabulary: as in pretrain.merge.spec.
    notes:      what the plan says besides.
    """

    inputs: tuple[str, ...]
    weights: tuple[float, ...]
    method: str = "linear"
    base: str | None = None
    densities: tuple[float, ...] = ()
    scale: float = 1.0
    normalize: bool = True
    rescale: bool = True
    seed: int = 0
    only: str | None = None
    exclude: str | None = None
    rules: tuple[Rule, ...] = ()
    copy_rest: str | None = None
    dtype: str | None = None
    max_shard_size: int = SHARD_SIZE
    vocabulary: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, under the keys of a spec and as JSON and YAML hold it."""
        found = _plain(self)
        found.pop("notes", None)
        found["rules"] = [_plain(rule) for rule in self.rules]
        if set(self.densities) <= {1.0}:
            found["densities"] = []
        if self.method != "slerp":
            found["normalize"] = self.normalize
        return {KEYS.get(name, name): value for name, value in found.items() if value != []}

    @classmethod
    def from_dict(cls, asked: dict[str, Any]) -> Request:
        """What `plain` said; nothing is checked again."""
        names = {key: name for name, key in KEYS.items()}
        given = _tuples({names.get(key, key): value for key, value in asked.items()})
        rules = tuple(Rule(**_tuples(rule)) for rule in asked.get("rules", []))
        return cls(**({"densities": (1.0,) * len(asked["inputs"])} | given | {"rules": rules}))


KEYS = {"scale": "lambda", "densities": "density"}
"""fields that a spec calls otherwise"""


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}


def _plain(record: Request | Rule) -> dict[str, Any]:
    given = {f.name: getattr(record, f.name) for f in fields(record) if getattr(record, f.name) != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def request(
    inputs: Sequence[str],
    *,
    beta: float | None = None,
    weights: Sequence[float] | None = None,
    t: float | None = None,
    method: str = "linear",
    base: str | None = None,
    density: float | Sequence[float] | None = None,
    scale: float | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    seed: int | None = None,
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    **rest: Any,
) -> Request:
    """Check what was asked and fill in what was not; UserError for whatever contradicts itself.

    method:    one of METHODS, or `soup`: linear with equal weights.
    weights:   linear and slerp need them (or `beta`); the methods with a base take 1 for each input.
    normalize: by default true for linear and ties, as in mergekit.
    """
    count = len(inputs)
    if method not in (*METHODS, "soup"):
        raise UserError(f"--method {method}: choose one of {', '.join(METHODS)}, soup")
    based = method in BASED
    if count < (1 if based else 2):
        raise UserError(f"a merge takes two inputs or more, here is {count}")
    if based and base is None:
        raise UserError(f"--method {method} adds differences to a base; say which with --base")
    if base is not None and not based:
        raise UserError(f"--base is for {', '.join(BASED)}; --method {method} has none")
    if base is not None and (base in inputs or base in {letter(i) for i in range(count)}):
        raise UserError(
            f"--base {base} is an input too; its difference to itself is 0: leave it out of the inputs"
        )
    _only_for("--lambda", scale, based, BASED, method)
    sparse = tuple(name for name in BASED if name != "task_arithmetic")
    _only_for("--density", density, method in sparse, sparse, method)
    dare = ("dare_linear", "dare_ties")
    _only_for("--seed", seed, method in dare, dare, method)
    _only_for("--rescale", rescale, method in dare, dare, method)
    _only_for("--t", t, method == "slerp", ("slerp",), method)
    if method == "slerp" and count != 2:
        raise UserError(f"--method slerp is for two inputs, here are {count}")
    if method == "slerp" and normalize is not None:
        raise UserError(
            "--normalize is for linear merges and those with a base; slerp has a share, --t or --beta"
        )
    if normalize is None:
        normalize = method in ("linear", "soup", "slerp", "ties")
    for name in ("only", "exclude"):
        if rest.get(name) is not None:
            compiled(rest[name], name)
    for rule in rules:
        check_rule(rule, count, method)
    return Request(
        inputs=tuple(inputs),
        weights=input_weights(count, method, beta, weights, t, normalize),
        method="linear" if method == "soup" else method,
        base=base,
        densities=input_densities(count, density),
        scale=_finite("--lambda", 1.0 if scale is None else scale),
        normalize=normalize,
        rescale=rescale is not False,
        seed=seed or 0,
        rules=tuple(rules),
        dtype=check_dtype(dtype),
        **{name: value for name, value in rest.items() if value is not None},
    )


def _only_for(flag: str, given: object, fits: bool, methods: Sequence[str], method: str) -> None:
    if given is not None and not fits:
        raise UserError(f"{flag} is for {', '.join(methods)}; --method {method} has no use for it")


def _finite(flag: str, value: float) -> float:
    if not math.isfinite(value):
        raise UserError(f"{flag} {value}: a finite number")
    return float(value)


def check_rule(rule: Rule, count: int, method: str) -> None:
    """Raises UserError for a rule that says nothing, two things, or what the method cannot do."""
    where = f"rule {rule.match!r}"
    compiled(rule.match, where)
    does = [n for n in ("weights", "t", "copy_from", "curve") if getattr(rule, n) is not None]
    does += ["exclude"] if rule.exclude else []
    if len(does) != 1:
        said = " and ".join(does) or "nothing"
        raise UserError(f"{where} says {said}: give it one of beta, weights, t, curve, exclude, copy_from")
    if rule.t is not None and method != "slerp":
        raise UserError(f"{where}: t is for slerp; write beta, the weight of the first input")
    if rule.t is not None and not 0 <= rule.t <= 1:
        raise UserError(f"{where}: t {rule.t:g} is not between 0 and 1")
    if rule.weights is not None:
        finite_weights(count, rule.weights, where)
    if rule.curve is not None:
        if rule.layers is None:
            raise UserError(f"{where}: a curve needs layers, such as 0:32")
        if count != 2 or method not in ("linear", "slerp"):
            raise UserError(f"{where}: a curve is for two inputs, merged with linear or slerp")
        if not rule.curve or not all(0 <= value <= 1 for value in rule.curve):
            raise UserError(f"{where}: a curve is a list of betas between 0 and 1")
    if rule.layers is not None and not 0 <= rule.layers[0] < rule.layers[1]:
        raise UserError(
            f"{where}: layers {rule.layers[0]}:{rule.layers[1]} is empty; write FIRST:END, such as 0:32"
        )


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """The regular expression, or a UserError that says where it stands."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from None


def check_dtype(dtype: str | None) -> str | None:
    """`bf16`, `float32`, `BF16` -> as safetensors spells it."""
    if dtype is None:
        return None
    names = {
        "BFLOAT16": "BF16",
        "FLOAT16": "F16",
        "FP16": "F16",
        "FLOAT32": "F32",
        "FP32": "F32",
        "FLOAT64": "F64",
        "FP64": "F64",
    }
    found = names.get(dtype.upper(), dtype.upper())
    if found not in FLOATS:
        raise UserError(f"--dtype {dtype}: choose one of bf16, fp16, fp32, fp64")
    return found


def input_weights(
    count: int,
    method: str,
    beta: float | None,
    weights: Sequence[float] | None,
    t: float | None,
    normalize: bool,
) -> tuple[float, ...]:
    given = [
        name for name, value in (("--beta", beta), ("--weights", weights), ("--t", t)) if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"say how much of each input once, not with {' and '.join(given)}")
    if method == "soup":
        if given:
            raise UserError(
                f"--method soup takes every input alike; leave {given[0]} out, or take --method linear"
            )
        return (1.0 / count,) * count
    if method in BASED:
        if beta is not None:
            raise UserError(
                "--beta is for linear and slerp; write --weights with a factor for each difference"
            )
        factors = finite_weights(count, weights) if weights is not None else (1.0,) * count
        if normalize and method in SUMMED and abs(math.fsum(factors)) < 1e-8:
            raise UserError(
                f"--normalize divides by the sum of the weights, which is 0 for "
                f"{', '.join(f'{w:g}' for w in factors)}; leave it out, or write other --weights"
            )
        return factors
    if t is not None:
        if not 0 <= t <= 1:
            raise UserError(f"--t {t:g}: between 0 and 1, the share of the second input")
        return (1.0 - float(t), float(t))
    if weights is not None and not normalize:
        return finite_weights(count, weights)
    return resolve_weights(count, beta, weights)


def input_densities(count: int, density: float | Sequence[float] | None) -> tuple[float, ...]:
    listed = (
        [1.0 if density is None else float(density)] if not isinstance(density, Sequence) else list(density)
    )
    if len(listed) == 1:
        listed *= count
    if len(listed) != count:
        raise UserError(
            f"--density: {len(listed)} numbers for {count} inputs; write one for all, or one for each"
        )
    if not all(0 < value <= 1 for value in listed):
        raise UserError(f"--density {', '.join(f'{v:g}' for v in listed)}: above 0, up to 1")
    return tuple(float(value) for value in listed)


def finite_weights(count: int, weights: Sequence[float], where: str = "--weights") -> tuple[float, ...]:
    """One finite number for each input, as given."""
    if len(weights) != count:
        raise UserError(f"{where}: {len(weights)} weights for {count} inputs; write one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"{where}: weights {', '.join(f'{w:g}' for w in weights)}: finite numbers")
    return tuple(float(weight) for weight in weights)


def resolve_weights(count: int, beta: float | None, weights: Sequence[float] | None) -> tuple[float, ...]:
    """fp64 weights of `count` inputs: (beta, 1 - beta) for two, or shares divided by their sum.

    Shares that add up to 1 within 1e-9 are taken as they are.
    """
    if (beta is None) == (weights is None):
        raise UserError(
            "say how much of each input: --beta for two inputs, or --weights with one number for each "
            "(--method soup takes all alike)"
        )
    if beta is not None:
        if count != 2:
            raise UserError(
                f"--beta is for two inputs, here are {count}; write --weights with {count} numbers"
            )
        if not 0 <= beta <= 1:
            raise UserError(
                f"--beta {beta:g}: between 0 and 1; to extrapolate write --weights {beta:g},{1 - beta:g}"
            )
        return (float(beta), 1.0 - float(beta))
    shares = [float(weight) for weight in weights or ()]
    if len(shares) != count:
        raise UserError(f"{len(shares)} weights for {count} inputs; write one for each")
    return normalized(shares)


def normalized(shares: Sequence[float], where: str = "weights") -> tuple[float, ...]:
    """Shares divided by their sum; those that add up to 1 within 1e-9 as they are."""
    total = math.fsum(shares)
    if not all(math.isfinite(share) for share in shares) or abs(total) < 1e-9:
        raise UserError(f"{where} {', '.join(f'{s:g}' for s in shares)}: finite numbers whose sum is not 0")
    return tuple(shares) if abs(total - 1) <= 1e-9 else tuple(share / total for share in shares)
