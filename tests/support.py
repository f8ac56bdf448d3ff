"""Statistic tensors, kinds of data and grids that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reference import Grid, Statistic, observe
from torch_ext import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

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
SEARCHING = ["kl", "mse", "mix", "aciq"]


class State(NamedTuple):
    """The three tensors of a statistic."""

    extrema: Tensor
    tally: Tensor
    counts: Tensor

    def clone(self) -> State:
        return State(*(t.clone() for t in self))

    def to(self, device: torch.device | str) -> State:
        return State(*(t.to(device) for t in self))


def empty_state(
    channels: int = 1, mantissa_bits: int = 10, octaves: int = 16, histogram: bool = True
) -> State:
    bins = (octaves, 2**mantissa_bits) if histogram else (0, 0)
    return State(
        torch.tensor([[torch.inf, -torch.inf]]).repeat(channels, 1),
        torch.zeros(channels, 5, dtype=torch.int64),
        torch.zeros(channels, 2, *bins, dtype=torch.int64),
    )


def observed(x: Tensor, ch_axis: int = -1, **layout: Any) -> State:
    """A new statistic of x, where x is, in the default layout per tensor or per channel."""
    if ch_axis >= 0:
        layout = {"channels": x.shape[ch_axis], "mantissa_bits": 7, "octaves": 12, **layout}
    state = empty_state(**layout).to(x.device)
    ops.observe_(x, *state, ch_axis)
    return state


def assert_same_state(have: State, want: State) -> None:
    """Bit for bit: the sign of zero counts."""
    assert torch.equal(have.extrema.view(torch.int32), want.extrema.view(torch.int32))
    assert torch.equal(have.tally, want.tally)
    assert torch.equal(have.counts, want.counts)


def plain(values: Tensor, state: State) -> Statistic:
    """The reference's statistic of the same values in the layout of `state`."""
    numbers = values.detach().double().flatten().tolist()
    octaves, bins = state.counts.shape[2:]
    return observe(numbers, max(bins, 1).bit_length() - 1, octaves or 1, histogram=bins > 0)


def assert_state_counts(state: State, channels: list[Tensor]) -> None:
    """Channel c of the state is the brute-force statistic of channels[c]."""
    assert state.extrema.shape[0] == len(channels)
    for c, values in enumerate(channels):
        want = plain(values, state)
        assert state.tally[c].tolist() == want.tally, f"channel {c}"
        extrema = torch.tensor([want.low, want.high])
        assert torch.equal(state.extrema[c].view(torch.int32), extrema.view(torch.int32)), c
        if state.counts.numel():
            assert np.array_equal(state.counts[c].numpy(), want.counts()), f"channel {c}"


Sampler = Callable[[np.random.Generator, int], npt.NDArray[np.float64]]

KINDS: dict[str, Sampler] = {
    "gauss": lambda r, n: r.standard_normal(n),
    "laplace": lambda r, n: r.laplace(size=n),
    "relu": lambda r, n: np.maximum(r.standard_normal(n), 0),
    "negative": lambda r, n: -np.abs(r.standard_normal(n)) - 0.01,
    "uniform": lambda r, n: r.uniform(-3, 5, n),
    "shifted": lambda r, n: r.standard_normal(n) + 7,
    "heavy": lambda r, n: r.standard_cauchy(n),
    "outlier": lambda r, n: np.append(r.standard_normal(n - 1), 1e4),
    "sparse": lambda r, n: r.standard_normal(n) * (r.random(n) < 0.02),
    "lattice": lambda r, n: r.integers(-20, 21, n) / 8.0,
    "two_scales": lambda r, n: r.standard_normal(n) * np.where(r.random(n) < 0.5, 1e-3, 10.0),
    "huge": lambda r, n: r.standard_normal(n) * 1e37,
    "small": lambda r, n: r.standard_normal(n) * 1e-30,
    "constant": lambda r, n: np.full(n, 1.7),
}


def sample(kind: str, count: int, seed: int = 0) -> Tensor:
    values = KINDS[kind](np.random.default_rng([seed, *map(ord, kind)]), count)
    return torch.from_numpy(np.clip(values, -3e38, 3e38)).float()


def grid_arguments(grid: Grid) -> dict[str, Any]:
    return {
        "quant_min": grid.quant_min,
        "quant_max": grid.quant_max,
        "symmetric": grid.symmetric,
        "scale_rule": grid.scale_rule,
        "power_of_two": grid.power_of_two,
    }


def strided_views(x: Tensor) -> dict[str, Tensor]:
    """Views of a [4, 6, 8, 10] tensor, each with strides of its own."""
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 3),
        "permuted": x.permute(2, 0, 3, 1),
        "channels_last": x.to(memory_format=torch.channels_last),
        "step": x[:, ::2, ::3, ::2],
        "offset": x[1:, 2:, 3:, 1:],
        "expanded": x[:, :1].expand(-1, 5, -1, -1),
        "stride0": x[0, 0, 0, :1].expand(4, 6, 8, 10),
        "flipped_copy": x.flip(3),
        "select": x[..., 3],
        "one": x[:1, :1, :1, :1],
        "unfolded": x.unfold(3, 4, 2),
    }


VIEWS = list(strided_views(torch.zeros(4, 6, 8, 10)))
