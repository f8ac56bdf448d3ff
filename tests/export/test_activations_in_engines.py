"""Layers before activations that an engine does not compute with them: in integers all the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from engines_pt2e import executorch, xnnpack
from nets.architectures import architecture
from nets.yolo_style import Conv, Split
from onnx_runs import run
from torch_ext import export, get_default_qconfig, prepare_qat, resolve
from torch_ext.export.engines.integer_layers import onnxruntime_layers

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

ACTIVATIONS: dict[str, nn.Module] = {
    "SiLU": nn.SiLU(), "Hardswish": nn.Hardswish(), "Tanh": nn.Tanh(), "Sigmoid": nn.Sigmoid(),
    "GELU": nn.GELU(), "LeakyReLU": nn.LeakyReLU(), "Mish": nn.Mish(), "ELU": nn.ELU(),
    "Hardsigmoid": nn.Hardsigmoid(), "PReLU": nn.PReLU(), "ReLU": nn.ReLU(), "ReLU6": nn.ReLU6(),
    "Hardtanh": nn.Hardtanh(), "Hardtanh from 0": nn.Hardtanh(0.0, 4.0),
}  # fmt: skip


def pictures(count: int = 16, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def calibrated(
    net: nn.Module, backend: Any, x: Tensor, example: bool = True, output: bool = False
) -> nn.Module:
    net = copy.deepcopy(net).eval()
    net.qconfig = get_default_qconfig(backend=backend)  # type: ignore[assignment]
    keys: dict[str, Any] = {"example_inputs": x[:2]} if example else {}
    if output:
        keys["output_qconfig"] = net.qconfig
    model = prepare_qat(net, **keys)
    torch_ext.calibrate(model, [x], progress=False)
    return model


def between(activation: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), copy.deepcopy(activation), nn.Conv2d(8, 8, 3, groups=8),
        copy.deepcopy(activation), nn.Flatten(), nn.Linear(512, 6), copy.deepcopy(activation),
        nn.Linear(6, 5),
    )  # fmt: skip


def same_class(have: Tensor, want: Tensor) -> float:
    """The share of pictures with the same class; where two are next to equal, either may win."""
    top = want.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 0.02 * (want.max() - want.min())
    assert clear.sum() >= len(want) / 2
    return float((have.argmax(1) == want.argmax(1))[clear].double().mean())


@torch.no_grad()
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onnxruntime_computes_each_layer_in_integers(
    activation: str, example: bool, tmp_path: Path
) -> None:
    path, x = tmp_path / "net.onnx", pictures()
    model = calibrated(between(ACTIVATIONS[activation]), "onnxruntime", x, example)
    export.onnx(model, x[:2], path, profile="onnxruntime")
    ops = {layer.name: layer.op for layer in onnxruntime_layers(path)}
    assert ops["0"] == ops["2"] == "QLinearConv"
    assert export.check(path, engines="onnxruntime", seconds=0).all_integer
    assert same_class(run(path, x, optimized=True)[0], model(x)) == 1


class Blocks(nn.Module):
    """Blocks as YOLO's: cross-stage parts, chunks, sums, one activation for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.csp, self.down = Conv(3, 16, 3, 2), Split(16), Conv(16, 16, 3, 2)
        self.last, self.head = Split(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.down(self.csp(self.stem(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def of_architecture(name: str) -> Callable[[], nn.Module]:
    return lambda: architecture(name)[0]


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return Blocks()


NETS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": of_architecture("mobilenet_v3_small"),
    "efficientnet_b0": of_architecture("efficientnet_b0"),
    "blocks": blocks,
}


def fused(name: str, x: Tensor) -> nn.Module:
    """A net with norms of the data, folded."""
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net.train()
    with torch.no_grad():
        net(x)
    return torch_ext.fuse(net.eval(), example_inputs=x[:2])


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_onnxruntime_computes_whole_nets_in_integers(name: str, tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", pictures(16, 64)
    model = calibrated(fused(name, x), "onnxruntime", x)
    export.onnx(model, x[:2], path, profile="onnxruntime")
    found = export.check(path, engines="onnxruntime", seconds=0).engines[0]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert sum(layer.op == "QLinearConv" for layer in found.layers) == convolutions
    assert not found.floating
    assert same_class(run(path, x, optimized=True)[0], model(x)) >= 0.9


def test_the_refusal_names_the_way_out(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", pictures()
    model = calibrated(between(nn.SiLU()), "tensorrt", x)
    resolve(model, backend="onnxruntime")  # changes grids, and adds no quantizer
    with pytest.raises(ValueError, match="2 of 4 in float") as caught:
        export.onnx(model, x[:2], path, profile="onnxruntime")
    text = str(caught.value)
    assert 'get_default_qconfig(backend="onnxruntime") lets prepare_qat, given example_' in text
    assert re.search(r"\n  0: its result is read in float, by (QuickGelu|Sigmoid|Mul) ", text), text
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("activation", ["SiLU", "Hardtanh", "ReLU6"])
def test_xnnpack_computes_each_layer_in_integers(
    activation: str, example: bool, recwarn: pytest.WarningsRecorder
) -> None:
    executorch()
    x = pictures()
    model = calibrated(between(ACTIVATIONS[activation]), "xnnpack", x, example, output=True)
    program = export.pt2e(model, x, backend="xnnpack")
    assert not [w for w in recwarn if issubclass(w.category, torch_ext.QuantizationWarning)]
    call, kernels = xnnpack(program)
    assert not [kernel for kernel in kernels if re.search("conv|linear|addmm|mm", kernel)], kernels
    assert same_class(call(x), model(x)) == 1


@torch.no_grad()
def test_xnnpack_computes_yolos_blocks_in_integers(recwarn: pytest.WarningsRecorder) -> None:
    executorch()
    x = pictures(8, 64)
    model = calibrated(fused("blocks", x), "xnnpack", x, output=True)
    program = export.pt2e(model, x, backend="xnnpack")
    assert not [w for w in recwarn if issubclass(w.category, torch_ext.QuantizationWarning)]
    call, kernels = xnnpack(program)
    assert not [kernel for kernel in kernels if re.search("conv|linear|addmm|mm", kernel)], kernels
    assert same_class(call(x), model(x)) >= 0.9
