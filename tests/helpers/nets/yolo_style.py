"""A small detector in the style of ultralytics' YOLO: shared activation, chunks, decoding head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution, norm and an activation that is one module for the whole net."""

    act = nn.SiLU()

    def __init__(self, a: int, b: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(a, b, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(b)
        self.act = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Split(nn.Module):
    """Half of the channels goes through steps, each of which is kept (C2f)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = Conv(c, c), Conv(c + c // 2, c)
        self.step = nn.Sequential(Conv(c // 2, c // 2, 3), Conv(c // 2, c // 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        y.append(y[-1] + self.step(y[-1]))
        return self.last(torch.cat(y, 1))


class Detect(nn.Module):
    """Raw maps while training; in eval mode decoded boxes, with anchors kept for the last size."""

    shape: tuple[int, ...] | None = None
    anchors = torch.empty(0)
    steps = torch.empty(0)

    def __init__(self, widths: tuple[int, ...], classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.boxes = nn.ModuleList(
            nn.Sequential(Conv(c, 8, 3), nn.Conv2d(8, 4 * bins, 1)) for c in widths
        )
        self.scores = nn.ModuleList(
            nn.Sequential(Conv(c, 8, 3), nn.Conv2d(8, classes, 1)) for c in widths
        )
        self.mean = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.mean.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)
        self.register_buffer("stride", torch.tensor([4.0, 8.0]))

    def forward(self, maps: list[Tensor]) -> Any:
        raw = [torch.cat((b(x), s(x)), 1) for x, b, s in zip(maps, self.boxes, self.scores)]  # noqa: B905
        if self.training:
            return raw
        x = torch.cat([r.view(len(r), r.shape[1], -1) for r in raw], 2)
        if self.shape != tuple(raw[0].shape):
            self.shape = tuple(raw[0].shape)
            self.anchors, self.steps = self._make_anchors(raw)
        box, scores = x.split((4 * self.bins, self.classes), 1)
        n, _, count = box.shape
        box = box.view(n, 4, self.bins, count).transpose(2, 1).softmax(1)
        low, high = self.mean(box).view(n, 4, count).chunk(2, 1)
        low, high = self.anchors - low, self.anchors + high
        decoded = torch.cat(((low + high) / 2, high - low), 1) * self.steps
        return torch.cat((decoded, scores.sigmoid()), 1), raw

    def _make_anchors(self, raw: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, steps = [], []
        for x, step in zip(raw, self.stride, strict=True):  # type: ignore[call-overload]
            rows, columns = (torch.arange(n).to(x) + 0.5 for n in x.shape[2:])
            grid = torch.meshgrid(rows, columns, indexing="ij")
            points.append(torch.stack(grid[::-1], -1).view(-1, 2))
            steps.append(torch.full((len(points[-1]), 1), float(step)))
        return torch.cat(points).t(), torch.cat(steps).t()


class YoloStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = (
            nn.Sequential(Conv(3, 8, 3, 2), Conv(8, 16, 3, 2)),
            Conv(16, 16, 3, 2),
        )
        self.near, self.far, self.up = Split(16), Split(16), nn.Upsample(scale_factor=2)
        self.mix, self.head = Conv(32, 16), Detect((16, 16))

    def forward(self, x: Tensor) -> Any:
        near = self.near(self.stem(x))
        far = self.far(self.down(near))
        return self.head([self.mix(torch.cat((self.up(far), near), 1)), far])
