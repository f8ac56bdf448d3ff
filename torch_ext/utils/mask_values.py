"""Numbers that masks are filled with, told from numbers that data has."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

_NEAR_THE_END = 1e30  # of float32 and bfloat16; data does not reach it
_HALVES = (torch.float16, torch.bfloat16)


def _fills() -> dict[float, str]:
    """What a mask's number is, as text, by the number."""
    least = torch.finfo(torch.float16).min
    found = {least: "the least value of float16", least / 2: "half the least value of float16"}
    for exponent in range(4, 10):
        power = torch.tensor(-(10.0**exponent))
        for number in (power, *(power.to(dtype) for dtype in _HALVES)):
            found.setdefault(float(number), f"-1e{exponent}")
    return found


_FILLS = _fills()


def mask_fill(low: float, high: float = 0.0) -> str:
    """Which number of masks the least or the greatest value is; "" if it is none.

    Exact powers of ten from -1e4 to -1e9, also rounded to a half precision, the least value of
    float16 and half of it, and what is near the ends of float32.
    """
    for value in (low, high):
        if _NEAR_THE_END <= abs(value) < float("inf"):
            return f"{value:.4g}, near the end of float32"
    return _FILLS.get(low, "")


def mask_advice(names: Sequence[str]) -> str:
    """What to do about quantizers that saw infinities, or numbers of masks."""
    pattern = json.dumps(list(names)) if len(names) > 1 else json.dumps(names[0])
    return (
        "  Quantized, infinities become the end of the range, and a mask of large numbers leaves "
        "no levels for the data. A mask is to stay float: prepare the module that reads it with "
        f'qconfig=None (an argument: input_qconfig=None), or set_fake_quantize(model, "float", '
        f"{pattern}) after every other change of state"
    )
