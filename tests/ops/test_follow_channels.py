"""A QAT step on rows in memory, a channel each, is follow_ and then fake_quant, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sample_data import DTYPES
from torch_ext import ops
from torch_ext.ops.quantizing import Mask, Rounding

Buffers = list[Tensor]
GRID = (-128, 127)

# Sizes, channels first, and how they lie in memory. Rows end in the middle of a cache line, or of a
# byte of the mask; there are many short ones, few long ones, and too few or too long to keep.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], int]] = {
    "lines": ((70, 1024), lambda x: x, 0),
    "half_lines": ((211, 1000), lambda x: x, 0),
    "odd": ((1030, 129), lambda x: x, 0),
    "short": ((4100, 1, 3, 3), lambda x: x, 0),
    "single": ((70000, 1), lambda x: x, 0),
    "few": ((7, 20011), lambda x: x, 0),
    "long": ((9, 140000), lambda x: x, 0),
    "transposed": ((300, 520), lambda x: x.t(), 1),
    "channels_last": ((80, 70, 3, 3), lambda x: x.contiguous(memory_format=torch.channels_last), 0),
    "sliced": ((90, 2001), lambda x: x[:, ::2], 0),
    "expanded": ((90, 1000), lambda x: x[:, :1].expand(-1, 1000), 0),
}


def rows(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Gaussian rows of various scales; some are, or have, something else."""
    x = torch.randn(sizes, dtype=torch.float64)
    x *= 10.0 ** (torch.arange(len(x)) % 5 - 2).reshape(-1, *[1] * (x.dim() - 1))
    x[0] = 0
    x[1::37] = torch.nan
    x[2::41] = 0
    x[3::43].view(len(x[3::43]), -1)[:, -1] = torch.inf
    x[4::47].view(len(x[4::47]), -1)[:, 0] = torch.nan
    x[5::53] = -torch.inf
    x[6::59] = 1e-40
    return x.to(dtype)


def buffers(channels: int) -> Buffers:
    scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    return [torch.zeros(channels, 2), scale, zero_point, torch.zeros(1, dtype=torch.uint8)]


def bits(t: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(whole[t.element_size()])


def assert_same(have: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(have, want, strict=True):
        assert torch.equal(bits(a), bits(b))


def step(x: Tensor, q: Buffers, c: float, axis: int, symmetric: bool, **how: Any) -> Tensor:
    return ops.follow_fake_quant(x, *q, c, "min_max", *GRID, symmetric, ch_axis=axis, **how)


def apart(x: Tensor, q: Buffers, c: float, axis: int, symmetric: bool, **how: Any) -> Tensor:
    ops.follow_(x.detach(), *q, c, "min_max", *GRID, symmetric, ch_axis=axis)
    return ops.fake_quant(x, q[1], q[2], *GRID, ch_axis=axis, **how)


def training(
    run: Callable[..., Tensor], batches: list[Tensor], axis: int, symmetric: bool, **how: Any
) -> Iterator[list[Tensor]]:
    """Buffers, output and gradient: set, moved, replaced, and started once."""
    q = buffers(batches[0].shape[axis])
    for x, c in zip(batches, (0.25, 0.25, 1.0, 0.0), strict=True):
        if c == 0.0:
            q = buffers(x.shape[axis])
        given = x.detach().requires_grad_()
        out = run(given, q, c, axis, symmetric, **how)
        out.backward(torch.ones_like(out))
        assert given.grad is not None
        yield [*(t.clone() for t in q), out, given.grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_type_and_number_of_threads(layout: str, dtype: torch.dtype):
    sizes, view, axis = LAYOUTS[layout]
    batches = [view(rows(sizes, dtype)) for _ in range(4)]
    torch.set_num_threads(1)
    want = list(training(apart, batches, axis, False))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for have, expected in zip(training(step, batches, axis, False), want, strict=True):
            assert_same(have, expected)


@pytest.mark.parametrize("rounding", get_args(Rounding))
@pytest.mark.parametrize("mask", get_args(Mask))
def test_every_rounding_and_mask(rounding: str, mask: str):
    batches = [rows((150, 1001), torch.float32) for _ in range(4)]
    how = {"rounding": rounding, "mask": mask}
    for have, want in zip(
        training(step, batches, 0, True, **how),
        training(apart, batches, 0, True, **how),
        strict=True,
    ):
        assert_same(have, want)


def test_output_that_is_written_past_the_caches():
    x = torch.randn(1100, 4096)
    q, other = buffers(1100), buffers(1100)
    out, want = step(x, q, 1.0, 0, True), apart(x, other, 1.0, 0, True)
    assert_same([*q, out], [*other, want])
    assert torch.equal(q[0], torch.stack(torch.aminmax(x, dim=1), 1))


@pytest.mark.parametrize("solved", [0, 1])
def test_nothing_finite_in_any_row_changes_nothing(solved: int):
    q = buffers(64)
    q[0][:, 1] = 2.0
    q[3].fill_(solved)
    before = [t.clone() for t in q]
    out = step(torch.full((64, 1024), torch.nan), q, 0.5, 0, True)
    assert_same(q, before)
    assert out.isnan().all()


def test_first_batch_with_values_in_one_row_moves_none():
    """Whether ranges are set or moved is the same for all rows, whichever is done first."""
    x = torch.full((64, 1024), torch.nan)
    x[63] = torch.linspace(-4, 4, 1024)
    q = buffers(64)
    q[0][:] = torch.tensor([-8.0, 8.0])
    step(x, q, 0.25, 0, True)
    assert q[0].tolist() == [[-8.0, 8.0]] * 63 + [[-4.0, 4.0]]
    assert q[3].tolist() == [1]
    step(x.flip(0), q, 0.25, 0, True)
    assert q[0].tolist() == [[-7.0, 7.0]] + [[-8.0, 8.0]] * 62 + [[-4.0, 4.0]]
