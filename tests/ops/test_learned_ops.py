"""lsq and pact: values and gradients against the papers, by hand and in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from straight_through import composed_lsq
from torch_ext import ops

NONE = torch.zeros(1, dtype=torch.int32)
# Values around the ends of int8 with scale 1, upstream gradients 1.
VALUES = [-200, -128.4, -1.5, -0.5, 0.2, 0.5, 1.5, 2.5, 126.6, 127.4, 127.6, 300]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def test_lsq_by_hand():
    x = torch.tensor(VALUES, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    out = ops.lsq(x, scale, NONE, -128, 127, use_grad_scaling=False)
    out.sum().backward()
    assert out.tolist() == [-128, -128, -2, 0, 0, 0, 2, 2, 127, 127, 127, 127]
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert scale.grad.item() == pytest.approx(124.7, abs=1e-5)


@pytest.mark.parametrize(("axis", "batch", "elements"), [(-1, -1, 60), (-1, 0, 20), (1, 0, 5)])
def test_the_gradient_scale_counts_the_elements_of_one_scale(axis: int, batch: int, elements: int):
    x = torch.randn(3, 4, 5)
    channels = 1 if axis < 0 else 4
    zero_point = torch.zeros(channels, dtype=torch.int32)
    found = []
    for scaled in (True, False):
        scale = torch.full((channels,), 0.1, requires_grad=True)
        ops.lsq(x, scale, zero_point, -8, 7, axis, scaled, batch).sum().backward()
        found.append(scale.grad)
    assert torch.allclose(found[0], found[1] / math.sqrt(elements * 7), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
def test_lsq_is_the_function_composed_of_torch_ops(axis: int, dtype: torch.dtype):
    x = (torch.randn(6, 7, 50) * 2).to(dtype)
    channels = 1 if axis < 0 else x.shape[axis]
    shape = [1, 1, 1]
    if axis >= 0:
        shape[axis] = channels
    # Powers of two: x/s is then exact, and ties are ties in float64 as well.
    scale = 0.25 * 2.0 ** -(torch.arange(channels) % 3)
    zero_point = torch.arange(channels) % 5 - 2.0
    upstream = torch.randn(6, 7, 50).to(dtype)
    have = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    out = ops.lsq(*have, -8, 7, axis, False)
    out.backward(upstream)
    want = [t.double().clone().requires_grad_() for t in (x, scale, zero_point)]
    expected = composed_lsq(want[0], want[1].view(shape), want[2].view(shape), -8, 7)
    expected.backward(upstream.double())
    assert torch.allclose(out.double(), expected, rtol=2**-8, atol=1e-6)
    assert torch.equal(have[0].grad.double(), want[0].grad)
    for mine, theirs in zip(have[1:], want[1:], strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-6, atol=1e-6)


def test_gradcheck_where_the_function_is_smooth():
    """Saturated elements: the output is linear in scale and zero point."""
    x = torch.tensor([-9.0, 9.0, 12.0, -15.0], dtype=torch.float64, requires_grad=True)

    def of_x(x: Tensor) -> Tensor:
        return ops.lsq(x, torch.full((1,), 0.5), NONE, -4, 3)

    assert torch.autograd.gradcheck(of_x, (x,))
    for value in (0.5, -0.5):
        scale = torch.full((1,), value, requires_grad=True)
        out = ops.lsq(x.detach(), scale, NONE, -4, 3, use_grad_scaling=False)
        upstream = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)
        out.backward(upstream)
        step = 2.0**-10
        ends = [
            ops.lsq(x.detach(), torch.full((1,), value + d), NONE, -4, 3).mul(upstream).sum()
            for d in (step, -step)
        ]
        assert scale.grad.item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item())


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-30, 5e-39])
def test_no_scale_is_ever_used_that_is_not_positive(value: float):
    scale = torch.full((1,), value, requires_grad=True)
    out = ops.lsq(torch.tensor([1.0, -1.0, 0.0]), scale, NONE, -128, 127)
    assert torch.isfinite(out).all()
    assert (out.sign() == torch.tensor([1.0, -1.0, 0.0])).all()
    out.sum().backward()
    assert torch.isfinite(scale.grad).all()


def test_the_gradient_of_a_negative_scale_has_its_sign():
    gradients = []
    for value in (0.3, -0.3):
        scale = torch.full((1,), value, requires_grad=True)
        ops.lsq(torch.linspace(-3, 3, 50), scale, NONE, -8, 7).sum().backward()
        gradients.append(scale.grad.item())
    assert gradients[0] == -gradients[1] != 0


def test_pact_by_hand():
    x = torch.tensor([-1.0, 0.0, 0.5, 5.9, 6.0, 7.0], requires_grad=True)
    alpha = torch.full((1,), 6.0, requires_grad=True)
    out = ops.pact(x, alpha, 0, 15)
    out.sum().backward()
    assert out.tolist() == pytest.approx([0, 0, 0.4, 6, 6, 6], abs=1e-6)
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]
    assert alpha.grad.item() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pact_on_a_signed_grid_clips_both_sides(dtype: torch.dtype):
    x = torch.tensor([-7.0, -6.0, -5.0, 0.0, 5.0, 6.0, 8.0]).to(dtype).requires_grad_()
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]).to(dtype)
    alpha = torch.full((1,), -6.0, requires_grad=True)
    out = ops.pact(x, alpha, -127, 127)
    out.backward(upstream)
    scale = torch.full((1,), 6 / 127)
    assert torch.equal(out, ops.fake_quant(x.detach(), scale, NONE, -127, 127))
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 0, 0]
    assert alpha.grad.item() == -(32 + 64 - 1 - 2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_do_not_depend_on_the_number_of_threads(threads: int):
    x, upstream = torch.randn(8, 16, 700), torch.randn(8, 16, 700)
    before = torch.get_num_threads()

    def gradients() -> list[Tensor]:
        scale = torch.full((16,), 0.2, requires_grad=True)
        zero_point = torch.zeros(16, requires_grad=True)
        out = ops.lsq(x, scale, zero_point, -8, 7, 1)
        return list(torch.autograd.grad(out, [scale, zero_point], upstream))

    want = gradients()
    try:
        torch.set_num_threads(threads)
        for have, expected in zip(gradients(), want, strict=True):
            assert torch.equal(have, expected)
    finally:
        torch.set_num_threads(before)


def test_a_gradient_that_nothing_asks_for_is_not_given():
    """x alone, the scale alone, and a fixed zero point."""
    x, scale = torch.linspace(-3, 3, 50), torch.full((1,), 0.2)
    for wanted in (x, scale):
        inputs = [t.clone().requires_grad_(t is wanted) for t in (x, scale)]
        out = ops.lsq(*inputs, NONE, -8, 7)
        edges = [edge is not None for edge, _ in out.grad_fn.next_functions]
        assert edges == [t is wanted for t in (x, scale)] + [False]
        out.sum().backward()
        assert [t.grad is not None for t in inputs] == [t is wanted for t in (x, scale)]


@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
def test_the_backward_computes_what_is_asked_for(axis: int, of_x: bool):
    x, grad = torch.randn(5, 6, 40), torch.randn(5, 6, 40)
    channels = 1 if axis < 0 else 6
    scale, zero_point = torch.full((channels,), 0.2), torch.zeros(channels)
    arguments = (grad, x, "lsq", scale, zero_point, "[-8,7]", axis)
    backward = torch.ops.torch_ext._learned_fake_quant_backward
    everything = backward(*arguments)
    some = backward(*arguments, of_x=of_x, of_parameters=not of_x)
    for have, want, wanted in zip(some, everything, [of_x] + [not of_x] * 3, strict=True):
        assert torch.equal(have, want if wanted else want.new_empty(0))


def test_a_scale_and_a_zero_point_of_one_value_may_have_different_shapes():
    x, upstream = torch.randn(50), torch.randn(50)
    want = None
    for shapes in (((1,), (1,)), ((), (1,)), ((1,), ()), ((), ())):
        scale = torch.full(shapes[0], 0.2, requires_grad=True)
        zero_point = torch.full(shapes[1], 1.0, requires_grad=True)
        out = ops.lsq(x, scale, zero_point, -8, 7)
        first = torch.autograd.grad(out, [scale, zero_point], upstream, create_graph=True)
        second = torch.autograd.grad(first[0].sum() * 3, zero_point)
        assert [t.shape for t in (*first, *second)] == [scale.shape, *[zero_point.shape] * 2]
        found = [out, *(t.reshape(()) for t in (*first, *second))]
        want = want or found
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
