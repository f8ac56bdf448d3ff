"""A small net whose numbers no order of summation can change.

Weights and inputs are small multiples of a power of two, scales are powers of two: every product
and every partial sum is exact in float32, so that a matrix product has one result on all devices
and whole training steps can be compared bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from torch_ext import FakeQuantState, QConfig, get_default_qconfig, prepare_qat

FEATURES = 16
LEARNING_RATE = 2.0**-10
RULES = torch_ext.observers()


class ExactNet(nn.Module):
    """Linear layers, a residual addition, a product and an embedding-like table of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 32)
        self.relu = nn.ReLU()
        self.second = nn.Linear(32, 32, bias=False)
        self.add = torch_ext.Add()
        self.mul = torch_ext.Mul()
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.first(x))
        y = self.add(self.second(y), y)
        return self.last(self.mul(y, torch.sign(y)))  # type: ignore[no-any-return]


def _integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=made).float()


def batch(seed: int, count: int = 24) -> Tensor:
    return _integers(seed, -8, 8, count, FEATURES) / 4


def upstream(seed: int, count: int = 24) -> Tensor:
    return _integers(1000 + seed, -2, 2, count, 8)


def exact_net() -> ExactNet:
    net = ExactNet()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(_integers(2000 + i, -4, 4, *parameter.shape) / 8)
    return net


def qconfig(rule: str) -> QConfig:
    keys: dict[str, Any] = {"power_of_two": True}
    if rule == "fixed_scale":
        keys = {"scale": 2.0**-5}
    return get_default_qconfig(
        activation_observer=rule,
        weight_observer=rule,
        activation_qkwargs={**keys, "averaging_constant": 0.25},
        weight_qkwargs=keys,
    )


def prepared(rule: str, device: torch.device | str) -> nn.Module:
    net = exact_net().to(device)
    net.qconfig = qconfig(rule)  # type: ignore[assignment]
    return prepare_qat(net)


def ready_for(state: FakeQuantState, rule: str, device: torch.device | str) -> nn.Module:
    """In the state, calibrated where it needs a range."""
    model = prepared(rule, device)
    if state in (FakeQuantState.VALIDATION, FakeQuantState.QAT):
        torch_ext.set_fake_quantize(model, "calibration")
        with torch.no_grad():
            for seed in range(3):
                model(batch(seed).to(device))
    torch_ext.set_fake_quantize(model, state)
    return model


def step(model: nn.Module, x: Tensor, given: Tensor, train: bool) -> list[Tensor]:
    """Output and gradients; with `train` the parameters move. Nothing here waits for a device."""
    parameters = list(model.parameters())
    out = model(x)
    grads = torch.autograd.grad((out * given).sum(), parameters)
    if train:
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(grad, alpha=LEARNING_RATE)
    return [out.detach(), *grads]
