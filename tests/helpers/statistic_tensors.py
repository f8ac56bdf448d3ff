"""The three tensors of a statistic, and the reference's statistic of the same values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reference import Statistic, observe
from torch_ext import ops


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
