"""What onnxruntime makes of exported nets: layers in integers, speed against float, size, time.

    PYTHONPATH=benchmarks .venv/bin/python benchmarks/onnx_export.py [NET ...]

Each net is calibrated once, on the grids of ``backend="onnxruntime"``; ``resolve`` puts it on those
of TensorRT for the second row. Speed is that of one image on one thread: least times of rounds in
which float and INT8 take turns. "CPU s" is what the export took. torchvision's and timm's nets have
random weights, and norms that saw 64 random images; efficientnet_lite1 is trained (the extra
``trained``).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from torch_ext import export, get_default_qconfig, prepare_qat, resolve
from torch_ext.export.engines.integer_layers import onnxruntime_layers
from zoo import operators

ROUNDS = 40
SIZE = 224


def seen(net: nn.Module) -> nn.Module:
    """The net in eval mode, its norms' statistics those of random images."""
    with torch.no_grad():
        for batch in images(64).split(8):
            net.train()(batch)
    return net.eval()


def torchvision_net(name: str) -> nn.Module:
    operators.declare()
    import torchvision.models

    made: nn.Module = getattr(torchvision.models, name)()
    return seen(made)


def timm_net(name: str) -> nn.Module:
    operators.declare()
    import timm

    made: nn.Module = timm.create_model(name)
    return seen(made)


def trained() -> nn.Module:
    from trained_net import trained_net

    return trained_net()


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision_net("resnet18"),
    "mobilenet_v2": lambda: torchvision_net("mobilenet_v2"),
    "timm regnetx_002": lambda: timm_net("regnetx_002"),
    "efficientnet_lite1": trained,
}


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


def session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = made.get_inputs()[0].name
    return lambda x: torch.from_numpy(made.run(None, {name: x.numpy()})[0])


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(NETS)
    print("| net, grids | layers in integers | times as fast | KiB | CPU s | same class |")
    print("|---|---|---|---|---|---|")
    for name in wanted:
        torch.manual_seed(0)
        measure(name, torch_ext.fuse(NETS[name](), example_inputs=images(2)))


def measure(name: str, net: nn.Module) -> None:
    net.qconfig = get_default_qconfig(  # type: ignore[assignment]
        activation_observer="percentile", backend="onnxruntime"
    )
    data = images(32)
    model = prepare_qat(net, example_inputs=data[:1])
    torch_ext.calibrate(model, data.split(8), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export.onnx(model, data[:2], plain, profile="float")
        ways: dict[str, dict[str, Any]] = {
            "uint8 affine": {"profile": "onnxruntime"},
            "int8 symmetric": {},
        }
        for way, keys in ways.items():
            if not keys:
                resolve(model, backend="tensorrt")
            path = Path(folder) / "net.onnx"
            begun = time.process_time()  # other work on the machine does not count
            try:
                export.onnx(model, data[:2], path, quantized_weights=True, **keys)
            except ValueError as error:
                print(f"| {name}, {way} | refused: {str(error).splitlines()[1:3]} |", flush=True)
                continue
            seconds = time.process_time() - begun
            print(row(f"{name}, {way}", model, path, plain, seconds, data), flush=True)


def row(title: str, model: nn.Module, path: Path, plain: Path, seconds: float, data: Tensor) -> str:
    layers = onnxruntime_layers(path)
    integer = sum(layer.integer for layer in layers)
    runs = {"float": session(plain), "int8": session(path)}
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for kind, run in runs.items():
            begun = time.perf_counter()
            run(data[:1])
            least[kind] = min(least[kind], time.perf_counter() - begun)
    with torch.no_grad():
        same = (runs["int8"](data).argmax(1) == model(data).argmax(1)).float().mean()
    ratio, size = least["float"] / least["int8"], path.stat().st_size / 1024
    cells = (title, f"{integer} of {len(layers)}", f"{ratio:.2f}", f"{size:.0f}", f"{seconds:.1f}")
    return f"| {' | '.join(cells)} | {100 * same:.0f} % |"


if __name__ == "__main__":
    main()
