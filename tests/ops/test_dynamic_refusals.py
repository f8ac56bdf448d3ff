"""What dynamic_fake_quant refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from op_samples import NVFP4
from torch_ext import ops

X = torch.ones(4, 48)
ONE = torch.ones(1)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("group_size to be a divisor of the last axis, 48, got 32", {"group_size": 32}),
    ("group_size to be a divisor of the last axis, 48, got 96", {"group_size": 96}),
    ("group_size to be -1 (the whole last axis) or at least 1, got 0", {"group_size": 0}),
    ("group_size to be -1 (the whole last axis) or at least 1, got -2", {"group_size": -2}),
    (
        "x to be of one axis or more, along the last of which groups lie, got a scalar",
        {"x": torch.tensor(1.0)},
    ),
    ("x to be float32, float64, float16 or bfloat16, got Int", {"x": X.int()}),
    ("grid to be symmetric or affine, got neither", {"grid": "[-8,7]"}),
    (
        "scale_rule to be one of grid, tvm, floor, even, got up",
        {"grid": "[-8,7] symmetric scale_rule=up"},
    ),
    (
        "scale_rule to be grid, tvm or floor on integers, which have no mantissa, got even",
        {"grid": "[-8,7] symmetric scale_rule=even"},
    ),
    (
        "scale_rule to be grid on an affine grid, got floor",
        {"grid": "[-8,7] affine scale_rule=floor"},
    ),
    (
        "power_of_two to be left out with scale_rule=floor, got both",
        {"grid": "[-8,7] symmetric scale_rule=floor power_of_two"},
    ),
    (
        "power_of_two to be left out with scale_rule=floor, got both",
        {"grid": "float8_e4m3 power_of_two scale_rule=floor"},
    ),
    (
        "power_of_two to be left out with scale_rule=even, got both",
        {"grid": "float8_e4m3 scale_rule=even power_of_two"},
    ),
    (
        "tensor_scale to be None, as the grid has no scale_dtype, got a tensor",
        {"tensor_scale": ONE},
    ),
    (
        "tensor_scale to be Float of shape [1], as the grid has a scale_dtype, got None",
        {"grid": NVFP4},
    ),
    ("tensor_scale to be Float, got Double", {"grid": NVFP4, "tensor_scale": ONE.double()}),
    ("tensor_scale to be of shape [1], got [2]", {"grid": NVFP4, "tensor_scale": torch.ones(2)}),
    ("tensor_scale to be between 7.52316e-37 and", {"grid": NVFP4, "tensor_scale": ONE * 0}),
    ("tensor_scale to be between", {"grid": NVFP4, "tensor_scale": -ONE}),
    ("tensor_scale to be between", {"grid": NVFP4, "tensor_scale": ONE * torch.nan}),
    ("tensor_scale to be between", {"grid": NVFP4, "tensor_scale": ONE * torch.inf}),
    ("tensor_scale to be between", {"grid": NVFP4, "tensor_scale": ONE * 1e-37}),
    ("tensor_scale to be between", {"grid": NVFP4, "tensor_scale": ONE * 3e35}),
    (
        "tensor_scale to be a constant, got one that requires a gradient",
        {"grid": NVFP4, "tensor_scale": torch.ones(1, requires_grad=True)},
    ),
    (
        "grid to be symmetric with scale_dtype, got affine",
        {"grid": "[-8,7] affine scale_dtype=float8_e4m3"},
    ),
    ("scale_rule to be grid with scale_dtype, got floor", {"grid": f"{NVFP4} scale_rule=floor"}),
    ("power_of_two to be left out with scale_dtype, got both", {"grid": f"{NVFP4} power_of_two"}),
    (
        "scale_dtype to be float8_e4m3, got float8_e5m2",
        {"grid": "float4_e2m1 scale_dtype=float8_e5m2"},
    ),
]


@pytest.mark.parametrize(("message", "wrong"), REFUSED)
def test_refuses_by_name(message: str, wrong: dict[str, Any]):
    given: dict[str, Any] = {"x": X, "group_size": 16, "grid": "[-8,7] symmetric", **wrong}
    with pytest.raises(RuntimeError) as error:
        ops.dynamic_fake_quant(**given)
    assert str(error.value).splitlines()[0].startswith(f"dynamic_fake_quant: expected {message}")


def test_ops_without_a_tensor_scale_refuse_a_grid_that_needs_one():
    x = torch.randn(64)
    buffers = (torch.zeros(1, 2), torch.ones(1), torch.zeros(1).int(), torch.zeros(1).byte())
    for call in (
        lambda: ops.follow_(x, *buffers, 1.0, "min_max", grid=NVFP4),
        lambda: ops.follow_fake_quant(x, *buffers, 1.0, "min_max", grid=NVFP4),
        lambda: ops.mse(x, grid=NVFP4),
        lambda: ops.mix(x, grid=NVFP4),
    ):
        with pytest.raises(
            RuntimeError, match="grid to be without scale_dtype, as the op takes no tensor_scale"
        ):
            call()
    assert float(ops.percentile(x, grid=NVFP4, percentile=100).abs().max()) == float(x.abs().max())
    with pytest.raises(RuntimeError, match="qparams: expected tensor_scale to be None, as the"):
        ops.qparams(torch.zeros(1, 2), -8, 7, True, tensor_scale=ONE)


def test_qparams_has_no_gradient_of_a_tensor_scale():
    tensor_scale = torch.ones(1, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="qparams: expected tensor_scale to be a constant, got one that requires"
    ):
        ops.qparams(torch.zeros(1, 2), grid=NVFP4, tensor_scale=tensor_scale)
    with torch.no_grad():
        have = ops.qparams(torch.zeros(1, 2), grid=NVFP4, tensor_scale=tensor_scale)
    assert have[0].item() == 2.0**-6
