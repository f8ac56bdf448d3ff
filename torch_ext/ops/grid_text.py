"""Writes a grid as the text that the ops take: "[-128,127] symmetric"."""

from __future__ import annotations

from operator import index


def grid_text(
    quant_min: int,
    quant_max: int,
    symmetric: bool | None = None,
    scale_rule: str = "grid",
    power_of_two: bool = False,
    rounding: str = "half_even",
) -> str:
    """The grammar is in csrc/bindings/grid_text.h; the ops refuse what is not of it, by name.

    ``symmetric`` is None for a grid whose scales are given.
    """
    try:
        # A plain integer for the compiler too, which traces one that varies as a symbol.
        text = f"[{index(quant_min)},{index(quant_max)}]"
    except TypeError:
        text = f"[{quant_min!r},{quant_max!r}]"
    if symmetric is not None:
        if symmetric == 1:
            text += " symmetric"
        else:
            text += " affine" if symmetric == 0 else f" symmetric={symmetric!r}"
    if scale_rule != "grid":
        text += f" scale_rule={scale_rule}"
    if power_of_two != 0:
        text += " power_of_two" if power_of_two == 1 else f" power_of_two={power_of_two!r}"
    if rounding != "half_even":
        text += f" rounding={rounding}"
    return text
