"""Statistics are a pure function of the multiset of values: against counting each by itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sample_data import DTYPES, KINDS, VIEWS, sample, strided_views
from statistic_tensors import (
    State,
    assert_same_state,
    assert_state_counts,
    empty_state,
    observed,
    plain,
)
from torch_ext import ops

LAYOUTS = [(10, 16), (7, 12), (5, 4), (8, 32)]

# Every magnitude at once, so that the window moves; the special values and both zeros often.
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 2.0**-126, 3.4e38, -1.0, 2.0]
numbers = st.one_of(
    st.sampled_from(SPECIAL),
    st.floats(width=32),
    st.floats(-8, 8, width=32),
    st.floats(width=16),
)
lists = st.lists(numbers, max_size=60)


def floats(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@given(values=lists, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_equals_the_count_of_each_value(values: list[float], dtype: torch.dtype, layout):
    x = floats(values, dtype)
    state = observed(x, mantissa_bits=layout[0], octaves=layout[1])
    assert_state_counts(state, [x])
    assert state.tally[0, [0, 3, 4]].sum() == x.numel()


@given(values=st.lists(st.floats(), max_size=40))
def test_float64_is_rounded_to_float32_first(values: list[float]):
    x = torch.tensor([*values, 3.4028235677973366e38, 3.5e38, 7e-46, 8e-46], dtype=torch.float64)
    assert_state_counts(observed(x), [x])
    assert_same_state(observed(x), observed(x.float()))


@given(values=lists)
def test_without_histogram_only_extrema_and_tally_are_kept(values: list[float]):
    x = floats(values)
    state = observed(x, histogram=False)
    assert_state_counts(state, [x])
    assert state.tally[0, 2] == 0


@given(values=lists, data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_any_split_order_and_tree_of_merges_gives_the_same_bits(values, data, layout):
    bits, octaves = layout
    whole = observed(floats(values), mantissa_bits=bits, octaves=octaves)
    shuffled = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    edges = [0, *cuts, len(values)]
    parts = [shuffled[a:b] for a, b in itertools.pairwise(edges)]
    running = empty_state(mantissa_bits=bits, octaves=octaves)
    for part in parts:
        ops.observe_(floats(part), *running)
    assert_same_state(running, whole)
    states = [observed(floats(p), mantissa_bits=bits, octaves=octaves) for p in parts]
    while len(states) > 1:
        into = states.pop(data.draw(st.integers(0, len(states) - 1)))
        other = states.pop(data.draw(st.integers(0, len(states) - 1)))
        before = other.clone()
        ops.merge_(*into, *other)
        assert_same_state(other, before)
        states.append(into)
    assert_same_state(states[0], whole)


@given(values=lists)
def test_merging_an_empty_state_is_the_identity_both_ways(values: list[float]):
    state, empty = observed(floats(values)), empty_state()
    want = state.clone()
    ops.merge_(*state, *empty_state())
    assert_same_state(state, want)
    ops.merge_(*empty, *state)
    assert_same_state(empty, want)


@pytest.mark.parametrize("growth", [1, 5, 15, 16, 40])
def test_growth_folds_the_lowest_octaves_into_tiny(growth: int):
    x = torch.cat([2.0 ** -torch.arange(16.0), torch.tensor([0.0])])
    state = observed(x)
    assert state.tally.tolist() == [[17, 1, 0, 0, 0]]
    ops.observe_(torch.tensor([2.0**growth]), *state)
    assert state.tally.tolist() == [[18, 1, min(growth, 16), 0, 0]]
    assert int(state.counts.sum()) == 17 - min(growth, 16)
    assert_state_counts(state, [torch.cat([x, torch.tensor([2.0**growth])])])


def test_octave_lies_in_its_slot_and_sign_plane():
    state = observed(torch.tensor([1.0, -1.0, 1.5, 0.25, -1e-3]))
    where = {tuple(i.tolist()) for i in state.counts[0].nonzero()}
    sub = int((1e-3 * 2**10 - 1) * 1024)
    assert where == {(1, 0, 0), (0, 0, 0), (1, 0, 512), (1, 14, 0), (0, 6, sub)}


def wide(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Enough of each kind for every thread to get some, with specials at both ends."""
    kinds = ["gauss", "heavy", "two_scales", "relu"]
    x = torch.cat([sample(kind, count // 4) for kind in kinds])
    x[:3] = torch.tensor([math.nan, -math.inf, -0.0])
    x[-2:] = torch.tensor([math.inf, 1e-41])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_changes_nothing(dtype: torch.dtype):
    x = wide(300_000, dtype)
    channels = x.reshape(3, 50, -1)
    torch.set_num_threads(1)
    want, want_channels = observed(x), observed(channels, 1)
    assert want.tally[0, [0, 3, 4]].sum() == x.numel()
    for threads in range(2, 9):
        torch.set_num_threads(threads)
        assert_same_state(observed(x), want)
        assert_same_state(observed(channels, 1), want_channels)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_large_tensor_against_brute_force(kind: str):
    x = sample(kind, 20_011)
    assert_state_counts(observed(x), [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_and_axis_change_nothing(view: str, dtype: torch.dtype):
    x = strided_views(wide(1920).reshape(4, 6, 8, 10).to(dtype))[view]
    before = x.clone()
    assert_same_state(observed(x), observed(x.contiguous()))
    assert_state_counts(observed(x), [x])
    for axis in range(x.dim()):
        state = observed(x, axis)
        assert_state_counts(state, list(x.unbind(axis)))
    assert torch.equal(x.double().nan_to_num(), before.double().nan_to_num())


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0, 4), (1, 2, 0)])
def test_empty_tensor_changes_nothing(shape: tuple[int, ...]):
    state = observed(torch.tensor([1.0, 2.0]))
    want = state.clone()
    ops.observe_(torch.empty(shape), *state)
    assert_same_state(state, want)
    for axis in range(len(shape)):
        channels = observed(torch.empty(shape), axis)
        assert_same_state(channels, empty_state(shape[axis], 7, 12))


def test_scalar_tensor_is_one_value():
    assert_state_counts(observed(torch.tensor(-3.25)), [torch.tensor([-3.25])])


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), j=st.integers(-9, 9)
)
def test_scaling_by_a_power_of_two_moves_the_slots_only(values: list[float], j: int):
    x = floats([v for v in values if v == 0 or abs(v) > 1e-20] or [1.0])
    one, other = observed(x), observed(x * 2.0**j)
    assert torch.equal(one.extrema * 2.0**j, other.extrema)
    assert torch.equal(one.tally, other.tally)
    assert torch.equal(one.counts.roll(j, 2), other.counts)


def doubled(state: State, times: int) -> State:
    for _ in range(times):
        ops.merge_(*state, *state.clone())
    return state


@pytest.mark.parametrize("exponent", [31, 33, 50])
def test_counts_stay_exact_past_32_bits(exponent: int):
    x = torch.cat([torch.zeros(3), torch.tensor([1.0, 1.0, -2.0, 1e-30, torch.inf, torch.nan])])
    state = doubled(observed(x), exponent)
    assert state.tally.tolist() == [[n << exponent for n in (7, 3, 1, 1, 1)]]
    assert state.counts[0, 1, 0, 0] == 2 << exponent
    assert int(state.counts.sum()) == 3 << exponent


def test_one_bin_counts_past_the_float32_limit():
    """Float counters stop at 2^24."""
    count = 2**24 + 5
    state = observed(torch.ones(1).expand(count))
    assert state.tally.tolist() == [[count, 0, 0, 0, 0]]
    assert state.counts[0, 1, 0, 0] == count


def test_more_than_2_31_elements_in_one_call():
    """Index arithmetic of 32 bits would wrap; repeated rows need no memory."""
    row = torch.ones(2**16, dtype=torch.float16)
    row[:2] = torch.tensor([-2.0, torch.nan])
    rows = 2**15 + 1
    state = observed(row.expand(rows, -1), mantissa_bits=5, octaves=4)
    assert state.tally.tolist() == [[rows * (2**16 - 1), 0, 0, 0, rows]]
    assert state.counts[0].sum((1, 2)).tolist() == [rows, rows * (2**16 - 2)]


def test_autograd_input_is_observed_without_a_graph():
    x = sample("gauss", 100).requires_grad_()
    state = observed(x)
    assert_state_counts(state, [x.detach()])
    assert not any(t.requires_grad for t in state)


def test_reference_sees_a_dropped_value():
    """The comparison above fails when one value is missing."""
    x = sample("gauss", 100)
    with pytest.raises(AssertionError):
        assert_state_counts(observed(x), [x[1:]])
    assert plain(x, observed(x)).counts().sum() == np.int64(100)
