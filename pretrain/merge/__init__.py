"""Interpolates checkpoints: streaming, bit-exact, resumable, without torch. The names below are stable.

    merge(inputs, out, beta=0.4)            merges two or more addresses into one folder of safetensors
    sweep(a, b, betas, out)                 merges many betas in one pass over the inputs
    interpolated(a, b, beta)                a merged state dict, computed lazily; writes nothing
    plan(inputs, beta=0.4)                  the plan that `merge` would execute, as pure data
    Rule(match, weights=..., copy_from=...) other weights for some tensors, for merge(..., rules=[...])
    open_weights(address)                   reads names, shapes and ranges of any weights

theta = sum of weight x input; for two inputs theta = beta * A + (1 - beta) * B: beta is the weight of the first input
(in other tools, of the second). The weights (factors) are fp64, rounded once to the accumulation type (fp32 for 16-bit
inputs, fp64 for wider ones); each product is rounded and added in the given order, without FMA; the sum is rounded
once, to nearest even. Inputs of weight 0 are not read; a single input of weight 1 is copied byte for byte.
Other methods (method="ties", base=...) and all options: pretrain.merge.planning.request. YAML files, including
mergekit's: pretrain.merge.spec.
"""

from pretrain.merge.execute import merge, plan
from pretrain.merge.planning.request import Rule
from pretrain.merge.sweeps.results import parse_betas
from pretrain.merge.sweeps.sweep import interpolated, sweep
from pretrain.weights.source import WeightSource, open_weights

__all__ = ["Rule", "WeightSource", "interpolated", "merge", "open_weights", "parse_betas", "plan", "sweep"]
