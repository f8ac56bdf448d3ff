"""Makes what the C++ program runs: an AOTInductor package of a quantized model, and its outputs.

python examples/cpp/make_package.py FOLDER
    FOLDER/model.pt2     images [N,1,16,16] -> (quantized images, logits [N,4]), any N
    FOLDER/expected.pt   calibration images, input images, the outputs here, the input's qparams
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_ext


class WithInput(nn.Module):
    """A quantized model that also returns what its input quantizer makes of the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.input_quantizers["x"](x), self.model(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        return self.fc(self.conv2(x).relu().mean((2, 3)))


def quantized(images: Tensor) -> nn.Module:
    """Calibrated on the images, in VALIDATION: the state in which a model is exported."""
    model = Net().eval()
    model.qconfig = torch_ext.get_default_qconfig(
        activation_observer="percentile", activation_qkwargs={"percentile": 99.9}
    )
    model = torch_ext.prepare_qat(model, example_inputs=images[:1])
    torch_ext.set_fake_quantize(model, "calibration")
    with torch.no_grad():
        model(images)
    torch_ext.set_fake_quantize(model, "validation")
    return model


def write(folder: Path) -> None:
    torch.manual_seed(0)
    calibration, images = torch.randn(64, 1, 16, 16), torch.randn(10, 1, 16, 16)
    model = quantized(calibration)
    both = WithInput(model)
    with torch.no_grad():
        outputs = both(images)
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.export.export(both, (images,), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    quantizer = model.input_quantizers["x"]
    expected = {
        "calibration": calibration,
        "images": images,
        "quantized": outputs[0],
        "logits": outputs[1],
        "scale": quantizer.scale,
        "zero_point": quantizer.zero_point,
    }
    torch.save(expected, folder / "expected.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the two files go; made if it is missing")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)


if __name__ == "__main__":
    main()
