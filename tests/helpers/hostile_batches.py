"""39 input sequences that break observers in the field, as lists of batches [N, 3, ...]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statistic_tensors import State, empty_state
from torch_ext import ops

FLOAT_MAX = torch.finfo(torch.float32).max
SHAPE = (2, 3, 4, 4)


def normal(scale: float = 1.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(SHAPE, generator=generator) * scale + offset


def full(value: float) -> Tensor:
    return torch.full(SHAPE, value)


def with_value(value: float, *positions: int) -> Tensor:
    x = normal()
    for position in positions:
        x.view(-1)[position] = value
    return x


def full_range() -> Tensor:
    return torch.linspace(-1, 1, 96).reshape(SHAPE) * FLOAT_MAX


Sequence = Callable[[], list[Tensor]]
SEQUENCES: dict[str, Sequence] = {
    "empty_1d": lambda: [torch.empty(0)],
    "empty_4d": lambda: [torch.empty(0, 3, 4, 4)],
    "empty_before_data": lambda: [torch.empty(0, 3, 4, 4), normal()],
    "empty_after_data": lambda: [normal(), torch.empty(0, 3, 4, 4)],
    "zero_channels": lambda: [torch.empty(2, 0, 4, 4)],
    "scalar": lambda: [torch.tensor(1.5)],
    "one_value": lambda: [torch.full((1, 3), 0.7)],
    "one_value_twice": lambda: [torch.full((1, 3), 0.7)] * 2,
    "all_zero": lambda: [full(0.0)],
    "all_zero_thrice": lambda: [full(0.0)] * 3,
    "zero_then_data": lambda: [full(0.0), normal()],
    "constant_positive": lambda: [full(3.7)],
    "constant_negative": lambda: [full(-3.7)],
    "constant_least": lambda: [full(-FLOAT_MAX)],
    "denormals": lambda: [normal(1e-40)],
    "around_1e-30": lambda: [normal(1e-30)],
    "around_1e38": lambda: [normal(1e38).clamp(-FLOAT_MAX, FLOAT_MAX)],
    "full_range": lambda: [full_range()],
    "tiny_then_huge": lambda: [normal(1e-38), normal(1e37)],
    "huge_then_tiny": lambda: [normal(1e37), normal(1e-38)],
    "data_then_largest": lambda: [normal(), full(3.4e38)],
    "offset_1e8": lambda: [normal(1.0, 1e8)],
    "adjacent_floats": lambda: [with_value(1.0, *range(96)), with_value(1.0000001, *range(96))],
    "growing_x1000": lambda: [normal(1e-15 * 1000.0**i) for i in range(11)],
    "one_inf": lambda: [normal(), with_value(math.inf, 40)],
    "one_minus_inf": lambda: [normal(), with_value(-math.inf, 40)],
    "all_inf": lambda: [full(math.inf)],
    "one_nan": lambda: [with_value(math.nan, 50)],
    "all_nan": lambda: [full(math.nan)],
    "nan_first": lambda: [with_value(math.nan, 0), normal()],
    "nan_last": lambda: [normal(), with_value(math.nan, 95)],
    "inf_first": lambda: [full(math.inf), normal()],
    "only_positive": lambda: [normal().abs() + 0.1],
    "only_negative": lambda: [-normal().abs() - 0.1],
    "strided": lambda: [normal().transpose(0, 3).transpose(0, 3)[:, :, ::2, 1::2]],
    "stride_0": lambda: [torch.tensor([0.5, -2.0, 3.0])[None, :, None].expand(4, 3, 5)],
    "requires_grad": lambda: [normal().requires_grad_()],
    "channel_count_changes": lambda: [normal(), torch.ones(2, 5, 4, 4)],
    "rank_changes": lambda: [normal(), torch.ones(2, 3), torch.ones(3)],
}

# What may be refused with a clear text where channels are counted: no such axis, or other channels.
REFUSED_PER_CHANNEL = {
    *("empty_1d", "scalar", "zero_channels", "channel_count_changes", "rank_changes")
}


def as_dtype(batches: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [b.detach().to(dtype).requires_grad_(b.requires_grad) for b in batches]


def finite_values(batches: list[Any]) -> int:
    return sum(int(b.detach().float().isfinite().sum()) for b in batches)


def broken_states() -> dict[str, State]:
    """Statistics that no data makes, as a damaged file may hold them."""
    i64 = torch.int64
    seen = torch.tensor([[100, 0, 0, 0, 0]], dtype=i64)
    states = {}
    for name, pair in {
        "nan": (torch.nan, torch.nan),
        "infinite": (-torch.inf, torch.inf),
        "upside_down": (1.0, -1.0),
        "extrema_without_counts": (-1.0, 2.0),
    }.items():
        states[name] = empty_state()._replace(extrema=torch.tensor([pair]), tally=seen)
    normal = empty_state()
    ops.observe_(torch.randn(1000), *normal)
    states["negative_counts"] = normal._replace(counts=-normal.counts)
    states["negative_tally"] = normal._replace(tally=-normal.tally)
    states["huge_counts"] = normal._replace(counts=normal.counts.clamp(max=1) << 62)
    states["huge_tally"] = normal._replace(tally=torch.full((1, 5), 2**63 - 1))
    states["counts_without_tally"] = normal._replace(tally=torch.zeros(1, 5, dtype=i64))
    states["every_bin_full"] = normal._replace(counts=torch.full_like(normal.counts, 2**63 - 1))
    states["more_tiny_than_all"] = normal._replace(tally=torch.tensor([[5, 9, 9, 0, 0]]))
    return states


PER_CHANNEL = {"qscheme": torch.per_channel_symmetric, "ch_axis": 1, "channel_len": 3}
SCHEMES: dict[str, dict[str, Any]] = {
    "per_tensor": {},
    "unsigned": {"dtype": "uint8"},
    "affine": {"dtype": "uint8", "qscheme": torch.per_tensor_affine},
    "per_channel": PER_CHANNEL,
    "per_channel_affine": {**PER_CHANNEL, "qscheme": torch.per_channel_affine, "dtype": "int4"},
}


def refused(function: Callable[..., Any], *arguments: Any) -> str | None:
    """The text of the exception, if the call raises one."""
    try:
        function(*arguments)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None
