"""Wrong grids, data and scales, for every op that takes them."""

from __future__ import annotations

from typing import Any

import torch

from op_samples import NVFP4

NAN, INF = float("nan"), float("inf")
I32, F64 = torch.int32, torch.float64

# What is wrong, arguments that the text may name, the wrong arguments.
Clause = tuple[str, str, dict[str, Any]]


def grid_clauses() -> list[Clause]:
    """Of every op with a grid, whatever it is for."""
    return [
        ("grid upside down", "quant_min|quant_max", {"grid": "[5,4] symmetric"}),
        ("grid of one level", "quant_min|quant_max", {"grid": "[0,0] symmetric"}),
        ("grid without 0 above", "quant_min|zero_point", {"grid": "[1,9] symmetric"}),
        ("grid without 0 below", "quant_max|zero_point", {"grid": "[-9,-1] symmetric"}),
        ("grid past 16 bits", "quant_min", {"grid": "[-32769,0] affine"}),
        ("grid past 32 bits", "quant_min|quant_max", {"grid": f"[{-(2**40)},{2**40}] affine"}),
        ("grid past 64 bits", "quant_min", {"grid": f"[{-(2**63)},{2**63 - 1}] affine"}),
        *grid_text_clauses(),
    ]


def grid_text_clauses() -> list[Clause]:
    """Texts that are no grid."""
    return [
        ("no grid", "grid", {"grid": ""}),
        ("grid without brackets", "grid", {"grid": "-128,127 symmetric"}),
        ("grid with one end", "grid", {"grid": "[127] symmetric"}),
        ("grid with three ends", "grid", {"grid": "[-128,0,127] symmetric"}),
        ("grid of a fraction", "grid", {"grid": "[-1.5,127] symmetric"}),
        ("grid past a number", "grid", {"grid": f"[0,{2**63}] symmetric"}),
        ("grid with a space", "grid", {"grid": "[-128, 127] symmetric"}),
        ("grid with two spaces", "grid", {"grid": "[-128,127]  symmetric"}),
        ("grid with a space behind", "grid", {"grid": "[-128,127] symmetric "}),
        ("grid cut off", "grid", {"grid": "[-128,12"}),
        ("grid without a space", "grid", {"grid": "[-128,127]symmetric"}),
        ("grid with a plus", "grid", {"grid": "[-128,+127] symmetric"}),
        ("unknown word of a grid", "grid", {"grid": "[-128,127] symetric"}),
        ("unknown key of a grid", "grid", {"grid": "[-128,127] symmetric=True"}),
        ("key of a grid alone", "grid", {"grid": "[-128,127] symmetric rounding"}),
        ("two kinds of a grid", "grid", {"grid": "[-128,127] symmetric affine"}),
        ("word of a grid twice", "grid", {"grid": "[-128,127] power_of_two affine power_of_two"}),
        ("unknown scale rule", "scale_rule", {"grid": "[-128,127] symmetric scale_rule=max"}),
        ("no scale rule", "scale_rule", {"grid": "[-128,127] symmetric scale_rule="}),
        ("tvm on an affine grid", "scale_rule", {"grid": "[0,255] affine scale_rule=tvm"}),
        ("floor on an affine grid", "scale_rule", {"grid": "[0,255] affine scale_rule=floor"}),
        ("even on integers", "scale_rule", {"grid": "[-8,7] symmetric scale_rule=even"}),
        ("tvm on a float format", "scale_rule", {"grid": "float8_e4m3 scale_rule=tvm"}),
        ("unknown scale type", "scale_dtype", {"grid": "float4_e2m1 scale_dtype=float8_e5m2"}),
        ("rounded affine scales", "grid", {"grid": "[0,15] affine scale_dtype=float8_e4m3"}),
        ("rounded powers", "power_of_two", {"grid": f"{NVFP4} power_of_two"}),
        ("rounded by floor", "scale_rule", {"grid": f"{NVFP4} scale_rule=floor"}),
        ("unknown rounding", "rounding", {"grid": "[-128,127] symmetric rounding=up"}),
        ("capitals", "rounding", {"grid": "[-128,127] symmetric rounding=Half_even"}),
    ]


def data_clauses(channels: int) -> list[Clause]:
    return [
        ("integer data", "x", {"x": torch.ones(2, channels, dtype=I32)}),
        ("bool data", "x", {"x": torch.ones(2, channels, dtype=torch.bool)}),
        ("complex data", "x", {"x": torch.ones(2, channels, dtype=torch.complex64)}),
        ("axis below -1", "ch_axis", {"ch_axis": -2}),
        ("axis past the last", "ch_axis", {"ch_axis": 9}),
        ("axis equal to the rank", "ch_axis", {"ch_axis": 2}),
        ("axis of a scalar", "ch_axis", {"x": torch.tensor(1.0), "ch_axis": 0}),
    ]


def tensor_scale_clauses() -> list[Clause]:
    def of(scale: Any, grid: str = NVFP4) -> dict[str, Any]:
        return {"grid": grid, "tensor_scale": scale}

    one = torch.ones(1)
    return [
        ("no tensor_scale", "tensor_scale", of(None)),
        ("tensor_scale without a use", "tensor_scale", of(one, "[-8,7] symmetric")),
        ("tensor_scale dtype", "tensor_scale", of(one.to(F64))),
        ("tensor_scale numel", "tensor_scale", of(torch.ones(3))),
        ("tensor_scale rank", "tensor_scale", of(torch.ones(1, 1))),
        ("tensor_scale zero", "tensor_scale", of(one * 0)),
        ("tensor_scale negative", "tensor_scale", of(-one)),
        ("tensor_scale NaN", "tensor_scale", of(one * NAN)),
        ("tensor_scale infinite", "tensor_scale", of(one * INF)),
        ("tensor_scale that underflows", "tensor_scale", of(one * 1e-37)),
        ("tensor_scale that overflows", "tensor_scale", of(one * 1e36)),
    ]
