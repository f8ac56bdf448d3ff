"""What prepare_qat cannot capture: the line and the way out, and nothing changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from prepare_steps import CONFIG, names, ready
from snapshots import same, same_bits, snapshot
from torch_ext import prepare_qat

HERE = re.escape(__file__)


class Odd(nn.Module):
    """A convolution after something odd, on a line that can be found."""

    def __init__(self, odd: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.odd, self.twin = nn.Conv2d(1, 2, 1), Function(odd), nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(self.odd(x))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Modal(Odd):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.conv(x), self.twin(x)
        return self.conv(x)


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x  # LINE branch


def item(x: Tensor) -> Tensor:
    return x * x.amax().item()  # LINE item


def number(x: Tensor) -> Tensor:
    return x * float(x.mean())  # LINE number


def loop(x: Tensor) -> Tensor:
    while (x.abs() > 1e9).any():  # LINE loop
        x = x / 2
    return x


def array(x: Tensor) -> Tensor:
    return x + torch.from_numpy(x.numpy())  # LINE array


def missing(x: Tensor) -> Tensor:
    return x.no_such_method()  # type: ignore[operator,no-any-return]  # LINE missing


def line_of(function: Callable[..., Any]) -> int:
    with open(__file__) as source:
        lines = source.read().splitlines()
    return next(
        i for i, line in enumerate(lines, 1) if line.endswith(f"# LINE {function.__name__}")
    )


def x() -> Tensor:
    return torch.rand(2, 1, 3, 3)


@pytest.mark.parametrize("odd", [branch, item, number, loop, array, missing])
def test_the_line_and_the_ways_out(odd: Callable[[Tensor], Tensor]) -> None:
    model = Odd(odd)
    model.qconfig = CONFIG  # type: ignore[assignment]
    example = x()
    before, random = snapshot(model), torch.get_rng_state()
    for inplace in (True, False):
        with pytest.raises(ValueError, match="prepare_qat: cannot capture") as caught:
            prepare_qat(model, inplace, example_inputs=example)
        text = str(caught.value)
        assert f"{__file__}:{line_of(odd)}: " in text
        for way in ("without example_inputs", "torch_ext.Add", "QuantStub", "qconfig=None"):
            assert way in text
    assert type(model) is Odd
    assert same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    if odd is missing:
        return
    # Both ways out do work.
    assert names(prepare_qat(model)) > {"conv.activation_quantizer"}
    kept = prepare_qat(model, mapping={"odd": None}, example_inputs=x()) if odd is branch else None
    if kept is not None:
        assert "odd.activation_quantizer" in names(kept)
        given = x()
        assert same_bits(kept(given).detach(), model(given).detach())


def test_other_layers_by_mode() -> None:
    with pytest.raises(ValueError, match=rf"cannot capture {HERE}:\d+: what twin.* in train\(\)"):
        ready(Modal(branch), example_inputs=x())


def test_hooks_on_what_is_taken_apart() -> None:
    model = Odd(lambda x: x)
    model.odd.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='"odd" has hooks'):
        ready(model, example_inputs=x())
    model = Odd(lambda x: x)
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    model.conv.register_forward_hook(lambda *_: seen.append("conv"))
    net = ready(model, example_inputs=x())
    assert seen == []
    net(x())
    assert seen == ["model", "conv"]


def test_example_inputs() -> None:
    model = Odd(lambda x: x)
    for bad, error, text in (
        (3, TypeError, "expected example_inputs to be a tensor, a tuple"),
        ((x(), x()), TypeError, r"the arguments of Odd\.forward, got others: too many"),
        ({"y": x()}, TypeError, r"the arguments of Odd\.forward, got others: missing"),
        ((), TypeError, "got others: missing"),
        (torch.rand(2, 5, 3, 3), ValueError, rf"cannot capture {HERE}:\d+: .*channels"),
        ("text", TypeError, "got 'text'"),
    ):
        with pytest.raises(error, match=text):
            ready(model, example_inputs=bad)


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        if x.shape[2] % 2:
            x = nn.functional.pad(x, (0, 0, 0, 1))
        return self.conv(x) * (2 if twice else 1)


def test_a_call_that_would_go_another_way() -> None:
    plain = Sizes()
    net = ready(plain, example_inputs=torch.rand(1, 1, 6, 5))
    for shape in ((3, 1, 6, 5), (1, 1, 8, 9)):
        given = torch.rand(shape)
        assert same_bits(net(given).detach(), plain(given).detach())
    with pytest.raises(
        ValueError, match=rf"{HERE}:\d+: expected what decides here to be 0, .*got 1"
    ):
        net(torch.rand(1, 1, 7, 5))
    with pytest.raises(ValueError, match=r"to be False, as for the example_inputs .*got True"):
        net(torch.rand(1, 1, 6, 5), twice=True)


class Plus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() + x.sin()


def test_a_forward_of_the_instance() -> None:
    model = Plus()
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="got one that is an attribute of the instance"):
        ready(model, example_inputs=x())


def test_names_that_are_taken() -> None:
    model = Plus()
    model.qconfig = CONFIG  # type: ignore[assignment]
    model.sin_quantizer = nn.Identity()
    before = snapshot(model)
    with pytest.raises(ValueError, match='expected "" to have no attribute sin_quantizer'):
        prepare_qat(model, True, example_inputs=x())
    assert same(snapshot(model), before)
    assert type(model) is Plus


def test_prepared_models_are_refused() -> None:
    net = ready(Plus(), example_inputs=x())
    for again in ({"example_inputs": x()}, {}):
        with pytest.raises(ValueError, match='prepared already \\("exp_quantizer"\\)'):
            prepare_qat(net, **again)
    with pytest.raises(ValueError, match="prepared already"):
        torch_ext.fuse(net)


def test_importing_needs_nothing_more() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(Sizes(), example_inputs=torch.rand(1, 1, 6, 5))
