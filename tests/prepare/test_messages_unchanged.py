"""A prepare_qat, or fuse, that is refused or interrupted leaves the model as it was, in place too;
and one that succeeds leaves the given model, and what its code keeps elsewhere."""

from __future__ import annotations

import collections
import copy
import functools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fingerprints import fingerprint
from prepare_steps import CONFIG, names
from snapshots import same_bits
from torch_ext import FakeQuantize, QConfig, fuse, prepare_qat
from torch_ext.prepare import attach

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = re.escape(__file__)
_TABLE: dict[int, Tensor] = {}
_NESTED: dict[str, list[Tensor]] = {"kept": []}
_COUNT = 0


class Busy(nn.Module):
    """Changes all that a forward can: buffers, attributes, tables, globals, random numbers."""

    by_size: ClassVar[dict[int, Tensor]] = {}
    calls: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)
        self.weighted = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))
        self.log: list[Any] = []
        self.table: dict[int, Tensor] = {}
        self.register_forward_pre_hook(lambda module, args: module.log.append("hook"))
        self.stop: BaseException | None = None
        self.stop_training: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        global _COUNT
        _COUNT += 1
        type(self).calls += 1
        self.steps += 1
        self.last = x.detach().mean((0, 2)).repeat(2)
        self.log.append(x.shape)
        size = x.shape[-1]
        for table in (self.table, self.by_size, _TABLE):
            if size not in table:
                table[size] = self.weighted * size
        _NESTED["kept"].append(x)
        x = x + torch.rand(()) + random.random() + np.random.rand()
        x = self.norm(self.conv(x)).relu()
        for stop in (self.stop, self.stop_training if self.training else None):
            if stop is not None:
                raise stop  # where it stops
        out = (x * self.by_size[size].view(1, -1, 1)).mean(-1)
        return self.fc(out + _TABLE[size])


def line_of(comment: str) -> int:
    with open(__file__) as source:
        lines = source.read().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))


def globals_now() -> Any:
    tables = [{k: id(v) for k, v in table.items()} for table in (_TABLE, Busy.by_size)]
    return _COUNT, Busy.calls, tables, [id(t) for t in _NESTED["kept"]]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    _TABLE.clear()
    Busy.by_size.clear()
    _NESTED["kept"].clear()


X = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))


def busy() -> Busy:
    """Trained a step: with gradients, statistics and a table."""
    torch.manual_seed(0)
    net = Busy()
    net(X).sum().backward()
    net.log.clear()
    net.conv.eval()
    net.qconfig = CONFIG  # type: ignore[assignment]
    return net


def remembering_nothing(net: Busy) -> Busy:
    """Without what the first forward computed, which cannot be copied, nor used backwards twice."""
    for table in (net.table, Busy.by_size, _TABLE):
        table.clear()
    return net


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which would stop the tests if it were lost."""


def counted(error: BaseException, calls: int) -> Callable[..., Any]:
    """A factory whose n-th call raises."""
    made = 0

    def factory(**keys: Any) -> FakeQuantize:
        nonlocal made
        made += 1
        if made == calls:
            raise error
        return FakeQuantize(**keys)

    return factory


def config_that(error: BaseException, calls: int = 2) -> QConfig:
    return QConfig(counted(error, calls), functools.partial(FakeQuantize, averaging_constant=1.0))


def set_buffer_weight(net: Busy) -> None:
    weight = net.fc.weight.detach()
    del net.fc.weight
    net.fc.register_buffer("weight", weight)


def set_stop(error: BaseException) -> Callable[[Busy], None]:
    return lambda net: setattr(net, "stop", error)


def set_config(error: BaseException, calls: int = 2) -> Callable[[Busy], None]:
    return lambda net: setattr(net, "qconfig", config_that(error, calls))


def set_taken(net: Busy) -> None:
    net.fc.weight_quantizer = net.fc.input_quantizers = "taken"  # type: ignore[assignment]
    net.add_quantizer_3 = net.conv.input_quantizers = "taken"  # type: ignore[assignment]


# What is done to the model, the error, its text.
REFUSALS: dict[str, tuple[Callable[[Busy], None], type[BaseException], str]] = {
    "the example raises": (
        set_stop(IndexError("out")),
        ValueError,
        f"{HERE}:{line_of('where it stops')} IndexError: out",
    ),
    "the example is interrupted": (set_stop(Interrupted()), Interrupted, ""),
    "a factory raises": (set_config(ValueError("no")), ValueError, "no"),
    "a factory raises what is not expected": (set_config(KeyError("no")), KeyError, "no"),
    "a factory is interrupted": (set_config(Interrupted()), Interrupted, ""),
    "a weight is a buffer": (set_buffer_weight, ValueError, "fc.weight to be a parameter"),
    "names are taken": (set_taken, ValueError, "to have no attribute"),
    "no qconfig": (lambda net: delattr(net, "qconfig"), ValueError, "expected a qconfig"),
    "nothing to quantize": (
        lambda net: setattr(net, "qconfig", QConfig(None, None)),
        ValueError,
        "found none",
    ),
}
EXAMPLES = pytest.mark.parametrize("example", [None, X], ids=["plain", "example"])
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])


@EXAMPLES
@INPLACE
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_changes_nothing(case: str, inplace: bool, example: Tensor | None) -> None:
    change, error, text = REFUSALS[case]
    if "example" in case and example is None:
        return  # the model does not run
    net = busy()
    change(net)
    before, elsewhere = fingerprint(net), globals_now()
    if case == "a weight is a buffer" and example is not None:
        change = lambda net: None  # noqa: E731  # works: read where the forward reads it
        net.fc.register_buffer("weight", torch.ones(3, 4, dtype=torch.int64))
        before = fingerprint(net)
        error, text = ValueError, ""
    with pytest.raises(error, match=text):
        prepare_qat(net, inplace=inplace, example_inputs=example)
    assert fingerprint(net) == before
    assert globals_now() == elsewhere


STEPS = (
    (attach, "attach_weight"),
    (attach, "attach_child"),
    (parametrize, "register_parametrization"),
)


@EXAMPLES
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(("home", "function"), STEPS, ids=[name for _, name in STEPS])
def test_an_interruption_while_attaching_changes_nothing(
    home: Any,
    function: str,
    calls: int,
    example: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(home, function)
    made = 0

    def interrupted(*args: Any, **keys: Any) -> Any:
        nonlocal made
        made += 1
        if made == calls:
            raise Interrupted
        return original(*args, **keys)

    net = busy()
    before, elsewhere = fingerprint(net), globals_now()
    with monkeypatch.context() as patch:
        patch.setattr(home, function, interrupted)
        if example is None and function == "attach_child":
            return  # not called
        with pytest.raises(Interrupted):
            prepare_qat(net, inplace=True, example_inputs=example)
    assert fingerprint(net) == before
    assert globals_now() == elsewhere
    assert names(prepare_qat(net, inplace=True, example_inputs=example))


@EXAMPLES
def test_success_leaves_the_given_model_and_what_is_elsewhere(example: Tensor | None) -> None:
    net = busy()
    net_of_train = copy.deepcopy(remembering_nothing(net))
    before, elsewhere = fingerprint(net), globals_now()
    made = prepare_qat(net, example_inputs=example)
    assert fingerprint(net) == before
    assert globals_now() == elsewhere
    # In place all but what is attached is as it was.
    assert prepare_qat(net, inplace=True, example_inputs=example) is net
    assert (net.log, int(net.steps), list(net.table)) == ([], 1, [])
    assert globals_now() == elsewhere
    # Tables that the example would have filled, without gradients, are computed in training.
    fresh = torch.randn(2, 2, 10)
    prepare_qat(net_of_train, example_inputs=fresh)
    assert 10 not in Busy.by_size
    made.train()(fresh).sum().backward()
    assert made.get_parameter("weighted").grad is not None


def test_a_train_mode_that_raises_warns_and_changes_nothing() -> None:
    net = busy()
    net.stop_training = IndexError("no targets")
    before, elsewhere = fingerprint(net), globals_now()
    with pytest.warns(UserWarning, match=rf"{HERE}:{line_of('where it stops')} IndexError"):
        prepare_qat(net, example_inputs=X)
    assert fingerprint(net) == before
    assert globals_now() == elsewhere


@INPLACE
@pytest.mark.parametrize("example", [None, X], ids=["plain", "example"])
def test_fuse_leaves_what_is_elsewhere(inplace: bool, example: Tensor | None) -> None:
    net = busy()
    net.stop = Interrupted()
    elsewhere, before = globals_now(), fingerprint(net)
    with pytest.raises(Interrupted):
        fuse(net, example_inputs=X, inplace=inplace)
    assert fingerprint(net) == before
    assert globals_now() == elsewhere
    net.stop = None
    before = fingerprint(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norms that are left
        fuse(net, example_inputs=example, inplace=inplace)
    assert globals_now() == elsewhere
    assert net.log == []
    if not inplace:
        assert fingerprint(net) == before


def test_the_order_of_random_numbers_does_not_change() -> None:
    def drawn(*, prepare: bool) -> list[Any]:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        if prepare:
            prepare_qat(busy_quiet, example_inputs=X)
        return [torch.rand(2), random.random(), np.random.rand()]

    busy_quiet = busy()
    want, have = drawn(prepare=False), drawn(prepare=True)
    assert same_bits(want[0], have[0])
    assert want[1:] == have[1:]


_CALLS: collections.Counter[str] = collections.Counter({"before": 2})


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        _CALLS["forward"] += 1
        return self.fc(x)  # type: ignore[no-any-return]


def test_a_global_counter_counts_what_it_counted() -> None:
    model = Counts()
    model.qconfig = CONFIG  # type: ignore[assignment]
    prepare_qat(model, example_inputs=torch.randn(2, 4))
    assert _CALLS == {"before": 2}
