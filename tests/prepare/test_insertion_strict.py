"""What prepare_qat and a prepared forward refuse: the line, a way out that works, no change."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from grid_checks import off_grid
from prepare_steps import CONFIG, names, ready, run_calibration
from snapshots import same, same_bits, snapshot
from torch_ext import prepare_qat, set_fake_quantize

HERE = re.escape(__file__)

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(count: int = 3) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count))


def line_of(comment: str) -> int:
    with open(__file__) as source:
        lines = source.read().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))


class Ways(nn.Module):
    """A forward that goes the way that its attributes and arguments say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.rounds, self.gated = 2, False

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        for _ in range(self.rounds):
            fresh = self.first(x)  # the call of a round
            x = fresh.tanh() + x  # the sum of a round
        if self.gated:
            x = x.tanh() * x.sigmoid()  # the gate
        if extra is not None:
            x = x + self.second(extra)  # the sum of two
        return self.last(x)


def ways(rounds: int = 2, gated: bool = False) -> Ways:
    model = Ways().eval()
    model.rounds, model.gated = rounds, gated
    return model


def solved(model: nn.Module, example: Any) -> nn.Module:
    net = ready(model, example_inputs=example)
    run_calibration(net, tokens())
    return net


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"rounds": 3},
            r'"first" to be called 2 times, .*got another call at {file}:{the call of a round}',
        ),
        ({"rounds": 1}, r"got none of add at {file}:{the sum of a round}"),
        ({"gated": False}, r"got none of mul at {file}:{the gate}"),
    ],
    ids=["longer loop", "shorter loop", "another branch"],
)
def test_another_way_than_the_example_went(change: dict[str, Any], text: str) -> None:
    net = solved(ways(gated=True), tokens())
    for name, value in change.items():
        setattr(net, name, value)
    text = text.replace("{file}", HERE)
    text = re.sub("{(.*)}", lambda found: str(line_of(found.group(1))), text)
    for state in ("calibration", "qat", "validation"):
        set_fake_quantize(net, state)
        with pytest.raises(RuntimeError, match=text) as caught:
            net(tokens())
        assert "example_inputs=[(first,), (second,)]" in str(caught.value)
    set_fake_quantize(net, "float")  # which asks for nothing
    net(tokens())


def test_a_line_that_the_example_did_not_come_by() -> None:
    x, extra = tokens(), tokens(4)[:3]
    net = prepare_qat(ways(), mapping={"": CONFIG, "second": None}, example_inputs=x)
    run_calibration(net, x)
    with pytest.raises(RuntimeError, match=rf"got add at {HERE}:{line_of('the sum of two')}"):
        net(x, extra)


def test_the_way_out_several_examples() -> None:
    x, extra = tokens(), tokens(4)[:3]
    net = solved(ways(), x)
    with pytest.raises(RuntimeError, match='"second" to be called where the example_inputs had'):
        net(x, extra)
    net = ready(Ways().eval(), example_inputs=[(x,), {"x": x, "extra": extra}])
    set_fake_quantize(net, "calibration")
    for given in ((x,), (x, extra)):
        net(*given)
    set_fake_quantize(net, "validation")
    for given, calls in (((x,), 3), ((x, extra), 4)):
        assert off_grid(net, *given) == ([], {"linear": calls})
    assert {"input_quantizers.extra", "second.activation_quantizer"} < names(net)


class Twisted(nn.Module):
    """Calls one layer first for something else, but only if there is a second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = x.tanh()
        if extra is not None:
            x = x + self.layer(extra).mean()
        return self.layer(x)


def test_examples_that_contradict_each_other() -> None:
    x = tokens()
    with pytest.raises(ValueError, match='expected every example to read the same at "layer"'):
        ready(Twisted(), example_inputs=[(x,), (x, x)])
    kept = prepare_qat(
        Twisted(), mapping={"": CONFIG, "layer": None}, example_inputs=[(x,), (x, x)]
    )
    assert same_bits(kept(x).detach(), kept(x).detach())


def test_the_way_out_a_float_module() -> None:
    net = prepare_qat(Ways(), mapping={"": CONFIG, "second": None}, example_inputs=tokens())
    run_calibration(net, tokens())
    assert torch.isfinite(net.get_submodule("second")(tokens())).all()


def missing(x: Tensor) -> Tensor:
    return x.no_such_method()  # type: ignore[operator,no-any-return]  # the missing method


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return missing(self.fc(x))


def test_an_example_that_does_not_run() -> None:
    model = Breaks()
    model.qconfig = CONFIG  # type: ignore[assignment]
    before, random = snapshot(model), torch.get_rng_state()
    for inplace in (True, False):
        with pytest.raises(
            ValueError, match=rf"got at {HERE}:{line_of('the missing method')} Attr"
        ):
            prepare_qat(model, inplace, example_inputs=tokens())
    assert type(model) is Breaks
    assert same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_example_inputs() -> None:
    for bad, error, text in (
        (3, TypeError, "expected example_inputs to be a tensor, a tuple"),
        ((tokens(),) * 3, TypeError, r"the arguments of Ways\.forward, got others: too many"),
        ({"y": tokens()}, TypeError, r"the arguments of Ways\.forward, got others: missing"),
        ((), TypeError, "got others: missing"),
        (torch.rand(2, 5), ValueError, rf"got at {HERE}:\d+ RuntimeError: .*shapes"),
        ("text", TypeError, "got 'text'"),
    ):
        with pytest.raises(error, match=text):
            ready(Ways(), example_inputs=bad)


class WantsTargets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(x)
        if self.training:
            assert targets is not None, "targets, please"
            return (y - targets).square().mean()
        return y


def test_a_train_mode_that_wants_more() -> None:
    with pytest.warns(UserWarning, match=rf"does not run in train mode \(at {HERE}:\d+ Assertion"):
        net = ready(WantsTargets(), example_inputs=tokens())
    run_calibration(net.eval(), tokens())
    assert off_grid(net, tokens())[0] == []
    assert torch.isfinite(net.train()(tokens(), tokens()))


class Plus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() + x.sin()


def test_a_forward_of_the_instance() -> None:
    model = Plus()
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="got one that is an attribute of the instance"):
        ready(model, example_inputs=tokens())


def test_names_that_are_taken() -> None:
    model = Plus()
    model.qconfig = CONFIG  # type: ignore[assignment]
    model.sin_quantizer = nn.Identity()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\(the model itself\) to have no attribute sin_q"):
        prepare_qat(model, True, example_inputs=tokens())
    assert same(snapshot(model), before)
    assert type(model) is Plus


def test_prepared_models_are_refused() -> None:
    net = ready(Plus(), example_inputs=tokens())
    for again in ({"example_inputs": tokens()}, {}):
        with pytest.raises(ValueError, match='prepared already \\("exp_quantizer"\\)'):
            prepare_qat(net, **again)
    with pytest.raises(ValueError, match="prepared already"):
        torch_ext.fuse(net)


def test_preparing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(Ways(), example_inputs=tokens())
