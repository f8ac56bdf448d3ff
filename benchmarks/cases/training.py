"""A step of quantization-aware training, compiled: against eager and against the float net."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from case import Case, Job, Peer, expect
from torch_ext import get_default_qconfig, prepare_qat, set_fake_quantize

BATCH, CHANNELS, SIDE = 16, 32, 28


def net() -> nn.Sequential:
    """Depthwise, pointwise and linear layers, as in mobile nets."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1),
        nn.ReLU(),
        depthwise,
        nn.ReLU(),
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * CHANNELS, 10),
    )


@torch.enable_grad()
def step(call: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward; gradients are given up, not added."""
    for parameter in call.parameters():
        parameter.grad = None
    out: Tensor = call(x)
    out.square().mean().backward()
    return out.detach()


def qat_step(method: str, _: int) -> Job:
    x = torch.randn(BATCH, 3, SIDE, SIDE)
    model = net()
    model.qconfig = get_default_qconfig(method, method if method != "pact" else "lsq")
    quantized = prepare_qat(model)
    set_fake_quantize(quantized, "qat")
    step(quantized, x)  # the first batch sets the ranges
    set_fake_quantize(quantized, "validation")
    set_fake_quantize(quantized, "qat")
    eager = copy.deepcopy(quantized)
    compiled = torch.compile(quantized, fullgraph=True)
    floating = torch.compile(net(), fullgraph=True)
    ours = functools.partial(step, compiled, x)

    def check() -> None:
        # Convolutions may round differently: a value may fall on the next code.
        expect((ours() - step(copy.deepcopy(eager), x)).abs().max().item() < 0.05, "outputs")

    peers = (
        Peer("the same, eager", functools.partial(step, eager, x)),
        Peer("the float net, compiled", functools.partial(step, floating, x)),
    )
    return Job(ours, peers, check=check)


CASES = tuple(
    Case(f"training/{method} step compiled", functools.partial(qat_step, method), sized=False)
    for method in ("fake_quant", "lsq", "pact")
)
