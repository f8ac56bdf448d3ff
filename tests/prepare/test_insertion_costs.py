"""Where an inserted quantizer's forward costs nothing: layers run outside of the function mode."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

from snapshots import same_bits
from torch_ext import get_default_qconfig, prepare_qat, set_fake_quantize


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class Seen(TorchFunctionMode):
    """Notes the functions that come by a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def prepared(net: nn.Module, state: Any = "validation") -> nn.Module:
    torch.manual_seed(0)
    net.qconfig = get_default_qconfig()
    model = prepare_qat(net.eval(), example_inputs=(images(),))
    set_fake_quantize(model, "calibration")
    model(images())
    set_fake_quantize(model, state)
    return model


def modes_in(module: nn.Module, call: Any) -> int:
    """How many function modes are entered where a module's parameters are read."""
    depths: list[int] = []
    weight = module.get_submodule("parametrizations.weight")
    weight.register_forward_hook(
        lambda *_: depths.append(torch._C._len_torch_function_stack())  # type: ignore[attr-defined]
    )
    call()
    assert depths
    return depths[0]


@pytest.mark.parametrize("state", ["calibration", "qat", "validation"])
def test_layers_run_without_the_mode_and_their_callers_in_it(state: str):
    model = prepared(Residual(), state)
    depths: list[int] = []
    model.conv.register_forward_hook(
        lambda *_: depths.append(torch._C._len_torch_function_stack())  # type: ignore[attr-defined]
    )
    assert modes_in(model.conv, lambda: model(images())) == 0
    assert depths == [1]


def test_a_mode_of_the_users_sees_layers_and_is_left_alone():
    """Outside of the model's, and inside of a forward, where the model's cannot be left."""

    class Inside(Residual):
        def forward(self, x: Tensor) -> Tensor:
            with seen:
                y = self.conv(x)
            return y + x

    seen, around = Seen(), Seen()
    model, plain = prepared(Inside()), prepared(Residual())
    assert modes_in(model.conv, lambda: model(images())) == 2
    assert "conv2d" in seen.names
    with around:
        out = plain(images())
    assert "conv2d" in around.names
    assert "add" in around.names
    assert same_bits(out, model(images()))


def test_a_layer_that_raises_leaves_the_modes_as_they_were():
    model = prepared(Residual())
    want = model(images())
    handle = model.conv.parametrizations.weight.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images())
    assert torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]
    handle.remove()
    assert same_bits(model(images()), want)


def test_a_forward_that_goes_on_after_a_layer_raised_is_still_looked_at():
    class Goes(Residual):
        def forward(self, x: Tensor) -> Tensor:
            try:
                y = self.conv(x)
            except ZeroDivisionError:
                y = x
            return y + x

    model = prepared(Goes())
    model.conv.parametrizations.weight.register_forward_hook(lambda *_: 1 / 0)
    left, right = (
        model.get_submodule(n) for n in ("conv.activation_quantizer", "input_quantizers.x")
    )
    assert same_bits(model(images()), left(images()) + right(images()))
    assert torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]


def test_a_model_may_be_compiled_before_a_thread_has_called_one():
    """The first call of the thread is a compiled one; each state has one graph."""
    model = prepared(Residual(), "float")
    want = {}
    for state in ("float", "calibration", "validation"):
        set_fake_quantize(model, state)
        want[state] = model(images())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for state in (*want, *want):
                set_fake_quantize(model, state)
                assert same_bits(compiled(images()), want[state]), state
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed
    assert counter.frame_count == len(want)
