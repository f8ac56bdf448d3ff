"""Ops that write to their arguments do what torch's in-place ops do around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torch_ext
from op_samples import SAMPLES, Arguments
from torch_ext import FakeQuantize, ops

NAMES = sorted(
    {
        name.removeprefix("torch_ext::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torch_ext::")
    }
)


def written_by(op: str) -> list[str]:
    schema = getattr(torch.ops.torch_ext, op).default._schema
    return [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]


WRITING = [op for op in NAMES if written_by(op)]
ARGUMENTS = [pytest.param(op, name, id=f"{op}-{name}") for op in WRITING for name in written_by(op)]


def call(op: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.torch_ext, op)(**arguments)


def test_the_ops_that_write_are_these():
    assert WRITING == [
        "_follow_fake_quant_forward",
        "follow_",
        "follow_fake_quant",
        "merge_",
        "observe_",
    ]


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("op", WRITING)
def test_versions_of_the_written_arguments_rise(op: str, differentiated: bool):
    arguments = SAMPLES[op][0]()
    if differentiated and "x" in arguments:
        arguments["x"].requires_grad_()
    tensors = {k: v for k, v in arguments.items() if torch.is_tensor(v)}
    before = {k: v._version for k, v in tensors.items()}
    call(op, arguments)
    risen = {k for k, v in tensors.items() if v._version == before[k] + 1}
    assert risen == set(written_by(op))
    assert all(v._version == before[k] for k, v in tensors.items() if k not in risen)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_tensor_that_was_saved_for_backward_and_overwritten_is_found(op: str, name: str):
    arguments = SAMPLES[op][0]()
    if not arguments[name].is_floating_point():
        return
    factor = torch.ones_like(arguments[name]).requires_grad_()
    product = factor * arguments[name]
    call(op, arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_scale_that_a_quantizer_moves_after_its_use_is_found():
    quantizer = FakeQuantize("fake_quant", "min_max")
    quantizer.state = "calibration"
    quantizer(torch.randn(100))
    quantizer.state = "qat"
    weight = torch.ones(1, requires_grad=True)
    out = (weight * quantizer.scale).square()
    quantizer(torch.randn(100) * 9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_an_inference_tensor_is_not_written_to_outside_of_inference_mode(op: str, name: str):
    arguments = SAMPLES[op][0]()
    with torch.inference_mode():
        arguments[name] = arguments[name].clone()
    before = arguments[name].clone()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"):
        call(op, arguments)
    assert torch.equal(arguments[name], before)
    with torch.inference_mode():
        call(op, arguments)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_tensor_that_requires_a_gradient_is_not_written_to(op: str, name: str):
    """torch's own errors for leaves, and one for what has a history, which would be wrong."""
    arguments = SAMPLES[op][0]()
    if not arguments[name].is_floating_point():
        return
    values = arguments[name].clone()
    leaf = values.clone().requires_grad_()
    cases = {
        "a leaf Variable that requires grad is being used in an in-place": leaf,
        "a view of a leaf Variable that requires grad is being used": leaf.view_as(leaf),
        rf"expected {name} to be a tensor that does not require a gradient": leaf * 1,
    }
    for text, tensor in cases.items():
        with pytest.raises(RuntimeError, match=text):
            call(op, arguments | {name: tensor})
        assert torch.equal(tensor, values)
    with torch.no_grad():
        call(op, arguments | {name: leaf})
    assert leaf.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_second_forward_of_a_checkpoint_writes_nothing_and_raises_no_version(reentrant: bool):
    buffers = {
        "range": torch.zeros(1, 2),
        "scale": torch.ones(1),
        "zero_point": torch.zeros(1, dtype=torch.int32),
        "solved": torch.zeros(1, dtype=torch.uint8),
    }

    def quantize(x: Tensor) -> Tensor:
        return ops.follow_fake_quant(
            x,
            *buffers.values(),
            averaging_constant=0.5,
            rule="min_max",
            quant_min=-128,
            quant_max=127,
            symmetric=True,
        )

    x, weight = torch.randn(50, requires_grad=True), torch.ones(1, requires_grad=True)
    out = checkpoint(quantize, x, use_reentrant=reentrant)
    versions = [b._version for b in buffers.values()]
    assert versions == [1, 1, 1, 1]
    loss = (weight * buffers["scale"]).sum() + out.sum()
    loss.backward()
    assert [b._version for b in buffers.values()] == versions
    assert torch.equal(weight.grad, buffers["scale"])


def test_compiled_code_raises_versions_too():
    arguments = SAMPLES["observe_"][0]()

    def step(x: Tensor, extrema: Tensor, tally: Tensor, counts: Tensor) -> None:
        ops.observe_(x, extrema, tally, counts, 1)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    states = [arguments[name] for name in ("extrema", "tally", "counts")]
    before = [t._version for t in states]
    compiled(arguments["x"], *states)
    assert all(t._version > old for t, old in zip(states, before, strict=True))


def test_a_merge_during_a_backward_pass_raises_the_version():
    state = torch_ext.Observer("min_max")
    state(torch.tensor([0.0, 1.0]))
    other = torch_ext.Observer("min_max")
    other(torch.tensor([-5.0, 9.0]))
    w = torch.ones(1, 2, requires_grad=True)
    y = w * state.extrema
    z = y * 1
    z.register_hook(lambda _: state.merge_(other) and None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
