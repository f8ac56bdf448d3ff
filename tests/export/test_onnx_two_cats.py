"""Names in an ONNX file of quantizers that are called several times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import onnx_runs
from prepare_steps import names, ready, run_calibration
from torch_ext import export, named_quantizers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class TwoCats(nn.Module):
    """As every rotary embedding: two `cat`s in one forward, each of two operands."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a(x), self.b(x).relu(), self.c(x)
        y = torch.cat([a, b], 1).sigmoid()
        z = torch.cat([b * 2, c], 1).tanh()
        out: Tensor = self.out(torch.stack([y, z], 1).flatten(1))
        return out


def test_each_call_has_a_name(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    net = ready(TwoCats().eval(), example_inputs=x)
    run_calibration(net, x)
    assert {"cat_quantizer", "cat_quantizer_1"} < names(net)
    export.onnx(net, x, tmp_path / "net.onnx")
    proto = onnx.load(tmp_path / "net.onnx")
    outputs = [name for node in proto.graph.node for name in node.output]
    assert len(set(outputs)) == len(outputs)
    # The input, two operands of each cat and of the stack; weights are apart.
    pairs = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len([node for node in pairs if "weight" not in node.output[0]]) == 1 + 2 * 3
    assert onnx_runs.check_pairs(net, tmp_path / "net.onnx", x) >= len(named_quantizers(net))
