"""The rules as functions of one tensor, made from the registry's tables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from torch_ext.ops.loader import NATIVE
from torch_ext.ops.registry import OptionValue, encode_options, observer_info
from torch_ext.utils.text import joined


class RuleFunction(Protocol):
    """One tensor in, its range [C,2] float32 out."""

    __name__: str

    def __call__(
        self,
        x: Tensor,
        quant_min: int = -128,
        quant_max: int = 127,
        symmetric: bool = True,
        ch_axis: int = -1,
        **options: OptionValue,
    ) -> Tensor: ...


@functools.cache
def rule_function(rule: str) -> RuleFunction:
    """The function of a rule, with its options in its signature; the same at each call."""
    info = observer_info(rule)
    op: Callable[..., Tensor] = getattr(NATIVE, rule)

    def function(
        x: Tensor,
        quant_min: int = -128,
        quant_max: int = 127,
        symmetric: bool = True,
        ch_axis: int = -1,
        **options: OptionValue,
    ) -> Tensor:
        encode_options(rule, options)  # the same errors here as in `solve`
        found: Tensor = op(x, quant_min, quant_max, symmetric, ch_axis, **options)
        return found

    rows = []
    for row in info["options"]:
        bounds = joined(row["choices"])
        if not row["choices"]:
            bounds = f"{row['minimum']:g} to {row['maximum']:g}"
        rows.append(f"    {row['name']} = {row['default']}    {bounds}")
    function.__name__ = function.__qualname__ = rule
    function.__doc__ = "\n".join(
        [
            f"Range [C,2] float32 that the rule ``{rule}`` gives one tensor; C = 1 per tensor.",
            "",
            f"Reads: {info['statistic']}. Grids of at most {info['max_bits']} bits.",
            f"Formula and its source: csrc/observers/{rule}.h.",
            "Raises ValueError for an unknown or misplaced option, RuntimeError for a violated",
            "contract of the op. Non-finite values are left out; without a finite one: (0,0).",
            *(["", "Options, their defaults and bounds:", *rows] if rows else []),
        ]
    )
    kept = list(inspect.signature(function).parameters.values())[:-1]
    added = [
        inspect.Parameter(row["name"], inspect.Parameter.KEYWORD_ONLY, default=row["default"])
        for row in info["options"]
    ]
    function.__signature__ = inspect.Signature(kept + added)  # type: ignore[attr-defined]
    return function
