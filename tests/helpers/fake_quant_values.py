"""Values at the ties and edges of a grid, and whether two results have the same bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4028235e38, -3.4e38, 1e30, 8388609.0, -16777217.0]


def around(levels: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """(k + 1/2) scale and k scale, each with four floating-point neighbours on both sides."""
    points = torch.cat([(levels + 0.5) * scale, levels * scale]).to(dtype)
    found = [points]
    for direction in (math.inf, -math.inf):
        near = points
        for _ in range(4):
            near = torch.nextafter(near, torch.tensor(direction, dtype=dtype))
            found.append(near)
    return torch.cat(found)


def assert_same_bits(have: Tensor, want: Tensor) -> None:
    assert have.dtype == want.dtype
    assert have.shape == want.shape
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    nan = want.isnan()
    assert torch.equal(have.isnan(), nan)
    differs = (have.contiguous().view(integers) != want.contiguous().view(integers)) & ~nan
    assert not differs.any(), (
        f"{int(differs.sum())} differ: {have[differs][:5]} {want[differs][:5]}"
    )
