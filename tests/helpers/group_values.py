"""Values in groups, and their comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def spread(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Values of many magnitudes, another one for each row, with a row of zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-12, 10, (rows, 1), generator=generator).double())
    x[rows // 2] = 0
    return x.to(dtype)


def in_groups(x: Tensor, group: int | None) -> np.ndarray[Any, Any]:
    columns = x.shape[-1] if group is None else group
    return x.detach().reshape(-1, columns).double().numpy()


def assert_same(have: Tensor, want: np.ndarray[Any, Any] | Tensor) -> None:
    given = torch.as_tensor(want).reshape(have.shape)
    largest = torch.finfo(have.dtype).max
    rounded = given.clamp(-largest, largest).to(have.dtype)
    wrong = (have != rounded) & ~(have.isnan() & rounded.isnan())
    assert not wrong.any(), (have[wrong][:4], rounded[wrong][:4], int(wrong.sum()))
