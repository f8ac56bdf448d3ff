"""torchvision's architectures as ONNX: each pair of nodes bit for bit, the same classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import export_models
import onnx_runs
import torch_ext
from nets.architectures import architecture
from torch_ext import export, get_default_qconfig, named_quantizers, prepare_qat

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_onnxruntime_agrees_with_validation(name: str, tmp_path: Path) -> None:
    model, images = architecture(name, 8)
    model = torch_ext.fuse(model.eval())
    # Of 7 bits: with 8, processors without VNNI saturate in 16 bits.
    model.qconfig = get_default_qconfig(weight_qkwargs={"quant_min": -63, "quant_max": 63})
    model = export_models.run(prepare_qat(model, example_inputs=images), images)
    path = tmp_path / "net.onnx"
    export.onnx(model, images, path, quantized_weights=True, dynamic_batch=False)
    assert onnx_runs.check_pairs(model, path, images) == len(named_quantizers(model))
    with torch.no_grad():
        want = model(images)
    step = float(want.abs().max()) / 127
    for optimized in (False, True):
        (have,) = onnx_runs.run(path, images, optimized=optimized)
        largest = float((have - want).abs().max()) / step
        agree = float((have.argmax(1) == want.argmax(1)).float().mean())
        print(f"{name}, optimised {optimized}: {largest:.2f} steps, {100 * agree:.0f} % agree")
        assert largest < 16  # sums in another order put values at ties on the next level
        assert agree == 1
