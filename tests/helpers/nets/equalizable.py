"""Small nets whose channels have very different ranges, for equalization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def uneven(model: nn.Module, decades: float = 3.0) -> nn.Module:
    """Multiplies each row of each weight, and each entry of each vector, by 10^u; float64."""
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0 or "alpha" in name:
                continue
            factors = 10 ** ((torch.rand(parameter.shape[0], dtype=torch.float64) - 0.5) * decades)
            parameter *= factors.view(-1, *[1] * (parameter.dim() - 1))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3.0)
    return model


class Squeezed(nn.Module):
    """A gate made of the value that it multiplies, as in RegNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.last(x * gate)


class Joined(nn.Module):
    """Two layers whose results are concatenated, one of them halved before."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 5, 3)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        half = self.left(x).chunk(2, dim=1)[1]
        return self.last(torch.cat([self.right(x).relu(), half], 1))


class Shuffled(nn.Module):
    """Channels in groups that are shuffled in between, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(x.clamp(min=0))


class Functional(nn.Module):
    """Parameters of its own, called as functions; the weight of the last as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(6 * 9, 4))
        self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.conv2d(x, self.kernel, padding=1), 0.2)
        return torch.addmm(self.offset, F.adaptive_avg_pool2d(x, 3).flatten(1), self.matrix)


class HandWrittenLeaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x.relu() + 0.1 * x)


def _images(channels: int = 3, size: int = 12) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def _conv(*args: int, **keys: int) -> nn.Conv2d:
    return nn.Conv2d(*args, **keys)  # type: ignore[arg-type]


# Name -> the net, an input, and the layers whose results are scaled.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[str]]] = {
    "convolutions": (
        lambda: nn.Sequential(_conv(3, 8, 3), nn.ReLU(), _conv(8, 5, 3, padding=1)),
        _images,
        ["0"],
    ),
    "depthwise": (
        lambda: nn.Sequential(
            _conv(3, 8, 1), nn.ReLU(True), _conv(8, 8, 3, groups=8), nn.ReLU(), _conv(8, 5, 1)
        ),
        _images,
        ["0", "2"],
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.PReLU(6), _conv(6, 4, 1),
        ),
        _images,
        ["0", "3"],
    ),
    "multiplier": (
        lambda: nn.Sequential(_conv(4, 4, 1), nn.ReLU(), _conv(4, 12, 3, groups=4)),
        lambda: _images(4),
        ["0"],
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
            nn.LeakyReLU(),
            nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, groups=3),
            nn.ReLU(),
            _conv(9, 2, 1),
        ),
        lambda: _images(4),
        ["0", "2"],
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)),
        lambda: torch.randn(4, 3, 7, dtype=torch.float64),
        ["0", "1"],
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 4, 1)),
        lambda: torch.randn(2, 3, 12, dtype=torch.float64),
        ["0"],
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 3, 2, groups=1)),
        lambda: torch.randn(1, 2, 4, 5, 6, dtype=torch.float64),
        ["0"],
    ),
    "pooled": (
        lambda: nn.Sequential(
            _conv(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.ZeroPad2d(1),
            nn.AvgPool2d(2, 1, 1), nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 4),
        ),
        _images,
        ["0"],
    ),
    "squeezed": (Squeezed, _images, ["first", "down"]),
    "joined": (Joined, _images, ["left", "right"]),
    "shuffled": (Shuffled, lambda: _images(4), ["first"]),
    "functional": (Functional, _images, ["kernel"]),
    "hand-written": (HandWrittenLeaky, _images, ["first"]),
}  # fmt: skip
