"""Groups of weights that the forward computes: their scales come from the values of each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_ext
from torch_ext import get_default_qconfig, named_quantizers, prepare_qat, set_fake_quantize


class Computed(nn.Module):
    """Of each layer, a weight that has gone through an operation before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.kernel = nn.Parameter(torch.randn(4, 8, 3))
        self.up = nn.Parameter(torch.randn(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, torch.tanh(self.weight) * 2)
        x = functional.conv1d(x.reshape(-1, 8, 6), self.kernel + 0.5)
        return functional.conv_transpose1d(x.repeat(1, 2, 1), self.up - 0.5)


def inputs() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(6))


def of_groups(weight: Tensor, axis: int, size: int, largest: int) -> Tensor:
    """Quantized in float64, group by group, with the largest magnitude on the last level."""
    rows = weight.double().movedim(axis, -1)
    groups = rows.reshape(-1, size)
    scale = groups.abs().amax(1, keepdim=True) / largest
    kept = (groups / scale).round() * scale
    return kept.reshape(rows.shape).movedim(-1, axis)


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("int4", 7)])
def test_each_group_is_quantized_by_its_own_values(dtype: str, largest: int) -> None:
    net: Any = Computed().eval()
    keys = {"dtype": dtype, "group_size": 4, "quant_min": -largest}
    net.qconfig = get_default_qconfig(weight_qkwargs=keys)
    prepared = prepare_qat(net, example_inputs=inputs())
    torch_ext.calibrate(prepared, [inputs()], progress=False)
    set_fake_quantize(prepared, "float", pattern=["*"])
    computed = {n: q for n, q in named_quantizers(prepared).items() if q.is_dynamic}
    assert len(computed) == 3
    set_fake_quantize(prepared, "validation", pattern=list(computed))
    weights = {
        "linear": of_groups(torch.tanh(net.weight) * 2, 1, 4, largest),
        "conv": of_groups(net.kernel + 0.5, 1, 4, largest),
        "up": of_groups(net.up - 0.5, 0, 4, largest),
    }
    x = functional.linear(inputs().double(), weights["linear"])
    x = functional.conv1d(x.reshape(-1, 8, 6), weights["conv"])
    want = functional.conv_transpose1d(x.repeat(1, 2, 1), weights["up"])
    torch.testing.assert_close(prepared(inputs()).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint4", "float4_e2m1", "float8_e4m3"])
def test_other_grids_and_training(dtype: str) -> None:
    net: nn.Module = Computed()
    scheme = "per_channel_affine" if dtype == "uint4" else "per_channel_symmetric"
    keys = {"dtype": dtype, "group_size": 4, "qscheme": scheme}
    net.qconfig = get_default_qconfig(weight_qkwargs=keys)  # type: ignore[assignment]
    net = prepare_qat(net, example_inputs=inputs())
    torch_ext.calibrate(net, [inputs()], progress=False)
    set_fake_quantize(net, "qat")
    net(inputs()).square().mean().backward()
    for weight in net.parameters():
        assert weight.grad is not None
        assert bool((weight.grad != 0).any())


@pytest.mark.parametrize(
    ("args", "keys", "have"),
    [
        ((), {"weight_observer": "mse"}, "fake_quant and mse"),
        (("fake_quant", "lsq"), {}, "lsq and min_max"),
    ],
)
def test_what_dynamic_groups_lack_is_refused(args: Any, keys: dict[str, Any], have: str) -> None:
    net: nn.Module = Computed()
    keys = {"weight_qkwargs": {"dtype": "int4", "group_size": 4}} | keys
    net.qconfig = get_default_qconfig(*args, **keys)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"prepare_qat: \w+_quantizer: .*computes, got {have}: "):
        prepare_qat(net, example_inputs=inputs())


def test_groups_that_do_not_divide_are_named() -> None:
    net: nn.Module = Computed()
    net.qconfig = get_default_qconfig(weight_qkwargs={"group_size": 5})  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"mul_quantizer: 8 on axis 1, group_size 5"):
        prepare_qat(net, example_inputs=inputs())
