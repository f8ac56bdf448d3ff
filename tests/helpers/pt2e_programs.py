"""Models for export.pt2e, and what stands in the programs that it makes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import torch_ext
from prepare_steps import run_calibration
from torch_ext import QConfig, get_default_qconfig, prepare_qat

# Grids that the engines take, spelled out.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "x86": {"dtype": "uint8", "qscheme": "per_tensor_affine"},
    "xnnpack": {"dtype": "int8", "qscheme": "per_tensor_affine"},
}
WEIGHTS: dict[str, dict[str, Any]] = {"x86": {}, "xnnpack": {"quant_min": -127}}
DTYPES = {"x86": torch.uint8, "xnnpack": torch.int8}


class Residual(nn.Module):
    """Convolutions, a depthwise one too, and a sum; pooling and reshapes between quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.hidden = nn.Linear(128, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(x + self.pointwise(torch.relu(self.depthwise(x))))
        x = torch.flatten(self.pool(x), 1)
        return self.head(torch.relu(self.hidden(x)))


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def config(backend: str, *methods: str) -> QConfig:
    """The grids of `backend`, with methods for activations and weights."""
    activation = dict(ACTIVATIONS[backend])
    if "pact" in methods:  # which learns one clipping level
        activation["qscheme"] = "per_tensor_symmetric"
    return get_default_qconfig(
        *methods, activation_qkwargs=activation, weight_qkwargs=WEIGHTS[backend]
    )


def ready(net: nn.Module, qconfig: QConfig, x: Any, **keys: Any) -> Any:
    """Prepared with an example and its output quantized, calibrated, in VALIDATION."""
    net.eval().qconfig = qconfig  # type: ignore[assignment]
    model = prepare_qat(net, example_inputs=x, **{"output_qconfig": qconfig, **keys})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pact clips what is negative
        run_calibration(model, *(x if isinstance(x, tuple) else (x,)))
    return model


def residual(backend: str, *methods: str) -> Any:
    torch.manual_seed(0)
    return ready(Residual(), config(backend, *methods), images())


def trained(backend: str, method: str) -> Any:
    """The residual net after a few steps of quantization-aware training."""
    torch.manual_seed(0)
    weight = "lsq" if method == "lsq" else "fake_quant"
    model = residual(backend, method, weight)
    torch_ext.set_fake_quantize(model, "qat")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    torch_ext.set_fake_quantize(model, "validation")
    return model


def calls(program: ExportedProgram, name: str) -> list[fx.Node]:
    """Nodes that call ``quantized_decomposed.name`` or ``aten.name``, in order."""
    return [node for node in program.graph.nodes if name_of(node) == name]


def name_of(node: Any) -> str:
    """``conv2d`` of a node that calls it; empty for others."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return "" if schema is None else str(schema.name).partition("::")[2]


def run(program: ExportedProgram, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = program.module()(*inputs)
    return made


def steps_apart(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """By how many steps of a scale two results differ, in float64."""
    return ((left.double() - right.double()) / scale.double()).abs()


def read_by(node: fx.Node) -> Any:
    """What a node reads first, before the copy that Inductor's memory format may need."""
    read = node.args[0]
    return read.args[0] if name_of(read) == "clone" else read
