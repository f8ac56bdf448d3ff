"""Hooks that are registered after prepare_qat, and parts that are called by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prepare_steps import CONFIG
from snapshots import same_bits
from torch_ext import calibrate, prepare_qat, set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x) + x))


MODES = pytest.mark.parametrize("example", [None, X], ids=["plain", "example"])


def ready(example: Tensor | None) -> Any:
    net = Net().eval()
    net.qconfig = CONFIG  # type: ignore[assignment]
    made = prepare_qat(net, example_inputs=example)
    calibrate(made, [X])
    return made


@MODES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("state", ["float", "calibration", "qat", "validation"])
def test_hooks_after_prepare_run(state: Any, compiled: bool, example: Tensor | None) -> None:
    net = ready(example)
    set_fake_quantize(net, state)
    names = ["block", "block.0", "block.1", "block.2", "norm", "head"]
    for name in names:  # what they return takes the place of inputs and results, as torch has it
        module = net.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))
        module.register_forward_hook(lambda _, __, out: out + 1)
    want = net(X)
    torch._dynamo.reset()
    run = torch.compile(net, fullgraph=True, backend="eager") if compiled else net
    have = run(X)
    assert same_bits(have.detach(), want.detach()) or state == "qat"  # whose ranges have moved
    if state in ("float", "calibration"):
        plain = Net().eval()
        for name in names:
            plain.get_submodule(name).register_forward_hook(lambda _, __, out: out + 1)
        assert same_bits(have.detach(), plain(X).detach())


@MODES
def test_a_part_alone_reads_its_input_quantized(example: Tensor | None) -> None:
    net, plain = ready(example), Net().eval()
    seen: dict[str, Tensor] = {}
    functional = torch.nn.functional.linear

    def linear(x: Tensor, *args: Any) -> Tensor:
        seen.setdefault("x", x)
        return functional(x, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        out = net.block(X)
    host = net.block[0] if example is None else net
    quantizer = next(iter(host.input_quantizers.values()))
    assert same_bits(seen["x"].detach(), quantizer(X).detach())
    assert not same_bits(seen["x"].detach(), X)
    assert not same_bits(out.detach(), plain.block(X).detach())
    set_fake_quantize(net, "float")
    assert same_bits(net.block(X).detach(), plain.block(X).detach())
