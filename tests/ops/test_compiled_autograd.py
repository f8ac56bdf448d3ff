"""Compiled autograd traces the backward of the fake-quants, first and second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_ext import ops

ZERO = torch.zeros(1, dtype=torch.int32)
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fake_quant": lambda x, s: ops.fake_quant(x * s, torch.tensor([0.25]), ZERO, -8, 7),
    "lsq": lambda x, s: ops.lsq(x, s, ZERO, -8, 7),
    "lsq_zero": lambda x, s: ops.lsq(x, s, s * 4, -8, 7),
    "pact": lambda x, s: ops.pact(x, s * 8, -8, 7),
}


def loss_of(method: str, penalty: bool) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the tensors whose gradients it has."""
    torch.manual_seed(2)
    x, s = (torch.randn(6, 9) * 2).requires_grad_(), torch.full((1,), 0.25, requires_grad=True)
    loss = METHODS[method](x, s).pow(3).sum()
    if penalty:
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = first.square().sum()
    return loss, [x, s]


@pytest.mark.parametrize("penalty", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_eager(method: str, penalty: bool):
    loss, inputs = loss_of(method, penalty)
    want = torch.autograd.grad(loss, inputs)
    loss, inputs = loss_of(method, penalty)
    graphs = []

    def compiler(graph: torch.fx.GraphModule) -> Callable[..., object]:
        graphs.append(graph)
        return torch.compile(graph, backend="eager", fullgraph=True)

    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    assert len(graphs) == 1
    for t, expected in zip(inputs, want, strict=True):
        assert torch.equal(t.grad, expected)
