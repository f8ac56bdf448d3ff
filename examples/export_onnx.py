"""Exports a calibrated net as ONNX and compares onnxruntime with VALIDATION on the test images.

Each way to export runs with the engine's graph optimisations off and on: size of the file,
accuracy, how many images get the same class, and the largest difference in steps of the output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from common.data import DataError, load
from common.net import trained
from common.report import print_table
from torch_ext import export, get_default_qconfig, prepare_qat

NARROW = {"quant_min": -127}
SEVEN_BITS = {"quant_min": -63, "quant_max": 63}
AFFINE = {"dtype": "uint8", "qscheme": "per_tensor_affine"}

# What is exported: keys of activations, of weights, and of export.onnx.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "int8": ({}, {}, {}),
    "int8, weights stored as int8": ({}, {}, {"quantized_weights": True}),
    "int8 for TensorRT": (NARROW, NARROW, {"profile": "tensorrt"}),
    "uint8 affine, 7 bit weights": (AFFINE, SEVEN_BITS, {"quantized_weights": True}),
    "int16, weights int8": ({"dtype": "int16"}, {}, {"quantized_weights": True}),
    "int8, weights int4": ({}, {"dtype": "int4"}, {"quantized_weights": True}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--quick", action="store_true", help="a small slice, one way to export")
    arguments = parser.parse_args()
    try:
        data = load(arguments.data)
    except DataError as error:
        print(f"export_onnx: {error}", file=sys.stderr)
        return 2
    print(data.note)
    count = 100 if arguments.quick else len(data.test_labels)
    images, labels = data.test_images[:count], data.test_labels[:count]
    float_model = torch_ext.fuse(trained(data.name)).eval()
    rows = []
    for way, (activation, weight, keys) in list(WAYS.items())[: 1 if arguments.quick else None]:
        float_model.qconfig = get_default_qconfig(
            activation_observer="percentile" if activation.get("dtype") != "int16" else "min_max",
            activation_qkwargs=activation,
            weight_qkwargs=weight,
        )
        model = prepare_qat(
            float_model, output_qconfig=float_model.qconfig, example_inputs=images[:1]
        )
        torch_ext.calibrate(model, data.train_images[:512].split(64), progress=False)
        rows += compared(way, model, keys, images, labels)
    print_table(
        f"onnxruntime against VALIDATION on {count} test images",
        ["export", "optimised", "KiB", "accuracy, %", "same class, %", "largest, steps"],
        rows,
    )
    return 0


def compared(
    way: str, model: nn.Module, keys: dict[str, Any], images: Tensor, labels: Tensor
) -> list[list[str]]:
    """One row for each level of optimisation; the unit is the scale of the output's quantizer."""
    with torch.no_grad():
        want = torch.cat([model(batch) for batch in images.split(500)])
    step = float(torch_ext.named_quantizers(model)["scores.output_quantizers.0"].scale)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export.onnx(model, images[:2], path, **keys)
        for optimised in (False, True):
            have = run(path, images, optimised)
            accuracy = 100 * float((have.argmax(1) == labels).float().mean())
            same = 100 * float((have.argmax(1) == want.argmax(1)).float().mean())
            rows.append(
                [
                    way,
                    "yes" if optimised else "no",
                    f"{path.stat().st_size / 1024:.0f}",
                    f"{accuracy:.2f}",
                    f"{same:.2f}",
                    f"{float((have - want).abs().max()) / step:.2f}",
                ]
            )
    return rows


def run(path: Path, images: Tensor, optimised: bool) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    )
    # Without it int8 beside MaxPool does not load at opset 21.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = [session.run(None, {name: batch.numpy()})[0] for batch in images.split(500)]
    return torch.cat([torch.from_numpy(batch) for batch in batches])


if __name__ == "__main__":
    sys.exit(main())
