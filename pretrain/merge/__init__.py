"""Interpolating checkpoints: streaming, bit-exact, without torch. The names below are stable.

    merge(inputs, out, beta=0.4)            two or more addresses into one folder of safetensors
    sweep(a, b, betas, out)                 many betas in one pass over the inputs
    interpolated(a, b, beta)                a merged state dict, computed lazily, nothing written
    plan(inputs, beta=0.4)                  what `merge` would do, as pure data
    Rule(match, weights=..., copy_from=...) other weights by name, for merge(..., rules=[...])
    open_weights(address)                   names, shapes and flat ranges of anything that holds weights

theta = sum of weight x input; for two inputs theta = beta * A + (1 - beta) * B, so beta is the weight of the first
(other tools mean the second model's). Weights are fp64, rounded once to the accumulation type (fp32 for 16-bit
inputs, fp64 for wider ones); each product is rounded, then added in the order given, without FMA; one rounding to
nearest even at the end. Inputs of weight 0 are not read; a lone input of weight 1 is copied byte for byte.
Other methods (method="ties", base=...) and all that can be asked for: pretrain.merge.planning.request; as a file,
mergekit's too: pretrain.merge.spec.
"""

from pretrain.merge.execute import merge, plan
from pretrain.merge.planning.request import Rule
from pretrain.merge.sweeps.results import parse_betas
from pretrain.merge.sweeps.sweep import interpolated, sweep
from pretrain.weights.source import WeightSource, open_weights

__all__ = ["Rule", "WeightSource", "interpolated", "merge", "open_weights", "parse_betas", "plan", "sweep"]
