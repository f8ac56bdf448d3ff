"""A layer as rows: the product of rows and unfolded values is what torch's function computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_ext.correction.rounding.layer_rows import LayerRows

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


CASES: list[Any] = [
    (F.linear, (5, 7), (4, 7), (), {}),
    (F.linear, (2, 3, 5, 7), (4, 7), (), {}),
    (F.linear, (7,), (4, 7), (), {}),
    (F.conv1d, (2, 4, 9), (6, 4, 3), (2, 1), {}),
    (F.conv1d, (4, 9), (6, 4, 3), (), {"padding": 1}),
    (F.conv2d, (2, 4, 8, 7), (6, 4, 3, 2), (), {}),
    (F.conv2d, (2, 4, 8, 7), (6, 4, 3, 3), ((2, 1), (1, 2), (1, 2), 1), {}),
    (F.conv2d, (2, 4, 8, 7), (6, 2, 3, 3), (1, 1, 1, 2), {}),
    (F.conv2d, (2, 4, 8, 7), (8, 1, 3, 3), (), {"padding": 1, "groups": 4}),
    (F.conv2d, (4, 8, 7), (4, 1, 3, 3), (), {"padding": 1, "groups": 4, "stride": (2,)}),
    (F.conv2d, (2, 4, 8, 7), (6, 4, 4, 3), (1, "same"), {"dilation": 2}),
    (F.conv2d, (2, 4, 8, 7), (6, 4, 2, 3), (1, "valid"), {}),
    (F.conv2d, (2, 4, 5, 5), (6, 4, 1, 1), (2,), {}),
    (F.conv3d, (2, 2, 5, 4, 6), (4, 1, 2, 3, 2), (1, (1, 0, 1), 1, 2), {}),
    (F.conv_transpose1d, (2, 4, 5), (4, 3, 3), (2, 1, 1), {}),
    (F.conv_transpose2d, (2, 4, 5, 6), (4, 3, 3, 2), (), {}),
    (F.conv_transpose2d, (2, 4, 5, 6), (4, 3, 3, 2), (2, 1, 1), {}),
    (F.conv_transpose2d, (2, 6, 5, 6), (6, 2, 3, 3), ((2, 3), (2, 0), (0, 2), 3, (1, 2)), {}),
    (F.conv_transpose2d, (6, 5, 6), (6, 1, 3, 3), (), {"groups": 6, "padding": 3}),
    (F.conv_transpose3d, (1, 4, 3, 3, 4), (4, 2, 2, 3, 2), (2, 1, 0, 2), {}),
]


@pytest.mark.parametrize(("function", "x", "weight", "options", "named"), CASES)
def test_rows_times_values_are_the_output(
    function: Any, x: Any, weight: Any, options: Any, named: Any
) -> None:
    x, weight = random(*x), random(*weight, seed=1)
    made = function(x, weight, None, *options, **named)
    rows = LayerRows.of(function, weight, options, named)
    as_rows = rows.of_weight(weight)
    assert torch.equal(rows.to_weight(as_rows, weight.shape), weight)
    count = rows.positions(made)
    values = rows.values(rows.of_input(x), torch.arange(count))
    want = rows.outputs(made, None)
    assert values.shape[1] == want.shape[1] == count
    assert torch.allclose(values @ as_rows.mT, want, atol=1e-12)
    some = torch.arange(0, count, 3)
    assert torch.equal(rows.values(rows.of_input(x), some), values[:, some])
    assert torch.equal(rows.outputs(made, some), want[:, some])
