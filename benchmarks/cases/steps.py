"""Fake-quant's forward over memory layouts, and between neighbouring sizes and row lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import distributions
from case import KI, MI, Case, Ceiling, Job, Peer, expect, goals
from torch_ext import ops

GRID = (-128, 127)
VALUES = 256 * KI
SMALLEST, LARGEST = KI, 16 * MI
LONGEST_ROW = 8 * KI
# A layout takes at most 1.3 times as long as contiguous data, a neighbour at most 1.5 times.
SAME = goals((MI, 1, 1 / 1.3, 0.95), (16 * MI, 1, 1 / 1.3, 0.95))
STEP = goals((0, 1, 1 / 1.5, 0.9), (0, 2, 1 / 1.5, 0.9))


def _qparams(channels: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.02, 0.03, channels), torch.zeros(channels, dtype=torch.int32)


def _quantize(x: Tensor, axis: int = -1) -> Callable[[], Tensor]:
    scale, zero_point = _qparams(1 if axis < 0 else x.shape[axis])
    return functools.partial(ops.fake_quant, x, scale, zero_point, *GRID, axis)


def _torch(x: Tensor, axis: int) -> Callable[[], Tensor]:
    scale, zero_point = _qparams(1 if axis < 0 else x.shape[axis])
    if axis < 0:
        return functools.partial(torch.fake_quantize_per_tensor_affine, x, scale.item(), 0, *GRID)
    return functools.partial(
        torch.fake_quantize_per_channel_affine, x, scale, zero_point, axis, *GRID
    )


def _in_layout(layout: str, size: int) -> Tensor:
    """[16, 64, *, 32] in a memory format, or a matrix that is transposed."""
    x = distributions.gauss(size)
    if layout == "transposed":
        return x.view(-1, KI).t()
    images = x.view(16, 64, -1, 32)
    if layout == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    return images


def layout(name: str, axis: int, size: int) -> Job:
    x = _in_layout(name, size)
    ours, theirs = _quantize(x, axis), _torch(x, axis)

    def check() -> None:
        out = ours()
        expect(out.stride() == x.stride(), "strides")
        expect(((out - theirs()).abs() > 1e-6).float().mean().item() < 1e-3, "values")

    contiguous = Peer("ours, contiguous, per tensor", _quantize(distributions.gauss(size)), SAME)
    peers = (contiguous, Peer("torch.fake_quantize", theirs))
    return Job(ours, peers, ceiling=Ceiling("copy", x), check=check)


def size_step(values: int, _: int) -> Job:
    """One call against two of half the size: a lower ratio is a step up in time per value."""
    x = distributions.gauss(values)
    halves = [_quantize(half) for half in x.view(2, -1)]

    def run() -> None:
        for half in halves:
            half()

    return Job(_quantize(x), (Peer("two halves", run, STEP),), ceiling=Ceiling("copy", x))


def _rows(length: int, innermost: bool) -> Callable[[], Tensor]:
    """About VALUES values, a channel for each row, or for each place in a row."""
    rows = VALUES // length
    return _quantize(distributions.gauss(rows * length).view(rows, length), int(innermost))


def row_step(length: int, innermost: bool, _: int) -> Job:
    neighbours = (max(1, length // 2), length + 1, 2 * length)
    peers = tuple(Peer(f"of {n}", _rows(n, innermost), STEP) for n in neighbours)
    return Job(_rows(length, innermost), peers)


def _powers(first: int, last: int) -> list[int]:
    return [1 << k for k in range(first.bit_length() - 1, last.bit_length())]


LAYOUTS = ("contiguous", "channels_last", "transposed")
CASES = (
    *(
        Case(f"fake_quant/layout {name}, {kind}", functools.partial(layout, name, axis))
        for name in LAYOUTS
        for axis, kind in ((-1, "per tensor"), (0, "axis 0"), (1, "axis 1"))
    ),
    *(
        Case(f"fake_quant/step to {size}", functools.partial(size_step, size), sized=False)
        for size in _powers(2 * SMALLEST, LARGEST)
    ),
    *(
        Case(
            f"fake_quant/step {kind} of {length}",
            functools.partial(row_step, length, innermost),
            sized=False,
        )
        for innermost, kind in ((False, "rows"), (True, "innermost channels"))
        for length in _powers(1, LONGEST_ROW)
    ),
)
