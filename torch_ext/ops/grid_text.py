"""Writes a grid as the text that the ops take: "[-128,127] symmetric"."""

from __future__ import annotations

from operator import index


def grid_text(
    quant_min: int | None = None,
    quant_max: int | None = None,
    symmetric: bool | None = None,
    scale_rule: str = "grid",
    power_of_two: bool = False,
    rounding: str = "half_even",
    grid: str | None = None,
) -> str:
    """The grammar is in csrc/bindings/grid_text.h; the ops refuse what is not of it, by name.

    ``symmetric`` is None for a grid whose scales are given. ``grid`` is the text itself, in place
    of all the others.

    Raises:
        TypeError: neither ``grid`` nor an end, or ``grid`` and another argument.
    """
    if grid is not None:
        given = (quant_min, quant_max, symmetric, scale_rule, power_of_two, rounding)
        if given != (None, None, None, "grid", False, "half_even"):
            raise TypeError(f"expected grid {grid!r} alone, got arguments that it stands for too")
        return grid
    if quant_min is None and quant_max is None:
        raise TypeError("expected quant_min and quant_max, or grid, got neither")
    try:
        # A plain integer for the compiler too, which traces one that varies as a symbol.
        text = f"[{index(quant_min)},{index(quant_max)}]"  # type: ignore[arg-type]
    except TypeError:
        text = f"[{quant_min!r},{quant_max!r}]"
    return text + words(symmetric, scale_rule, power_of_two, rounding)


def words(
    symmetric: bool | None = None,
    scale_rule: str = "grid",
    power_of_two: bool = False,
    rounding: str = "half_even",
) -> str:
    """The words that follow the integers or the float format, each after a space."""
    text = ""
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
