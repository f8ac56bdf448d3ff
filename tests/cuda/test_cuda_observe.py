"""Statistics made on the device have the CPU's bits, whatever the data, its layout and its type."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from devices import assert_same_bits
from input_zoo import AROUND, FEW, ZOO, misaligned
from sample_data import DTYPES, VIEWS, sample, strided_views
from statistic_tensors import empty_state, observed
from torch_ext import ops

# Mantissa bits and octaves; the default asks for the most memory on chip, the last for 2 MiB.
LAYOUTS = [(10, 16), (7, 12), (5, 4), (8, 32), (10, 32)]


def assert_parity(
    device: torch.device, x: Tensor, *where: object, axis: int = -1, **layout: Any
) -> None:
    """`x` on the CPU against a copy of it on the device."""
    assert_same_bits(observed(x.to(device), axis, **layout), observed(x, axis, **layout), *where)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_distribution_once(dtype: torch.dtype, device: torch.device):
    for kind, n in itertools.product(ZOO, (1, 5003)):
        assert_parity(device, ZOO[kind](n).to(dtype), kind, n)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ZOO)
def test_distributions(
    kind: str, dtype: torch.dtype, layout: tuple[int, int], device: torch.device
):
    for n in FEW:
        x = ZOO[kind](n).to(dtype)
        assert_parity(device, x, n, mantissa_bits=layout[0], octaves=layout[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ZOO)
def test_without_a_histogram(kind: str, dtype: torch.dtype, device: torch.device):
    for n in FEW:
        assert_parity(device, ZOO[kind](n).to(dtype), n, histogram=False)


@pytest.mark.parametrize("histogram", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_block_boundaries_at_any_alignment(
    dtype: torch.dtype, histogram: bool, device: torch.device
):
    layout = {} if histogram else {"histogram": False}
    for n in AROUND:
        x = ZOO["mixed"](n).to(dtype)
        want = observed(x, **layout)
        for offset, view in misaligned(x.to(device)):
            assert_same_bits(observed(view, **layout), want, n, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gauss", "relu", "constant", "growing", "spread", "mixed"])
def test_many_blocks(kind: str, dtype: torch.dtype, device: torch.device):
    """More elements than all blocks together take at once, and no multiple of anything."""
    x = ZOO[kind](3_000_017).to(dtype)
    assert_parity(device, x)
    assert_parity(device, x, histogram=False)


def test_one_counter_takes_everything(device: torch.device):
    """Past 2^24, where float counters stop, and past what 16 bits hold."""
    n = 2**24 + 5
    for value in (0.0, 1.0, -3.5e-40, torch.nan):
        x = torch.full((1,), value).expand(n)
        want = observed(x)
        assert_same_bits(observed(torch.full((n,), value, device=device)), want, value)
        assert_same_bits(observed(torch.full((1,), value, device=device).expand(n)), want, value)


@pytest.mark.parametrize("where", [0, 1, 1023, 4096, 65_535, 262_143, -1])
def test_one_value_moves_the_window(where: int, device: torch.device):
    """Up by less than the window, to its end, beyond it, and as far as it goes."""
    for octaves, exponent in itertools.product((4, 16), (3, 4, 15, 16, 17, 100)):
        x = sample("gauss", 262_144).clamp(-1.9, 1.9)
        x[where] = -(2.0**exponent)
        assert_parity(device, x, octaves, exponent, octaves=octaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, dtype: torch.dtype, device: torch.device):
    x = ZOO["mixed"](1920).reshape(4, 6, 8, 10).to(dtype)
    on_host, on_device = strided_views(x)[view], strided_views(x.to(device))[view]
    assert on_host.stride() == on_device.stride()
    for axis in range(-1, on_host.dim()):
        assert_same_bits(observed(on_device, axis), observed(on_host, axis), axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_strided_tensors(dtype: torch.dtype, device: torch.device):
    """Each dimension larger than a tile, and none of them a multiple of one."""
    x = ZOO["spread"](3 * 65 * 129 * 67).reshape(3, 65, 129, 67).to(dtype)
    on_device = x.to(device)
    for order in itertools.permutations(range(4)):
        assert_same_bits(observed(on_device.permute(order)), observed(x), order)
    for axis in range(4):
        want = observed(x, axis)
        for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)):
            view = on_device.permute(order)
            assert_same_bits(observed(view, order.index(axis)), want, axis, order)
        assert_same_bits(
            observed(on_device.to(memory_format=torch.channels_last), axis), want, axis
        )


ROWS = [(1, 300_007), (2, 65_536), (3, 100_003), (7, 1), (64, 4096), (129, 1152), (1000, 33)]


@pytest.mark.parametrize("histogram", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows_and_columns(
    shape: tuple[int, int], dtype: torch.dtype, histogram: bool, device: torch.device
):
    layout = {} if histogram else {"histogram": False}
    for kind in ("mixed", "relu", "falling"):
        x = ZOO[kind](shape[0] * shape[1]).reshape(shape).to(dtype)
        want, on_device = observed(x, 0, **layout), x.to(device)
        assert_same_bits(observed(on_device, 0, **layout), want, kind)
        assert_same_bits(observed(on_device.t(), 1, **layout), want, kind, "transposed")
        assert_same_bits(observed(on_device.t().contiguous(), 1, **layout), want, kind, "columns")


def test_many_channels(device: torch.device):
    """More than a grid has blocks in one dimension."""
    x = ZOO["gauss"](2 * 70_001).reshape(70_001, 2)
    assert_parity(device, x, axis=0, histogram=False)
    assert_parity(device, x.t().contiguous(), axis=1, histogram=False)
    assert_parity(device, x[:9000], axis=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_per_channel(layout: tuple[int, int], dtype: torch.dtype, device: torch.device):
    x = ZOO["spread"](5 * 3001).reshape(5, 3001).to(dtype)
    assert_parity(device, x, axis=0, mantissa_bits=layout[0], octaves=layout[1])


@pytest.mark.parametrize("axis", [-1, 0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ZOO)
def test_batches_into_one_statistic_in_any_order(
    kind: str, dtype: torch.dtype, axis: int, device: torch.device
):
    x = ZOO[kind](16 * 5 * 6 * 9).reshape(16, 5, 6, 9).to(dtype)
    batches = [b if axis != 0 else b.transpose(0, 1) for b in x.split([1, 4, 3, 8])]
    channels = {} if axis < 0 else {"channels": batches[0].shape[axis], "octaves": 12}
    want = empty_state(**channels)
    for batch in batches:
        ops.observe_(batch, *want, axis)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        have = empty_state(**channels).to(device)
        for i in order:
            ops.observe_(batches[i].to(device), *have, axis)
        assert_same_bits(have, want, order)


def test_scalars_and_empty_tensors(device: torch.device):
    for value in (0.0, -0.0, -3.25, 1e-45, torch.inf, torch.nan):
        for dtype in DTYPES:
            assert_parity(device, torch.tensor(value, dtype=dtype), value, dtype)
    for shape in ((0,), (0, 3, 4), (3, 0, 4), (2, 3, 0)):
        for axis in range(-1, len(shape)):
            assert_parity(device, torch.empty(shape), shape, axis, axis=axis)


def test_empty_batches_change_nothing(device: torch.device):
    state = observed(sample("gauss", 999).to(device))
    want = state.clone()
    ops.observe_(torch.empty(0, device=device), *state)
    ops.observe_(torch.empty(3, 0, 5, device=device), *state)
    assert_same_bits(state, want)


def test_float64_is_rounded_to_float32_first(device: torch.device):
    edges = [3.4028235677973366e38, 3.4028235677973362e38, 3.5e38, 7e-46, 7.1e-46, 1 + 2.0**-24]
    x = torch.tensor([*edges, *(-e for e in edges)], dtype=torch.float64)
    assert_parity(device, x)
    assert_same_bits(observed(x.to(device)), observed(x.float()))


def test_input_with_a_gradient_is_observed_without_a_graph(device: torch.device):
    x = sample("gauss", 100).to(device).requires_grad_()
    state = observed(x)
    assert_same_bits(state, observed(x.detach().cpu()))
    assert not any(t.requires_grad for t in state)


def test_input_stays_as_it_is(device: torch.device):
    x = ZOO["mixed"](10_001).to(device)
    before = x.clone()
    observed(x)
    assert_same_bits(x, before)


def test_the_comparison_sees_one_missing_value(device: torch.device):
    x = sample("gauss", 5000)
    want, have = observed(x), observed(x[1:].to(device)).to("cpu")
    for part in (want._replace(tally=have.tally), want._replace(counts=have.counts)):
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits(part, want)
    negative_zero = want._replace(extrema=-want.extrema.clone() * 0)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(negative_zero, want._replace(extrema=want.extrema * 0))
