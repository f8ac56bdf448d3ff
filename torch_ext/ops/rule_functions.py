"""Builds a function of one tensor for every rule, from the registry's tables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from torch_ext.ops.grid_text import grid_text
from torch_ext.ops.loader import NATIVE
from torch_ext.ops.registry import OptionValue, encode_options, observer_info
from torch_ext.utils.text import joined

_READS = {
    "none": "no data: the range is given",
    "extrema": "the least and the greatest value",
    "histogram": "a histogram",
}


_INT8 = (-128, 127, True)


class RuleFunction(Protocol):
    """The type of a rule's function: from one tensor to its range [C,2] float32."""

    __name__: str

    def __call__(
        self,
        x: Tensor,
        quant_min: int = -128,
        quant_max: int = 127,
        symmetric: bool = True,
        ch_axis: int = -1,
        grid: str | None = None,
        **options: OptionValue,
    ) -> Tensor: ...


@functools.cache
def rule_function(rule: str) -> RuleFunction:
    """The function of a rule, with the rule's options in its signature and docstring.

    Cached, so that ``ops.kl is ops.kl``.

    Raises:
        ValueError: no such rule.
    """
    info = observer_info(rule)
    op: Callable[..., Tensor] = getattr(NATIVE, rule)

    def function(
        x: Tensor,
        quant_min: int = -128,
        quant_max: int = 127,
        symmetric: bool = True,
        ch_axis: int = -1,
        grid: str | None = None,
        **options: OptionValue,
    ) -> Tensor:
        encode_options(rule, options)  # raises the same errors as `solve`
        given = (quant_min, quant_max, symmetric)
        # With the defaults the grid alone is given.
        alone = grid is not None and given == _INT8
        text = grid_text(grid=grid) if alone else grid_text(*given, grid=grid)
        range_: Tensor = op(x, text, ch_axis, **options)
        return range_

    bits = info["max_bits"]
    floats = ", of integers alone" if info["only_integers"] else ""
    rows = []
    for row in info["options"]:
        bounds = f"{row['minimum']:g} to {row['maximum']:g}"
        if row["choices"]:
            bounds = f"one of {joined(row['choices'])}"
        rows.append(f"    {row['name']}: {bounds}; {row['default']} by default.")
    function.__name__ = function.__qualname__ = rule
    function.__doc__ = "\n".join(
        [
            f"Computes the range of one tensor by the rule ``{rule}``.",
            "",
            f"Reads {_READS[info['statistic']]}. Supports grids of at most {bits} bits{floats}.",
            f"Non-finite values are ignored. Formula and source: csrc/observers/{rule}.h.",
            "",
            "Args:",
            "    x: any floating dtype, shape and strides.",
            "    quant_min: the least integer of the grid.",
            "    quant_max: the greatest integer of the grid.",
            "    symmetric: whether the grid is symmetric (zero point 0) or affine.",
            "    ch_axis: the axis of the C channels; -1: C = 1.",
            '    grid: in place of the three above, as in ``qparams``: ``"float8_e4m3"``.',
            *rows,
            "",
            "Returns:",
            "    The range [C,2] float32; (0,0) for channels without a finite value.",
            "",
            "Raises:",
            "    ValueError, TypeError: an unknown option, or a value out of bounds.",
            "    RuntimeError: another argument is not as above.",
        ]
    )
    shared = list(inspect.signature(function).parameters.values())[:-1]
    rule_options = [
        inspect.Parameter(row["name"], inspect.Parameter.KEYWORD_ONLY, default=row["default"])
        for row in info["options"]
    ]
    function.__signature__ = inspect.Signature(shared + rule_options)  # type: ignore[attr-defined]
    return function
