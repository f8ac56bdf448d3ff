"""Fake-quant with the scales of the values themselves: per token, and in MX and NVFP4 blocks."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import distributions
from case import MI, Case, Ceiling, Job, Missing, Peer, expect, goals
from torch_ext import ops

TOKEN = 4096
BLOCK = 32
LARGEST = {"float8_e4m3": 448.0, "float4_e2m1": 6.0}
# Against per-tensor fake-quant of the same data on the same grid, whose scale is given.
PER_TENSOR = goals((MI, 1, 0.67, 0.85), (16 * MI, 1, 0.67, 0.9))
COMPOSED = goals((MI, 1, 3, 6), (16 * MI, 1, 3, 6))


def _static(x: Tensor, grid: str) -> Callable[[], Tensor]:
    """The same op with one scale that is known: what a calibrated quantizer costs."""
    scale, zero_point = ops.qparams(ops.min_max(x, grid=grid), grid=grid)
    return functools.partial(ops.fake_quant, x, scale, zero_point, grid=grid)


def _int8(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126)
    return (x / scale).round().clamp(-127, 127) * scale


def _float8(x: Tensor) -> Tensor:
    largest = LARGEST["float8_e4m3"]
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=2.0**-126)
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale


def _mxfp8(x: Tensor) -> Tensor:
    """By exponents of float32: floor(log2) of the largest magnitude of a block, minus 8."""
    blocks = x.view(-1, BLOCK)
    bits = blocks.abs().amax(-1, keepdim=True).view(torch.int32) & 0x7F800000
    scale = (bits - (8 << 23)).clamp(min=1 << 23).view(torch.float32)
    quotient = (blocks / scale).clamp(-448, 448)
    return (quotient.to(torch.float8_e4m3fn).float() * scale).view_as(x)


def _torchao(x: Tensor, name: str) -> Callable[[], Tensor]:
    """torchao's own cast to MX and back, as its fake-quant for training does it."""
    try:
        mx: Any = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    except ImportError as error:
        raise Missing(f"torchao: {error}") from error
    kind = {"float8_e4m3": torch.float8_e4m3fn, "float4_e2m1": torch.float4_e2m1fn_x2}[name]

    def run() -> Tensor:
        scale, codes = mx.to_mx(x, kind, BLOCK, mx.ScaleCalculationMode.FLOOR)
        out: Tensor = mx.to_dtype(codes, scale, kind, BLOCK, torch.float32)
        return out

    return run


def _job(ours: Callable[[], Tensor], x: Tensor, grid: str, others: dict[str, Any]) -> Job:
    def check() -> None:
        for name, run in others.items():
            expect(torch.allclose(ours(), run(), rtol=1e-5, atol=1e-6), name)

    peers = [Peer("per tensor by fake_quant", _static(x, grid), PER_TENSOR)]
    peers += [Peer(name, run, COMPOSED if "eager" in name else {}) for name, run in others.items()]
    return Job(ours, tuple(peers), ceiling=Ceiling("copy", x), check=check)


def per_token(grid: str, composed: Callable[[Tensor], Tensor], size: int) -> Job:
    x = distributions.gauss(size).view(-1, TOKEN)
    ours = functools.partial(ops.dynamic_fake_quant, x, grid=grid)
    compiled = torch.compile(composed, dynamic=False)
    others = {
        "composed, eager": functools.partial(composed, x),
        "composed, compiled": functools.partial(compiled, x),
    }
    return _job(ours, x, grid, others)


def blocks(name: str, size: int) -> Job:
    x = distributions.gauss(size).view(-1, TOKEN)
    grid = f"{name} scale_rule=floor"
    ours = functools.partial(ops.dynamic_fake_quant, x, BLOCK, grid=grid)
    others: dict[str, Any] = {"torchao to_mx, eager": _torchao(x, name)}
    if name == "float8_e4m3":
        compiled = torch.compile(_mxfp8, dynamic=False)
        others["composed, eager"] = functools.partial(_mxfp8, x)
        others["composed, compiled"] = functools.partial(compiled, x)
    return _job(ours, x, grid, others)


def nvfp4(size: int) -> Job:
    x = distributions.gauss(size).view(-1, TOKEN)
    grid = "float4_e2m1 scale_dtype=float8_e4m3"
    tensor_scale = (x.abs().max() / (448 * 6)).view(1)
    ours = functools.partial(ops.dynamic_fake_quant, x, 16, grid=grid, tensor_scale=tensor_scale)
    static = _static(x, "float4_e2m1")
    return Job(ours, (Peer("per tensor by fake_quant", static),), ceiling=Ceiling("copy", x))


CASES = (
    Case("dynamic/blocks of 32 mxfp4", functools.partial(blocks, "float4_e2m1")),
    Case("dynamic/blocks of 32 mxfp8", functools.partial(blocks, "float8_e4m3")),
    Case("dynamic/per token int8", functools.partial(per_token, "[-127,127] symmetric", _int8)),
    Case("dynamic/per token float8_e4m3", functools.partial(per_token, "float8_e4m3", _float8)),
    Case("dynamic/blocks of 16 nvfp4", nvfp4),
)
