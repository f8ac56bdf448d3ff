"""Integer grids of every kind, and a grid as the arguments of an op."""

from __future__ import annotations

from typing import Any

from reference import Grid

GRIDS = {
    "int8": Grid(),
    "int8_narrow": Grid(-127, 127),
    "int4": Grid(-8, 7),
    "uint8": Grid(0, 255),
    "uint4": Grid(0, 15),
    "int8_affine": Grid(symmetric=False),
    "uint8_affine": Grid(0, 255, symmetric=False),
    "uint4_affine": Grid(0, 15, symmetric=False),
}


def grid_arguments(grid: Grid) -> dict[str, Any]:
    return {
        "quant_min": grid.quant_min,
        "quant_max": grid.quant_max,
        "symmetric": grid.symmetric,
        "scale_rule": grid.scale_rule,
        "power_of_two": grid.power_of_two,
    }
