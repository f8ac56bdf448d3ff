"""Nets for corrections, and their layers' outputs as forward hooks see them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from snapshots import same, snapshot

CHANNELS = 8
INT4 = torch_ext.get_default_qconfig(weight_qkwargs={"dtype": "int4"})
BOTH_WAYS = pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def message(call: Callable[[], object], error: type[Exception] = ValueError) -> str:
    """The text of the error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def filled(net: nn.Module, seed: int = 3) -> nn.Module:
    """With weights and norms of ``seed``, of which the channels differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            for name, tensor in module.named_parameters(recurse=False):
                fan = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
                values = torch.randn(tensor.shape, generator=generator) / fan**0.5
                tensor.copy_(values + (name == "weight") * (0.2 if tensor.dim() > 1 else 1))
            if isinstance(module, nn.BatchNorm2d):
                shape = module.running_mean.shape  # type: ignore[union-attr]
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
    return net.eval()


def depthwise(depth: int = 6) -> nn.Module:
    """Depthwise and pointwise convolutions without norms or biases, then a linear layer."""
    steps: list[nn.Module] = [nn.Conv2d(3, CHANNELS, 3, padding=1)]
    for _ in range(depth):
        steps += [
            nn.ReLU6(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
        ]
    steps += [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, 5)]
    return filled(nn.Sequential(*steps))


class Several(nn.Module):
    """Layers of every kind, one called twice, in another order than they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(CHANNELS, 5, bias=False)
        self.up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, stride=2, groups=2, bias=False)
        self.grouped = nn.Conv2d(CHANNELS, CHANNELS, 3, groups=4, padding=1, padding_mode="reflect")
        self.shared = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.row = nn.Conv1d(CHANNELS, CHANNELS, 3, bias=False)
        self.first = nn.Conv2d(3, CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x).relu())
        x = self.norm(self.up(x)).relu()
        x = self.shared(x) + self.grouped(x)
        x = self.row(x.relu().mean(2)).permute(0, 2, 1)
        return self.fc(x).mean(1)


ORDER = ["first", "shared", "up", "grouped", "row", "fc"]


class Normed(nn.Module):
    """Convolutions with norms, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.conv3 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(CHANNELS)
        self.fc = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x))))) + x
        return self.fc(x.mean((2, 3)))


def batches(count: int = 3, size: int = 4, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count * size, 3, 9, 9, generator=generator).split(size))


def calibrated(
    net: nn.Module, data: list[Tensor], qconfig: Any = INT4, captured: bool = True, **keys: Any
) -> nn.Module:
    """A copy in VALIDATION."""
    net.qconfig = qconfig
    example = data[0][:1] if captured else None
    model = torch_ext.prepare_qat(net, example_inputs=example, **keys)
    torch_ext.calibrate(model, data, progress=False)
    return model


@torch.no_grad()
def seen_by_hooks(
    net: nn.Module, data: Iterable[Tensor], kinds: tuple[type[nn.Module], ...], inputs: bool
) -> dict[str, list[Tensor]]:
    """What modules of some kinds read or make, by name, as forward hooks see it."""
    found: dict[str, list[Tensor]] = {}

    def noted(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> None:
            found.setdefault(name, []).append((args[0] if inputs else made).detach().clone())

        return hook

    handles = [
        module.register_forward_hook(noted(name))
        for name, module in net.named_modules()
        if isinstance(module, kinds)
    ]
    for x in data:
        net(x)
    for handle in handles:
        handle.remove()
    return found


def channel_axis(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return -1
    return -2 if isinstance(module, nn.Conv1d) else -3


def channel_means(net: nn.Module, data: Iterable[Tensor]) -> dict[str, Tensor]:
    """The mean of each output channel of the layers, float64."""
    means = {}
    for name, made in seen_by_hooks(net, data, LAYERS, inputs=False).items():
        axis = channel_axis(net.get_submodule(name))
        rows = [y.double().movedim(axis, 0).flatten(1) for y in made]
        means[name] = torch.cat(rows, 1).mean(1)
    return means


def all_at_once(net: nn.Module, model: nn.Module, data: list[Tensor]) -> nn.Module:
    """A copy whose biases are corrected by the errors of the uncorrected model."""
    made = copy.deepcopy(model)
    want, have = channel_means(net, data), channel_means(model, data)
    with torch.no_grad():
        for name, mean in want.items():
            module: Any = made.get_submodule(name)
            shift = (mean - have[name]).float()
            if module.bias is None:
                module.bias = nn.Parameter(shift)
            else:
                module.bias += shift
    return made


@torch.no_grad()
def output_error(net: nn.Module, model: nn.Module, data: list[Tensor]) -> float:
    """The squared error of the outputs, relative to the sum of their squares."""
    want, have = (torch.cat([m(x) for x in data]).double() for m in (net, model))
    return float((have - want).square().sum() / want.square().sum())


class Interrupted(Exception):
    pass


class Stopping:
    """A ``forward`` that is interrupted after so many calls."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls = 0

    def __call__(self, net: nn.Module, batch: Any) -> Any:
        self.calls += 1
        if self.calls > self.limit:
            raise Interrupted
        return net(batch)


def interrupted_at_every_forward(model: nn.Module, run: Callable[[Stopping], Any]) -> Any:
    """Runs until it gets through, a forward more each time; each interruption changes nothing.

    Returns what the last run gives, and the number of interruptions.
    """
    before, limit = snapshot(model), 1
    while True:
        try:
            return run(Stopping(limit)), limit - 1
        except Interrupted:
            limit += 1
            assert same(snapshot(model), before)
