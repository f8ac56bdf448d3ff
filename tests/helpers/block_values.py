"""Values quantized in groups with scales of their own, by plain formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """A float format: bits of the mantissa, least exponent, largest number."""

    mantissa: int
    least: int
    largest: float

    def nearest(self, v: Tensor) -> Tensor:
        """Its nearest numbers, of two the even one; in float64."""
        v = v.clamp(-self.largest, self.largest)
        exponent = (torch.frexp(v)[1] - 1).clamp(min=self.least)
        step = torch.exp2((exponent - self.mantissa).double())
        return torch.round(v / step) * step


FORMATS = {
    "float8_e4m3": Format(3, -6, 448.0),
    "float8_e5m2": Format(2, -14, 57344.0),
    "float6_e2m3": Format(3, 0, 7.5),
    "float6_e3m2": Format(2, -2, 28.0),
    "float4_e2m1": Format(1, 0, 6.0),
}
# Floor of log2 of the largest number.
EMAX = {"float8_e4m3": 8, "float8_e5m2": 15, "float6_e2m3": 2, "float6_e3m2": 4, "float4_e2m1": 2}
# Groups as rows -> their quantized values; float64 throughout.
Quantize = Callable[[Tensor], Tensor]


def in_groups(x: Tensor, quantize: Quantize, axis: int = -1, group: int | None = None) -> Tensor:
    """What a function makes of the groups along an axis; contiguous, in the dtype of x."""
    moved = x.detach().movedim(axis, -1)
    rows = moved.reshape(-1, moved.shape[-1] if group is None else group).double()
    return quantize(rows).reshape(moved.shape).movedim(-1, axis).to(x.dtype).contiguous()


def _scaled(rows: Tensor, scale: Tensor, nearest: Quantize) -> Tensor:
    """As in float32: a quotient, and a product with the scale."""
    scale = scale.float()
    return (nearest((rows.float() / scale).double()).float() * scale).double()


def _amax(rows: Tensor) -> Tensor:
    return rows.abs().amax(1, keepdim=True)


def int8(rows: Tensor) -> Tensor:
    top = _amax(rows)
    scale = torch.where(top > 0, 2 * top / 255, torch.ones_like(top))
    return _scaled(rows, scale, lambda v: v.round().clamp(-128, 127))


def uint8_affine(rows: Tensor) -> Tensor:
    low, high = (-rows).amax(1, keepdim=True).clamp(min=0), rows.amax(1, keepdim=True).clamp(min=0)
    span = torch.where(low + high > 0, low + high, 255.0 * torch.ones_like(low))
    zero_point = (low * 255 / span).round()
    scale = (span / 255).float()
    q = ((rows.float() / scale).round() + zero_point.float()).clamp(0, 255)
    return ((q - zero_point.float()) * scale).double()


def floats(name: str, power: str = "") -> Quantize:
    """Of a float format: the scale takes the largest value to the largest number; or a power of
    two by ``"floor"`` or ``"ceil"``."""
    kind = FORMATS[name]

    def quantize(rows: Tensor) -> Tensor:
        top = _amax(rows)
        scale = top / kind.largest
        if power == "floor":
            scale = torch.exp2((torch.frexp(top)[1] - 1 - EMAX[name]).double())
        if power == "ceil":
            mantissa, exponent = torch.frexp(scale)
            scale = torch.exp2((exponent - (mantissa == 0.5).int()).double())
        return _scaled(rows, torch.where(top > 0, scale, torch.ones_like(top)), kind.nearest)

    return quantize


def mxint8(rows: Tensor) -> Tensor:
    """OCP's: k/64 times a power of two, |k| up to 127."""
    top = _amax(rows)
    scale = torch.exp2((torch.frexp(top)[1] - 1 - 6).double())
    scale = torch.where(top > 0, scale, torch.ones_like(top))
    return _scaled(rows, scale, lambda v: v.round().clamp(-127, 127))


def nvfp4(tensor_scale: Tensor) -> Quantize:
    """E2M1 with scales of E4M3 that are relative to one of the tensor."""
    g = tensor_scale.double()

    def quantize(rows: Tensor) -> Tensor:
        wanted = (_amax(rows) / 6 / g).clamp(2.0**-6, 448)
        scale = (FORMATS["float8_e4m3"].nearest(wanted) * g).float().double()
        return _scaled(rows, scale, FORMATS["float4_e2m1"].nearest)

    return quantize
