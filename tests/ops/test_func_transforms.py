"""torch.func over the fake-quants as over torch's own op; what writes in place is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from op_samples import SAMPLES
from sample_data import sample
from straight_through import composed_fake_quant, composed_lsq
from torch_ext import ops

Function = Callable[[Tensor], Tensor]
GRID = (-16, 15)
ZERO = torch.zeros(1, dtype=torch.int32)


def ours(x: Tensor) -> Tensor:
    return ops.fake_quant(x, torch.tensor([0.125]), ZERO, *GRID)


def torchs(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 0.125, 0, *GRID)


def composite(x: Tensor) -> Tensor:
    """For forward mode, which torch's op does not have."""
    return composed_fake_quant(x, 0.125, 0, *GRID)


def values(*shape: int) -> Tensor:
    return (sample("gauss", torch.Size(shape).numel()) * 2).reshape(shape).double()


def loss(function: Function) -> Function:
    return lambda x: function(x).pow(3).sum()


# Name: the transform, and whether torch's op has it; it has no forward mode.
TRANSFORMS: dict[str, tuple[Callable[[Function], Function], bool]] = {
    "grad": (lambda f: torch.func.grad(loss(f)), True),
    "grad_of_grad": (
        lambda f: torch.func.grad(lambda x: torch.func.grad(loss(f))(x).square().sum()),
        True,
    ),
    "jacrev": (torch.func.jacrev, True),
    "jacfwd": (torch.func.jacfwd, False),
    "hessian": (lambda f: torch.func.hessian(loss(f)), False),
    "vmap": (torch.func.vmap, True),
    "vmap_of_grad": (lambda f: torch.func.vmap(torch.func.grad(loss(f))), True),
    "vmap_of_columns": (lambda f: torch.func.vmap(f, in_dims=1, out_dims=1), True),
    "jvp": (lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], False),
    "vjp": (lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0], True),
    "hvp": (
        lambda f: lambda x: torch.func.jvp(torch.func.grad(loss(f)), (x,), (x.cos(),))[1],
        False,
    ),
}


@pytest.mark.parametrize(("transform", "has_peer"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_fake_quant_under_a_transform_is_torchs(
    transform: Callable[[Function], Function], has_peer: bool
):
    x = values(4, 3)
    have = transform(ours)(x)
    assert have.abs().max() > 0
    for peer in (composite, torchs) if has_peer else (composite,):
        want = transform(peer)(x)
        assert have.shape == want.shape
        assert torch.allclose(have, want, rtol=1e-12, atol=1e-12)


def test_jvp_of_tensors_with_tangents():
    x = values(40)
    with forward_ad.dual_level():
        found = []
        for function in (ours, composite):
            dual = forward_ad.make_dual(x, torch.cos(x))
            found.append(forward_ad.unpack_dual(function(dual)))
    assert torch.equal(found[0].primal, found[1].primal)
    assert torch.equal(found[0].tangent, found[1].tangent)


def test_jvp_over_scales_for_each_channel():
    """vmap over inputs that all have their own scale."""
    x, scale = values(5, 3, 4), torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]])

    def one(x: Tensor, scale: Tensor) -> Tensor:
        return ops.fake_quant(x, scale, ZERO, *GRID)

    have = torch.func.vmap(one)(x, scale)
    want = torch.stack([one(*pair) for pair in zip(x, scale, strict=True)])
    assert torch.equal(have, want)


@pytest.mark.parametrize("method", ["lsq", "pact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_jvp_of_learned_fake_quants_is_the_transpose_of_their_backward(
    method: str, dtype: torch.dtype
):
    x = (values(6, 50) * 0.7).to(dtype)
    channels = 50 if method == "lsq" else 1
    parameter = torch.linspace(0.05, 0.2, channels) if method == "lsq" else torch.tensor([1.25])
    inputs = [x, parameter]
    if method == "lsq":
        inputs.append(torch.arange(channels) % 3 - 1.0)

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        if method == "lsq":
            return ops.lsq(x, *rest, *GRID, 1)
        return ops.pact(x, *rest, *GRID)

    tangents = [torch.randn_like(t) for t in inputs]
    upstream = torch.randn_like(x)
    out, tangent = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    assert torch.equal(out, function(*inputs))
    gradients = torch.func.vjp(function, *inputs)[1](upstream)
    forward = (tangent.double() * upstream.double()).sum()
    backward = sum(
        (g.double() * t.double()).sum() for g, t in zip(gradients, tangents, strict=True)
    )
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(forward, torch.as_tensor(backward), rtol=bound, atol=bound)


@pytest.mark.parametrize("learned", [True, False], ids=["learned_zero", "fixed_zero"])
def test_jvp_of_the_gradient_of_lsq_is_that_of_its_composite(learned: bool):
    x, scale = values(60), torch.tensor([0.25])
    zero_point = torch.tensor([1.0]) if learned else torch.tensor([1], dtype=torch.int32)

    def product(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        def of(*differentiated: Tensor) -> tuple[Tensor, ...]:
            given = [*differentiated, *inputs[len(differentiated) :]]
            numbers = tuple(range(len(differentiated)))
            return torch.func.grad(lambda *a: function(*a).pow(3).sum(), numbers)(*given)

        count = 3 if learned else 2
        tangents = tuple(torch.full_like(t, 0.5) for t in inputs[:count])
        return [t.double() for t in torch.func.jvp(of, inputs[:count], tangents)[1]]

    have = product(lambda x, s, z: ops.lsq(x, s, z, *GRID, -1, False), x, scale, zero_point)
    want = product(
        lambda x, s, z: composed_lsq(x, s, z, *GRID), x, scale.double(), zero_point.double()
    )
    for mine, other in zip(have, want, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5)


WRITING = ["observe_", "merge_", "follow_", "follow_fake_quant"]


@pytest.mark.parametrize("op", WRITING)
def test_vmap_over_what_writes_in_place_is_refused_by_name(op: str):
    arguments: dict[str, Any] = SAMPLES[op][0]()
    name = next(iter(arguments))
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v)}

    def one(t: Tensor) -> Tensor:
        getattr(torch.ops.torch_ext, op)(**arguments | {name: t})
        return t

    with pytest.raises(RuntimeError, match=rf"Batching rule not implemented for torch_ext::{op};"):
        torch.func.vmap(one)(arguments[name].expand(2, *arguments[name].shape))
    for key, value in before.items():
        assert torch.equal(arguments[key], value)
