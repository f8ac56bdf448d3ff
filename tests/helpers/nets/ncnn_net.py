"""A small net for ncnn, and ncnn running it with the scales of a table that was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import export_models
import torch_ext
from torch_ext import export, get_default_qconfig, prepare_qat

LAYERS = ("conv", "depthwise", "pointwise", "fc")


class Net(nn.Module):
    """For [N,3,12,12]: a convolution, a depthwise one, a 1x1, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1, bias=False)
        self.fc = nn.Linear(24 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = torch.relu(self.depthwise(x))
        x = nn.functional.max_pool2d(self.pointwise(x), 2)
        return self.fc(torch.flatten(x, 1))


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def net(
    activation: object = export_models.NARROW, weight: object = export_models.NARROW
) -> nn.Module:
    """In VALIDATION; the captured forward quantizes what its layers read, and nothing else."""
    torch.manual_seed(0)
    made = Net().eval()
    made.qconfig = get_default_qconfig(activation_qkwargs=activation, weight_qkwargs=weight)
    return export_models.run(prepare_qat(made, example_inputs=images()), images())


PARAM = """7767517
7 7
Input x 0 1 x 0=12 1=12 2=3
Convolution conv 1 1 x a 0=16 1=3 4=1 5=1 6=432 8=2 9=1
ConvolutionDepthWise depthwise 1 1 a b 0=16 1=3 3=2 4=1 5=1 6=144 7=16 8=1 9=1
Convolution pointwise 1 1 b c 0=24 1=1 5=0 6=384 8=2
Pooling pool 1 1 c d 0=0 1=2 2=2
Flatten flat 1 1 d e
InnerProduct fc 1 1 e out 0=5 1=1 2=1080 8=2
"""


def run(model: nn.Module, table: Path, x: Tensor) -> Tensor:
    """ncnn quantizes float weights itself, by the scales that follow them in its .bin file."""
    library = pytest.importorskip("ncnn")
    read = export.read_ncnn_table(table)
    floats = torch_ext.float_state_dict(model)
    data = b""
    for layer in LAYERS:
        data += b"\0\0\0\0" + floats[f"{layer}.weight"].numpy().tobytes()
        if f"{layer}.bias" in floats:
            data += floats[f"{layer}.bias"].numpy().tobytes()
        scales = (*read.weights[f"{layer}_param_0"], *read.activations[layer])
        data += np.array(scales, np.float32).tobytes()
    param, binary = table.with_suffix(".param"), table.with_suffix(".bin")
    param.write_text(PARAM)
    binary.write_bytes(data)
    engine = library.Net()
    engine.opt.num_threads = 1
    engine.opt.use_fp16_packed = False
    engine.opt.use_fp16_storage = False
    engine.opt.use_fp16_arithmetic = False
    # With packed layouts its depthwise kernel divides by a reciprocal of 12 bits.
    engine.opt.use_packing_layout = False
    assert engine.load_param(str(param)) == 0
    assert engine.load_model(str(binary)) == 0
    rows = []
    for image in x:
        with engine.create_extractor() as extractor:
            extractor.input("x", library.Mat(image.contiguous().numpy()))
            code, found = extractor.extract("out")
            assert code == 0
            rows.append(torch.from_numpy(np.array(found).copy()))
    return torch.stack(rows)
