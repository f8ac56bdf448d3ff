"""lsq's backward over row lengths and channel counts, each against its neighbour and one channel.

A row length or a channel count at which a time per value jumps shows as a goal that is not met.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import distributions
from case import MI, Case, Job, Peer, expect, goals

QUANT_MIN, QUANT_MAX = -128, 127
SCALE = 0.02  # clips 1 % of Gaussian values
CHANNELS = 64

# A step of at most 1.5 from one to the next.
STEP = goals((MI, 1, 1 / 1.5, 1), (16 * MI, 1, 1 / 1.5, 1))
FLAT = goals((16 * MI, 1, 1 / 1.3, 1))

native = torch.ops.torch_ext


@dataclass(frozen=True)
class Layout:
    """[outer, channels, inner] with the channels in the middle; one channel is per tensor."""

    channels: int
    inner: int

    @property
    def name(self) -> str:
        return f"{self.channels} channels, rows of {self.inner}"

    def backward(self, size: int) -> Callable[[], tuple[Tensor, ...]]:
        outer = max(1, size // (self.channels * self.inner))
        x = distributions.gauss(outer * self.channels * self.inner)
        gradient = distributions.gauss(x.numel(), seed=1)
        shape = (outer, self.channels, self.inner)
        scale = torch.linspace(SCALE, 1.5 * SCALE, self.channels)
        zero_point = torch.zeros(self.channels, dtype=torch.int32)
        return functools.partial(
            native._learned_fake_quant_backward,
            *(gradient.view(shape), x.view(shape), "lsq", scale, zero_point),
            *(f"[{QUANT_MIN},{QUANT_MAX}]", 1, False),
        )


def wanted(arguments: tuple[Tensor, ...]) -> Tensor:
    """The gradients of the scales: rounded as the forward does it, in float32; then in float64."""
    gradient, x, _, scale, *_ = arguments
    scale = scale.view(-1, 1)
    code, v = x / scale, x.double() / scale.double()
    inside = (code > QUANT_MIN) & (code < QUANT_MAX)
    slope = torch.where(inside, code.round().double() - v, v.clamp(QUANT_MIN, QUANT_MAX))
    return (gradient.double() * slope).sum((0, 2)).float()


def against(layout: Layout, neighbour: Layout, size: int) -> Job:
    ours = layout.backward(size)

    def check() -> None:
        found = ours()[1]
        expect(torch.allclose(found, wanted(ours.args), rtol=1e-4, atol=1e-2), "gradients")

    peers = (
        Peer(f"{neighbour.name}", neighbour.backward(size), STEP),
        Peer("one channel", Layout(1, size).backward(size), FLAT),
    )
    return Job(ours, peers, check=check)


ROWS = [Layout(CHANNELS, n) for n in (4096, 1024, 256, 64, 32, 31, 16, 9, 4, 3, 2, 1)]
COUNTS = [Layout(n, 1) for n in (2, 3, 8, 10, 16, 17, 33, 63, 64, 65, 512, 1024, 1025, 4096)]
CASES = tuple(
    Case(f"learned/lsq backward {b.name}", functools.partial(against, b, a))
    for chain in (ROWS, COUNTS)
    for a, b in itertools.pairwise(chain)
)
