"""Programs that decompose themselves become the files that torch.onnx's own tracing makes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import export_models
from nets.tiny_net import images
from onnx_runs import run
from torch_ext import named_quantizers
from torch_ext.export.common.plain_program import spare_tracing
from torch_ext.export.common.trace import symbols, trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)) * 4


class Net(nn.Module):
    """A convolution, a function of its result and of the input, and another layer."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)
        self.function = function

    def forward(self, input: Tensor) -> Tensor:  # a name that fx would change
        made = self.function(self.first(input), input)
        out: Tensor = {2: self.head, 4: self.last}.get(made.dim(), nn.Identity())(made)
        return out


def _written_after_a_reader(y: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(y)
    y.copy_(y + x)
    return y * gate


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda y, x: F.relu(y),
    "relu_": lambda y, x: F.relu(y, inplace=True),
    "relu6": lambda y, x: F.hardtanh(y, 0.0, 6.0),
    "relu6_": lambda y, x: F.hardtanh(y, 0.0, 6.0, inplace=True),
    "hardtanh": lambda y, x: F.hardtanh(y),
    "clamp": lambda y, x: y.clamp(-0.5, 2.0),
    "clamp_": lambda y, x: y.clamp_(-0.5, 2.0),
    "sigmoid": lambda y, x: torch.sigmoid(y) * y,
    "sigmoid_": lambda y, x: y.sigmoid_(),
    "silu": lambda y, x: F.silu(y),
    "silu_": lambda y, x: F.silu(y, inplace=True),
    "hardswish": lambda y, x: F.hardswish(y),
    "hardswish_": lambda y, x: F.hardswish(y, inplace=True),
    "hardsigmoid": lambda y, x: F.hardsigmoid(y),
    "hardsigmoid_": lambda y, x: F.hardsigmoid(y, inplace=True),
    "add": lambda y, x: y + x,
    "add_": lambda y, x: y.add_(x),
    "mul_": lambda y, x: y.mul_(x),
    "copy_": _written_after_a_reader,
    "cat": lambda y, x: torch.cat([y, x], 2),
    "max_pool": lambda y, x: F.max_pool2d(y, 2),
    "avg_pool": lambda y, x: F.avg_pool2d(y, 3, 2, 1),
    "mean": lambda y, x: y.mean((2, 3)),
    "pooled": lambda y, x: F.adaptive_avg_pool2d(y, 1),
    "flat": lambda y, x: torch.flatten(F.adaptive_avg_pool2d(y, 1), 1),
    "dropout": lambda y, x: F.dropout(y, 0.5, False),
}


def _view_is_read(y: Tensor, x: Tensor) -> Tensor:
    row = y[:, :1]
    y.add_(x)
    return y * row


def _dropout_is_written(y: Tensor, x: Tensor) -> Tensor:
    z = F.dropout(y, 0.5, False)
    z.add_(x)
    return z * y


def _part_is_written(y: Tensor, x: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


def _flat_is_written(y: Tensor, x: Tensor) -> Tensor:
    flat = torch.flatten(y, 2)
    flat.add_(flat.sigmoid())
    return y * x


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view read": _view_is_read,
    "dropout written": _dropout_is_written,
    "part written": _part_is_written,
    "flat written": _flat_is_written,
    "an integer": lambda y, x: y + 1,
    "alpha": lambda y, x: torch.add(y, x, alpha=2),
    "broadcast copy": lambda y, x: y.copy_(x.mean((2, 3), keepdim=True)),
    "bounds of integers": lambda y, x: y.clamp(0, 6),
    "a lower bound": lambda y, x: y.clamp(0.0),
    "pooled to 2": lambda y, x: F.adaptive_avg_pool2d(y, 2),
    "flat of turned": lambda y, x: torch.flatten(y.transpose(1, 2), 2),
    "float64": lambda y, x: (y.double() + x.double()).float(),
    "gelu": lambda y, x: F.gelu(y),
}


def traced(function: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> ExportedProgram:
    torch.manual_seed(0)
    return traced_net(Net(function), dynamic)


def traced_net(net: nn.Module, dynamic: bool) -> ExportedProgram:
    net = net.eval()
    shapes = {"input": {0: Dim("batch")}} if dynamic else None
    with torch.no_grad():
        return torch.export.export(net, (X,), dynamic_shapes=shapes)


def exported(program: ExportedProgram) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        made = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    assert made is not None
    return made.model_proto


def structure(proto: Any) -> list[Any]:
    """The nodes without their own names: what each computes, of which others, and its shape."""
    graph = proto.graph
    known: dict[str, Any] = {value.name: value.name for value in graph.input}
    for tensor in graph.initializer:
        known[tensor.name] = onnx.numpy_helper.to_array(tensor).tobytes()
    shapes = {info.name: str(info.type) for info in (*graph.value_info, *graph.output)}
    nodes = []
    for place, node in enumerate(graph.node):
        attributes = sorted(entry.SerializeToString() for entry in node.attribute)
        read = [known[name] for name in node.input]
        nodes.append((node.op_type, attributes, read, [shapes.get(name) for name in node.output]))
        known |= {name: (place, number) for number, name in enumerate(node.output)}
    return [nodes, [known[value.name] for value in graph.output]]


def spared(program: ExportedProgram) -> list[bool]:
    """Has a program decompose itself; filled in: whether it traces again all the same."""
    again: list[bool] = []
    own = program.run_decompositions

    def watched(*args: Any, **keys: Any) -> ExportedProgram:
        again.append(True)
        return own(*args, **keys)

    vars(program)["run_decompositions"] = watched
    spare_tracing(program)
    return again


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_the_file_is_that_of_torch_onnx(name: str, dynamic: bool) -> None:
    program = traced(PLAIN[name], dynamic)
    again = spared(program)
    have = exported(program)
    assert not again
    assert structure(have) == structure(exported(traced(PLAIN[name], dynamic)))


class Several(nn.Module):
    """Several results, of two convolutions."""

    def __init__(self, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return self.function(self.first(input), self.second(input))


# Pairs of which one takes the name that the other had: `relu_` becomes `relu`, and `relu` `relu_1`.
SEVERAL: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "relu": lambda a, b: (F.relu_(a), F.relu(b)),
    "relu, the other way": lambda a, b: (F.relu(b), F.relu_(a)),
    "add": lambda a, b: (a.add_(b), a + b),
    "mean": lambda a, b: (F.adaptive_avg_pool2d(a, 1), b.mean((2, 3))),
    "clamp": lambda a, b: (F.hardtanh(a, 0.0, 6.0, inplace=True), b.clamp(-0.5, 2.0)),
    "one twice": lambda a, b: (F.relu_(a), F.relu(b), a),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_results(name: str) -> None:
    net = Several(SEVERAL[name])
    program = traced_net(net, True)
    again = spared(program)
    have = exported(program)
    assert not again
    assert structure(have) == structure(exported(traced_net(net, True)))
    with torch.no_grad():
        want = net(X)
    for result, tensor in zip(run(have, X), want, strict=True):
        torch.testing.assert_close(result, tensor)


@pytest.mark.parametrize("name", OTHERS)
def test_other_programs_are_traced_again(name: str) -> None:
    program = traced(OTHERS[name], False)
    again = spared(program)
    have = exported(program)
    assert again == [True]
    assert structure(have) == structure(exported(traced(OTHERS[name], False)))


def test_tensors_of_quantizers_are_no_inputs() -> None:
    model = export_models.captured()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with symbols(named_quantizers(model)):
        program = trace("test", model, images(), True)
        with pytest.raises(ValueError, match=r"torch\.export cannot trace"):
            trace("test", model, torch.ones(2, 3), True)
    assert set(program.state_dict) == {name for name, _ in model.named_parameters()}
    after = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert after == before
