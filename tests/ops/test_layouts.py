"""Every op on every memory layout: the values of contiguous input, and torch's strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from op_samples import statistic
from sample_data import DTYPES, sample
from statistic_tensors import observed
from torch_ext import ops

SIZES = (4, 6, 5, 7)
GRID = (-8, 7)
Views = dict[str, Callable[[Tensor], Tensor]]


def spread(x: Tensor) -> Tensor:
    """Every second element of a larger tensor in channels_last."""
    n, c, h, w = x.shape
    room = torch.empty(n, c, 2 * h, w, dtype=x.dtype).to(memory_format=torch.channels_last)
    view = room[:, :, ::2]
    view.copy_(x)
    return view


# Each gives a tensor of the same sizes and values.
VIEWS: Views = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.clone().contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "spread": spread,
    "last_is_outer": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
}
SHAPES = {
    "images": SIZES,
    "one_channel": (4, 1, 5, 7),
    "one_pixel": (4, 6, 1, 1),
    "one_image": (1, 6, 5, 7),
    "none": (4, 6, 0, 7),
}


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (sample("gauss", 4096)[: torch.Size(shape).numel()] * 2).reshape(shape).to(dtype)


def quantizers(channels: int, axis: int) -> dict[str, Callable[..., Tensor]]:
    """The quantizing ops by name, of x and of learned parameters, if any."""
    scale = torch.linspace(0.2, 0.6, channels)
    zero_point = (torch.arange(channels) % 3 - 1).int()

    def follow(x: Tensor) -> Tensor:
        buffers = (torch.zeros(channels, 2), scale.clone(), zero_point.clone())
        solved = torch.zeros(1, dtype=torch.uint8)
        grid = (*GRID, False)
        return ops.follow_fake_quant(
            x, *buffers, solved, 0.5, "min_max", *grid, options=(), ch_axis=axis
        )

    found: dict[str, Callable[..., Tensor]] = {
        "fake_quant": lambda x: ops.fake_quant(x, scale, zero_point, *GRID, axis),
        "paper": lambda x: ops.fake_quant(x, scale, zero_point, *GRID, axis, "paper"),
        "follow": follow,
        "dynamic": lambda x: ops.dynamic_fake_quant(x, None, *GRID),
        "lsq": lambda x, s: ops.lsq(x, s, zero_point, *GRID, axis),
        "lsq_zero": lambda x, s, z: ops.lsq(x, s, z, *GRID, axis),
    }
    if axis < 0:
        found["pact"] = lambda x, alpha: ops.pact(x, alpha, *GRID)
    return found


def parameters(op: str, channels: int) -> list[Tensor]:
    scale = torch.linspace(0.2, 0.6, channels)
    return {
        "lsq": [scale],
        "lsq_zero": [scale, torch.arange(channels) % 3 - 1.0],
        "pact": [torch.tensor([1.5])],
    }.get(op, [])


def run(function: Any, x: Tensor, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output, gradients, and the gradient of the gradient in a direction."""
    inputs = [t.detach().requires_grad_() for t in (x, *given)]
    out = function(*inputs)
    up = upstream.detach().requires_grad_()
    first = torch.autograd.grad(out, inputs, up, create_graph=True)
    (second,) = torch.autograd.grad(first[0], up, x.detach())
    return [out.detach(), *(t.detach() for t in first), second]


def cases() -> Iterator[Any]:
    for name, shape in SHAPES.items():
        for axis in (-1, 0, 1, 3):
            yield pytest.param(shape, axis, id=f"{name}-axis{axis}")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("shape", "axis"), list(cases()))
def test_quantizing_ops(shape: tuple[int, ...], axis: int, view: str):
    channels = 1 if axis < 0 else shape[axis]
    x = data(shape)
    laid_out = VIEWS[view](x)
    assert torch.equal(laid_out, x)
    want_strides = torch.neg(laid_out).stride()
    for op, function in quantizers(channels, axis).items():
        given = parameters(op, channels)
        upstream = torch.cos(x)
        want = run(function, x.clone(), given, upstream)
        for other in ("contiguous", view):
            have = run(function, laid_out, given, VIEWS[other](upstream))
            for mine, expected in zip(have, want, strict=True):
                if mine.shape == x.shape:
                    assert torch.equal(mine, expected), op
                    assert same_strides(mine, want_strides), (op, mine.stride(), want_strides)
                else:  # sums in another order
                    assert torch.allclose(mine, expected, rtol=1e-6, atol=1e-7), op
        with torch.no_grad():
            out = function(laid_out, *given)
        assert torch.equal(out, want[0])
        assert same_strides(out, want_strides), op


def same_strides(t: Tensor, strides: tuple[int, ...]) -> bool:
    """Of axes of size 1 too, by which torch tells memory formats."""
    return t.numel() == 0 or t.stride() == strides


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [-1, 1])
def test_large_images_in_channels_last(axis: int, dtype: torch.dtype):
    """Past the sizes from which threads share the work and outputs are streamed."""
    x = torch.randn(8, 24, 130, 131).to(dtype)
    channels = 24 if axis == 1 else 1
    laid_out = x.contiguous(memory_format=torch.channels_last)
    for op, function in quantizers(channels, axis).items():
        if op in ("paper", "pact"):
            continue
        given, upstream = parameters(op, channels), torch.cos(x.float()).to(dtype)
        want = run(function, x, given, upstream)
        have = run(function, laid_out, given, upstream)
        for mine, expected in zip(have, want, strict=True):
            if mine.shape == x.shape:
                assert torch.equal(mine, expected), op
                assert mine.is_contiguous(memory_format=torch.channels_last)
            else:
                assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-6), op


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("axis", [-1, 0, 1, 3])
def test_ops_that_read_values(axis: int, view: str):
    x = data(SIZES)
    laid_out = VIEWS[view](x)
    want, have = observed(x, axis), statistic(x[:0] if axis else x[:, :0], axis)
    ops.observe_(laid_out, *have.values(), axis)
    for mine, expected in zip(have.values(), want, strict=True):
        assert torch.equal(mine, expected)
    for rule in torch_ext.observers():
        call = getattr(ops, rule)
        assert torch.equal(call(laid_out, *GRID, ch_axis=axis), call(x, *GRID, ch_axis=axis)), rule


def test_expanded_input_gives_a_dense_output():
    x = torch.randn(1, 6, 1, 7).expand(SIZES)
    for axis in (-1, 1):
        channels = 6 if axis == 1 else 1
        for op, function in quantizers(channels, axis).items():
            given = parameters(op, channels)
            want = run(function, x.contiguous(), given, torch.cos(x))
            have = run(function, x, given, torch.cos(x))
            assert torch.equal(have[0], want[0])
            assert torch.equal(have[1], want[1])
            assert have[0].is_contiguous()


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_channels_last(axis: int, dynamic: bool):
    channels = 6 if axis == 1 else 1
    for op, function in quantizers(channels, axis).items():
        given = parameters(op, channels)
        x = VIEWS["channels_last"](data(SIZES))
        inputs = [t.clone().requires_grad_() for t in (x, *given)]

        def loss(x: Tensor, *rest: Tensor, function: Any = function) -> Tensor:
            return function(x * 2, *rest).square().sum()

        want = torch.autograd.grad(loss(*inputs), inputs)
        torch.compiler.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        have = torch.autograd.grad(compiled(*inputs), inputs)
        assert torch.equal(have[0], want[0]), op
        assert have[0].is_contiguous(memory_format=torch.channels_last), op


def test_vmap_over_slices_of_another_order():
    """A slice may lie in another order than the whole: the mask belongs to the forward's order."""
    scale, zero_point = torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32)
    x = torch.randn(3, 4, 5).permute(2, 1, 0)

    def gradient(t: Tensor) -> Tensor:
        def loss(v: Tensor) -> Tensor:
            return ops.fake_quant(v, scale, zero_point, -2, 1).square().sum()

        return torch.func.grad(loss)(t)

    for dims in range(3):
        want = torch.stack([gradient(t.contiguous()) for t in x.unbind(dims)])
        assert torch.equal(torch.func.vmap(gradient, in_dims=dims)(x), want)


def test_a_size_that_data_decides_compiles():
    def rows(x: Tensor) -> Tensor:
        return ops.fake_quant(x[x[:, 0] > 0].t(), torch.ones(1), torch.zeros(1).int(), -128, 127)

    x = torch.randn(8, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch._dynamo.reset()
        compiled = torch.compile(rows, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), rows(x))
