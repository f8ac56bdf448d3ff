"""A quantizer's range as text, for ``print``."""

from __future__ import annotations

import contextlib

from torch_ext.quantizers.solve import Quantizer
from torch_ext.utils.text import span


def range_and_scale(quantizer: Quantizer) -> str:
    """Range and scale; with several channels or groups their least and greatest values."""
    if quantizer.rangeless:
        return "scales of each call"
    with contextlib.suppress(RuntimeError):  # meta and fake tensors have no values
        if not bool(quantizer.solved):
            return "not solved"
        try:
            low, high = quantizer.range.unbind(1)
            scale = quantizer.calculate_qparams()[0].tolist()
        except ValueError:  # a learned parameter became infinite or NaN
            return "range not finite"
        kind = "channels" if quantizer.observer.group_size is None else "groups"
        many = f" ({len(scale)} {kind})" if len(scale) > 1 else ""
        return f"range=[{low.min():.6g}, {high.max():.6g}], scale={span(scale)}{many}"
    return "no values"
