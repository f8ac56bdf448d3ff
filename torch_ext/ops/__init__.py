"""The native ops as typed functions, for CPU and CUDA tensors.

The quantizing ops (``fake_quant``, ``dynamic_fake_quant``, ``lsq``, ``pact``,
``learned_fake_quant`` and ``follow_fake_quant``) give a tensor of the shape and dtype of ``x`` and
are differentiable, any number of times, in forward mode too, and under ``torch.func``; the others
have no gradient. Ops whose names end in ``_``, and ``follow_fake_quant``, write to buffers as
torch's in-place ops do: autograd finds a buffer that it saved and that was overwritten, and they
refuse tensors that require a gradient.

Arguments that mean the same everywhere:

- ``x``: float32, float64, float16 or bfloat16, of any shape and strides.
- ``ch_axis``: the axis of ``x`` along which the C channels lie; -1: one range for the whole
  tensor, C = 1.
- ``quant_min``, ``quant_max``: the least and the greatest integer of the grid, at most 16 bits.
- ``symmetric``: True for a grid with zero point 0, False for an affine one.
- ``scale_rule``, ``power_of_two``: how a scale is computed from a range, see :func:`qparams`.
- ``mask``, ``rounding``: see :func:`fake_quant`.

A statistic is three contiguous tensors:

- ``extrema`` float32 [C,2]: the least and the greatest finite value; (inf, -inf) before any.
- ``tally`` int64 [C,5]: how many values were finite, zero, too small for the histogram ("tiny"),
  infinite and NaN. Zero and tiny values are among the finite ones.
- ``counts`` int64 [C,2,octaves,2^mantissa_bits]: the histogram of magnitudes of either sign, or
  [C,2,0,0] if none is kept.

Every rule of the registry is also a function of one tensor, by its own name::

    ops.percentile(x, quant_min=-128, quant_max=127, symmetric=True, ch_axis=-1, percentile=99.9)

Arguments of a wrong dtype, shape, device or value raise RuntimeError, which reads ``op: expected
ARG to be WANT, got HAVE``. The values of CUDA tensors are not checked, because that would
synchronize with the host: a bad scale or statistic gives NaN there.
"""

from torch_ext.ops.quantizing import (
    dynamic_fake_quant,
    fake_quant,
    follow_,
    follow_fake_quant,
    gptq,
    learned_fake_quant,
    lsq,
    pact,
)
from torch_ext.ops.registry import rule_names
from torch_ext.ops.rule_functions import RuleFunction, rule_function
from torch_ext.ops.statistics import kl_threshold, merge_, observe_, qparams, solve, solve_many

__all__ = [
    "dynamic_fake_quant",
    "fake_quant",
    "follow_",
    "follow_fake_quant",
    "gptq",
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
