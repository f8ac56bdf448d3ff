"""A prepared model called otherwise than the example: it works, or the line and argument are named,
and following the message works."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grid_checks import off_grid
from prepare_steps import names, ready
from snapshots import same_bits
from torch_ext import calibrate, named_quantizers, set_fake_quantize
from torch_ext.utils.arguments import structure

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = re.escape(__file__)


def rows(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def line_of(comment: str) -> int:
    with open(__file__) as source:
        lines = source.read().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))


class Takes(nn.Module):
    """Takes what models take: optional tensors, mappings, lists, flags."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        named: Mapping[str, Tensor] | None = None,
        many: Any = (),
        flag: bool = False,
        **more: Tensor,
    ) -> Tensor:
        out = self.a(x)
        if y is not None:
            out = out + self.b(y)  # the sum with y
        for value in (named or {}).values():
            out = out + value  # the sum of named
        for value in many:
            out = out * value  # the product of many
        if flag:
            out = out + out.tanh()  # the flag's sum
        for value in more.values():
            out = out + value.sigmoid()  # the sum of more
        return out


def both(**arguments: Any) -> dict[str, Any]:
    return {"x": rows(), **arguments}


# The example, the call, and what the message says: the line by its comment, the argument.
OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "None for a tensor": (
        both(y=rows(1)),
        both(y=None),
        "the sum with y",
        '"y" is None, in the example a tensor of 2 dimensions',
    ),
    "left out": (
        both(y=rows(1)),
        both(),
        "the sum with y",
        '"y" is None, in the example a tensor of 2 dimensions',
    ),
    "a tensor for None": (
        both(),
        both(y=rows(1)),
        "the sum with y",
        '"y" is a tensor of 2 dimensions, in the example None',
    ),
    "a key less": (
        both(named={"a": rows(1), "b": rows(2)}),
        both(named={"a": rows(1)}),
        "the sum of named",
        '"named" is a mapping of 1 (a: a tensor of 2 dimensions), in the example a mapping of 2',
    ),
    "a key more": (
        both(named={"a": rows(1)}),
        both(named={"a": rows(1), "b": rows(2)}),
        "the sum of named",
        '"named" is a mapping of 2',
    ),
    "a longer list": (
        both(many=[rows(1)]),
        both(many=[rows(1), rows(2)]),
        "the product of many",
        '"many" is a list of 2 (a tensor of 2 dimensions, a tensor of 2 dimensions), in the',
    ),
    "a shorter list": (
        both(many=[rows(1), rows(2)]),
        both(many=[rows(1)]),
        "the product of many",
        '"many" is a list of 1',
    ),
    "a flag": (
        both(many=[rows(1)], flag=True),
        both(many=[rows(1)], flag=False),
        "the flag's sum",
        '"flag" is False, in the example True',
    ),
    "other keywords": (
        both(one=rows(1)),
        both(one=rows(1), two=rows(2)),
        "the sum of more",
        '"more" is a mapping of 2',
    ),
}
CASES = pytest.mark.parametrize("case", OTHERWISE)


@CASES
@pytest.mark.parametrize("state", ["calibration", "qat", "validation"])
def test_another_structure_names_line_and_argument(case: str, state: Any) -> None:
    example, other, comment, argument = OTHERWISE[case]
    net = ready(Takes().eval(), example_inputs=example)
    run_calibration_with(net, example)
    set_fake_quantize(net, state)
    net(**example)
    with pytest.raises(RuntimeError, match=rf"{HERE}:{line_of(comment)}\b") as caught:
        net(**other)
    assert f"the argument {argument}" in str(caught.value)
    assert str(caught.value).count("the argument") == 1
    set_fake_quantize(net, "float")
    net(**other)


def run_calibration_with(net: nn.Module, *calls: dict[str, Any]) -> None:
    set_fake_quantize(net, "calibration")
    with torch.no_grad():
        for arguments in calls:
            net(**arguments)
    set_fake_quantize(net, "validation")


@CASES
def test_the_way_out_both_examples(case: str) -> None:
    example, other, _, _ = OTHERWISE[case]
    net = ready(Takes().eval(), example_inputs=[example, other])
    run_calibration_with(net, example, other)
    for arguments in (example, other):
        missed, _ = off_grid(net, **arguments)
        assert missed == []


@CASES
def test_the_way_out_a_float_module(case: str) -> None:
    example, other, _, _ = OTHERWISE[case]
    net = Outer()
    net.inner.qconfig = None  # type: ignore[assignment]
    net = ready(net.eval(), example_inputs=example)  # type: ignore[assignment]
    run_calibration_with(net, example, other)


class Outer(nn.Module):
    """Hands all on to a module that holds the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Takes(), nn.Linear(4, 2)

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        return self.last(self.inner(x, **arguments))


@pytest.mark.parametrize("case", ["None for a tensor", "a longer list", "a tensor for None"])
def test_compiled_the_message_is_the_same(case: str) -> None:
    example, other, comment, argument = OTHERWISE[case]
    net = ready(Takes().eval(), example_inputs=example)
    run_calibration_with(net, example)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    compiled(**example)
    with pytest.raises(Exception, match=rf"{HERE}:{line_of(comment)}\b") as caught:
        compiled(**other)
    assert f"the argument {argument}" in str(caught.value)


SAME: dict[str, tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]] = {
    "by position, by name": (((rows(), rows(1)), {}), ((rows(),), {"y": rows(1)})),
    "by name, by position": (((), both(y=rows(1))), ((rows(), rows(1)), {})),
    "other keys": (
        ((rows(),), {"named": {"a": rows(1), "b": rows(2)}}),
        ((rows(),), {"named": {"c": rows(1), "d": rows(2)}}),
    ),
    "a tuple for a list": (
        ((rows(),), {"many": [rows(1), rows(2)]}),
        ((rows(),), {"many": (rows(1), rows(2))}),
    ),
    "keywords in another order": (
        ((), {"x": rows(), "y": rows(1)}),
        ((), {"y": rows(1), "x": rows()}),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_another_structure_with_the_same_operations_works(case: str) -> None:
    (example_args, example), (args, kwargs) = SAME[case]
    given = example_args if example_args and not example else None
    model = Takes().eval()
    if given is None:
        named = dict(zip(("x", "y"), example_args, strict=False)) | example
        given = named  # type: ignore[assignment]
    nets = [ready(model, example_inputs=given) for _ in range(2)]
    for net, call in zip(nets, ((example_args, example), (args, kwargs)), strict=True):
        set_fake_quantize(net, "calibration")
        net(*call[0], **call[1])
        set_fake_quantize(net, "validation")
    left, right = (named_quantizers(net) for net in nets)
    for name in left:
        assert same_bits(left[name].scale, right[name].scale), name
    assert same_bits(nets[0](*example_args, **example).detach(), nets[0](*args, **kwargs).detach())


def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **keys: Any) -> Tensor:
        return forward(*args, **keys)  # the decorator

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    @decorated
    def forward(self, x: Tensor, rounds: int = 1) -> Tensor:
        for _ in range(rounds):
            x = self.sum(self.layer(x), x)  # the round
        return x

    def sum(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y  # the sum itself


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_line_is_the_operations_not_a_decorators(rounds: int) -> None:
    net = ready(Decorated().eval(), example_inputs={"x": rows(), "rounds": 1})
    run_calibration_with(net, both(rounds=1))
    sum_line, round_line, decorator = map(line_of, ("the sum itself", "the round", "the decorator"))
    text = (
        rf'"layer" to be called 1 times, .* got another call at {HERE}:{round_line};'
        if rounds
        else rf"got none of add at {HERE}:{sum_line} "
        rf"\(called at {HERE}:{round_line}, {HERE}:{decorator}\);"
    )
    with pytest.raises(RuntimeError, match=text) as caught:
        net(rows(), rounds)
    assert '"rounds"' not in str(caught.value)  # a number, which may differ freely


def test_what_only_train_mode_has_is_no_input() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return (self.b(x), self.c(x.relu())) if self.training else self.b(x)

    net = ready(Heads().eval(), example_inputs=rows())
    with pytest.warns(
        UserWarning, match="saw no floating tensor of their own, pass through: relu_q"
    ):
        calibrate(net, [rows()])
    net.train()(rows())
    assert "relu_quantizer" in names(net)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(2, 3), "a tensor of 2 dimensions"),
        (None, "None"),
        (True, "True"),
        ("max", "'max'"),
        (3, "a int"),
        ([1.0, torch.ones(())], "a list of 2 (a float, a tensor of 0 dimensions)"),
        ({"a": (None,)}, "a mapping of 1 (a: a tuple of 1 (None))"),
        (nn.ReLU(), "a ReLU"),
    ],
)
def test_structures(value: object, text: str) -> None:
    assert structure(value) == text


def test_a_part_alone_names_no_argument() -> None:
    net = ready(Outer().eval(), example_inputs=both(y=rows(1)))
    run_calibration_with(net, both(y=rows(1)))
    with pytest.raises(RuntimeError, match="expected") as caught:
        net.get_submodule("inner")(rows())
    assert "the argument" not in str(caught.value)
