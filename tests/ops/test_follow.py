"""The moving range of training: the first batch's own, then range += c (batch range - range)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import torch_ext
from sample_data import sample
from sample_grids import GRIDS
from statistic_tensors import observed
from torch_ext import ops

RULES = [r for r in torch_ext.observers() if r != "fixed_scale"]


class Quantizer(NamedTuple):
    range: Tensor
    scale: Tensor
    zero_point: Tensor
    solved: Tensor

    def clone(self) -> Quantizer:
        return Quantizer(*(t.clone() for t in self))


def fresh(channels: int = 1) -> Quantizer:
    return Quantizer(
        torch.zeros(channels, 2),
        torch.ones(channels),
        torch.zeros(channels, dtype=torch.int32),
        torch.zeros(1, dtype=torch.uint8),
    )


def follow(q: Quantizer, x: Tensor, c: float, rule: str, grid: str = "int8", **more: Any) -> None:
    g = GRIDS[grid]
    ops.follow_(x, *q, c, rule, g.quant_min, g.quant_max, g.symmetric, **more)


def batch_range(x: Tensor, rule: str, grid: str, ch_axis: int = -1, **layout: Any) -> Tensor:
    g = GRIDS[grid]
    state = observed(x, ch_axis, **layout)
    return ops.solve(rule, *state, g.quant_min, g.quant_max, g.symmetric)


def assert_qparams_fit(q: Quantizer, grid: str) -> None:
    g = GRIDS[grid]
    scale, zero_point = ops.qparams(q.range, g.quant_min, g.quant_max, g.symmetric)
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.zero_point, zero_point)


@pytest.mark.parametrize("grid", ["int8", "uint4_affine", "uint8"])
@pytest.mark.parametrize("rule", RULES)
def test_first_batch_sets_and_later_ones_move_the_range(rule: str, grid: str):
    q = fresh()
    first, second = sample("shifted", 500), sample("outlier", 700)
    follow(q, first, 0.25, rule, grid)
    assert q.solved.tolist() == [1]
    one = batch_range(first, rule, grid)
    assert torch.equal(q.range, one)
    assert_qparams_fit(q, grid)
    follow(q, second, 0.25, rule, grid)
    two = batch_range(second, rule, grid).double()
    want = one.double() + 0.25 * (two - one.double())
    torch.testing.assert_close(q.range.double(), want, rtol=1e-6, atol=0)
    assert_qparams_fit(q, grid)


@pytest.mark.parametrize("rule", RULES)
def test_per_channel_with_the_layout_of_channels(rule: str):
    q = fresh(3)
    x = torch.stack([sample(k, 300) for k in ("gauss", "relu", "heavy")], 1)
    follow(q, x, 1.0, rule, ch_axis=1, mantissa_bits=7, octaves=12)
    assert torch.equal(q.range, batch_range(x, rule, "int8", 1))
    assert_qparams_fit(q, "int8")


def test_printed_example_of_the_moving_average():
    """Three batches with c = 0.01 end at (-1.0198, 2.0101), int8 scale 0.0157655."""
    q = fresh()
    for low, high in ((-1.0, 2.0), (-3.0, 1.0), (-1.0, 4.0)):
        follow(q, torch.tensor([low, high]), 0.01, "min_max")
    assert q.range[0].tolist() == pytest.approx([-1.0198, 2.0101], abs=1e-6)
    assert q.scale.item() == pytest.approx(0.0157655, abs=1e-7)


def test_constant_0_freezes_and_1_follows():
    q = fresh()
    follow(q, torch.tensor([-1.0, 2.0]), 0.0, "min_max")
    assert q.range.tolist() == [[-1.0, 2.0]]  # unsolved: the first batch sets it all the same
    before = q.clone()
    follow(q, torch.tensor([-9.0, 9.0]), 0.0, "min_max")
    assert all(torch.equal(a, b) for a, b in zip(q, before, strict=True))
    follow(q, torch.tensor([-9.0, 9.0]), 1.0, "min_max")
    assert q.range.tolist() == [[-9.0, 9.0]]


@pytest.mark.parametrize("rule", RULES)
def test_with_constant_0_each_channel_waits_for_a_value_that_is_not_zero(rule: str):
    q, layout = fresh(2), {"mantissa_bits": 7, "octaves": 12}
    zeros, values = torch.zeros(50), sample("gauss", 50)
    follow(q, torch.stack([zeros, zeros]), 0.0, rule, ch_axis=0, **layout)
    assert (q.solved.tolist(), q.range.tolist()) == ([0], [[0, 0], [0, 0]])
    follow(q, torch.stack([values, zeros]), 0.0, rule, ch_axis=0, **layout)
    assert q.solved.tolist() == [1]
    first = batch_range(torch.stack([values, zeros]), rule, "int8", 0)
    assert torch.equal(q.range, first)
    assert_qparams_fit(q, "int8")
    waiting = q.clone()
    follow(
        q, torch.stack([values * 3, values]), 0.0, rule, ch_axis=0, **layout
    )  # solved: nothing changes
    assert all(torch.equal(a, b) for a, b in zip(q, waiting, strict=True))
    q.solved.zero_()
    follow(q, torch.stack([values * 3, values]), 0.0, rule, ch_axis=0, **layout)
    assert torch.equal(q.range[0], first[0])  # it has a range already
    second = batch_range(torch.stack([values, values]), rule, "int8", 0)
    assert torch.equal(q.range[1], second[1])
    assert q.solved.tolist() == [1]


def test_loaded_range_is_the_start():
    q = fresh()
    q.range[0] = torch.tensor([-10.0, 10.0])
    q.solved.fill_(1)
    follow(q, torch.tensor([-2.0, 6.0]), 0.5, "min_max")
    assert q.range.tolist() == [[-6.0, 8.0]]


@pytest.mark.parametrize("bad", [[], [torch.nan], [torch.inf, -torch.inf]], ids=str)
@pytest.mark.parametrize("solved", [0, 1])
def test_nothing_finite_changes_nothing(bad: list[float], solved: int):
    q = fresh()
    q.range[0] = torch.tensor([-1.0, 1.0])
    q.solved.fill_(solved)
    before = q.clone()
    follow(q, torch.tensor(bad), 0.5, "min_max")
    assert all(torch.equal(a, b) for a, b in zip(q, before, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_channel_without_a_finite_value_keeps_its_own(rule: str):
    q = fresh(2)
    first = torch.stack([sample("gauss", 50), sample("relu", 50)])
    follow(q, first, 1.0, rule, ch_axis=0)
    before = q.clone()
    follow(q, torch.stack([torch.full((50,), torch.nan), first[0]]), 1.0, rule, ch_axis=0)
    assert torch.equal(q.range[0], before.range[0])
    assert q.scale[0] == before.scale[0]
    assert not torch.equal(q.range[1], before.range[1])


def test_recomputation_of_a_checkpoint_observes_once():
    """A backward pass that runs the forward again must not move the range, nor count twice."""
    q, state = fresh(), observed(torch.empty(0))

    def block(x: Tensor) -> Tensor:
        follow(q, x, 0.5, "min_max")
        ops.observe_(x, *state)
        return ops.fake_quant(x, q.scale, q.zero_point, -128, 127) * 2

    for use_reentrant in (True, False):
        before = int(state.tally[0, 0])
        x = sample("gauss", 64).requires_grad_()
        out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
        after = q.clone()
        out.sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(q, after, strict=True))
        assert int(state.tally[0, 0]) == before + 64


def test_same_result_at_any_thread_count_and_split_of_strides():
    x = sample("heavy", 120_000).reshape(300, 400)
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        for view in (x, x.t(), x.t().contiguous()):
            q = fresh()
            follow(q, view, 1.0, "mse")
            found.append(torch.cat([q.range[0], q.scale]))
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_following_and_quantizing_at_once_is_doing_both(rule: str, dtype: torch.dtype):
    """Range, qparams, values and gradient; a range that is set, moved, and kept."""
    g = GRIDS["int8"]
    state = fresh(3)
    for c in (0.25, 0.25, 0.0):
        x = (torch.randn(3, 24) * 4).to(dtype)
        together, apart = state.clone(), state.clone()
        ops.follow_(x, *apart, c, rule, g.quant_min, g.quant_max, g.symmetric, ch_axis=0)
        given = [x.clone().requires_grad_(True) for _ in range(2)]
        out = ops.follow_fake_quant(
            given[0], *together, c, rule, g.quant_min, g.quant_max, g.symmetric, ch_axis=0
        )
        want = ops.fake_quant(
            given[1], apart.scale, apart.zero_point, g.quant_min, g.quant_max, ch_axis=0
        )
        assert torch.equal(out, want)
        for have, expected in zip(together, apart, strict=True):
            assert torch.equal(have, expected)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        want.backward(upstream)
        assert torch.equal(given[0].grad, given[1].grad)
        state = together


def test_scale_that_is_a_lazy_clone():
    """It gets memory of its own when the op writes to it; what is quantized has the new scale."""
    x = sample("gauss", 100)
    originals = [torch.zeros(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    range_, scale, zero_point = (torch._lazy_clone(t) for t in originals)
    solved = torch.zeros(1, dtype=torch.uint8)
    grid = (0, 255, False)
    out = ops.follow_fake_quant(x, range_, scale, zero_point, solved, 1.0, "min_max", *grid)
    want = ops.qparams(ops.min_max(x, *grid), *grid)
    assert torch.equal(scale, want[0])
    assert torch.equal(out, ops.fake_quant(x, *want, 0, 255))
    assert [t.unique().tolist() for t in originals] == [[0.0], [1.0], [0]]
