"""Attention masks in ONNX files, run by onnxruntime and compared with VALIDATION."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import onnx_runs
from nets import masked
from prepare_steps import ready, run_calibration
from torch_ext import export, get_default_qconfig

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = torch.randn(4, masked.TOKENS, masked.DIM, generator=torch.Generator().manual_seed(2))
OTHER = X * torch.tensor([1.0] * 6 + [-1.5] * 2)[:, None]
FULL = torch.ones(4, masked.TOKENS, dtype=torch.bool)
PADDED = torch.arange(masked.TOKENS).expand(4, -1) < 6
# A mask of booleans, integers or floats as an argument of the net; of sizes; of a buffer.
KINDS = [
    "-inf", "Cast", "Sinks", "Windows", "OneMinus", "bool 1 - m", "Outer", "Logarithm", "Filled",
    "Chosen", "Triangle", "Sigmoid", "Sdpa", "SdpaOfASum", "Pooling", "multihead, float", "Encoder",
]  # fmt: skip
CASES = [(kind, False) for kind in KINDS]
CASES += [(kind, True) for kind in ("-inf", "Filled", "Chosen", "OneMinus", "Sdpa")]


@pytest.mark.parametrize(("kind", "dynamic_batch"), CASES)
def test_masks(kind: str, dynamic_batch: bool, tmp_path: Path, one_thread: None) -> None:
    net = masked.NETS[kind]().eval()
    config = get_default_qconfig(
        activation_qkwargs={"dtype": "uint8", "qscheme": "per_tensor_affine"}
    )
    mask, path = net.mask(PADDED), tmp_path / "net.onnx"
    made = ready(net, config, example_inputs=(X, net.mask(FULL)))
    run_calibration(made, X, mask)
    export.onnx(made, (X, mask), path, dynamic_batch=dynamic_batch)
    onnx.checker.check_model(onnx.load(path))
    with torch.no_grad():
        want = made(X, mask)
    for optimized in (False, True):
        (have,) = onnx_runs.run(path, X, mask, optimized=optimized)
        (other,) = onnx_runs.run(path, OTHER, mask, optimized=optimized)
        if want.dim() == 3:
            assert torch.equal(have[:, :6], other[:, :6])
        # A float summed in another order may cross a border of levels.
        assert (have - want).abs().max() <= 0.02 * want.abs().max(), optimized
