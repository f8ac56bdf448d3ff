"""The registered ops as typed functions: CPU and CUDA, differentiable where that has a meaning.

``ch_axis=-1`` means per tensor. A statistic is three tensors: ``extrema`` float32 [C,2],
``tally`` int64 [C,5] (finite, zeros, tiny, inf, nan) and ``counts`` int64 [C,2,W,2^m], or
[C,2,0,0] for a rule that reads no histogram.

Every rule of the registry is also a function of one tensor, by its own name::

    ops.percentile(x, quant_min=-128, quant_max=127, symmetric=True, ch_axis=-1, percentile=99.9)

A violated contract raises ``RuntimeError`` reading ``op: expected ARG to be WANT, got HAVE``.
"""

from torch_ext.ops.functions import (
    fake_quant,
    follow_,
    follow_fake_quant,
    kl_threshold,
    learned_fake_quant,
    lsq,
    merge_,
    observe_,
    pact,
    qparams,
    solve,
    solve_many,
)
from torch_ext.ops.registry import rule_names
from torch_ext.ops.rule_functions import RuleFunction, rule_function

__all__ = [
    "fake_quant",
    "follow_",
    "follow_fake_quant",
    "kl_threshold",
    "learned_fake_quant",
    "lsq",
    "merge_",
    "observe_",
    "pact",
    "qparams",
    "solve",
    "solve_many",
]


def __getattr__(name: str) -> RuleFunction:
    if name in rule_names():
        return rule_function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *rule_names()])
