"""The laws of statistics across devices: any part of the data on either, merged in any way."""

from __future__ import annotations

import random

import pytest
import torch

import torch_ext
from devices import assert_same_bits
from input_zoo import ZOO
from sample_data import DTYPES, sample
from statistic_tensors import State, empty_state, observed
from torch_ext import ops

LAYOUTS = [(10, 16), (7, 12), (5, 4), (8, 32)]


def merged(into: State, other: State) -> State:
    ops.merge_(*into, *other)
    return into


@pytest.mark.sanitizer
def test_half_of_the_data_on_each_device(device: torch.device):
    for kind in ZOO:
        x = ZOO[kind](4001)
        want = observed(x)
        here, there = observed(x[:1777]), observed(x[1777:].to(device))
        assert_same_bits(merged(here.to(device).clone(), there), want, kind, "on the device")
        assert_same_bits(merged(here, there.to("cpu")), want, kind, "on the CPU")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ZOO)
def test_any_tree_of_merges(kind: str, layout: tuple[int, int], device: torch.device):
    bits, octaves = layout
    choose = random.Random(f"{kind} {layout}")
    x = ZOO[kind](6011)[torch.randperm(6011)]
    want = observed(x, mantissa_bits=bits, octaves=octaves)
    parts = x.split([1, 10, 0, 1000, 2000, 3000])
    places = [device, torch.device("cpu")]
    states = [
        observed(p.to(choose.choice(places)), mantissa_bits=bits, octaves=octaves) for p in parts
    ]
    while len(states) > 1:
        into = states.pop(choose.randrange(len(states)))
        other = states.pop(choose.randrange(len(states))).to(into.extrema.device)
        before = other.clone()
        states.append(merged(into, other))
        assert_same_bits(other, before, "the other one")
    assert_same_bits(states[0], want)


@pytest.mark.parametrize("kind", ["gauss", "spread", "mixed", "falling"])
def test_channels(kind: str, device: torch.device):
    x = ZOO[kind](37 * 40).reshape(37, 40)
    want = observed(x, 0)
    have = observed(x[:, :11].to(device), 0)
    assert_same_bits(merged(have, observed(x[:, 11:], 0).to(device)), want)
    thin = observed(x[:, :11].to(device), 0, histogram=False)
    other = observed(x[:, 11:], 0, histogram=False).to(device)
    assert_same_bits(merged(thin, other), observed(x, 0, histogram=False))


def test_an_empty_statistic_is_the_identity_both_ways(device: torch.device):
    for kind in ZOO:
        want = observed(ZOO[kind](500))
        have = merged(want.to(device).clone(), empty_state().to(device))
        assert_same_bits(have, want, kind)
        assert_same_bits(merged(empty_state().to(device), want.to(device)), want, kind)


@pytest.mark.parametrize("exponent", [31, 33, 50])
def test_counts_stay_exact_past_32_bits(exponent: int, device: torch.device):
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, -2.0, 1e-30, torch.inf, torch.nan])
    state, want = observed(x.to(device)), observed(x)
    for _ in range(exponent):
        merged(state, state.clone())
        merged(want, want.clone())
    assert state.tally.tolist() == [[n << exponent for n in (6, 2, 1, 1, 1)]]
    assert_same_bits(state, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_observers_on_two_devices_become_one(dtype: torch.dtype, device: torch.device):
    x = sample("heavy", 4000).to(dtype)
    for rule in torch_ext.observers():
        whole = torch_ext.Observer(rule)
        whole(x)
        for into, other in ((device, "cpu"), ("cpu", device)):
            left = torch_ext.Observer(rule).to(into)
            right = torch_ext.Observer(rule).to(other)
            left(x[:1234].to(into))
            right(x[1234:].to(other))
            left.merge_(right)
            assert left.extrema.device == torch.device(into)
            assert_same_bits(left.state_dict(), whole.state_dict(), rule)
            assert_same_bits(left.range(), whole.range(), rule)
