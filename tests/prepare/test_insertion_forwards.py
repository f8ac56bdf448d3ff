"""Forwards that keep running as they are: state, contexts, classes, hooks, odd code, both modes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grid_checks import off_grid
from prepare_steps import CONFIG, names, ready, run_calibration
from snapshots import same_bits
from torch_ext import get_default_qconfig, named_quantizers, prepare_qat, set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")

STATES = ("float", "calibration", "qat", "validation")


def tokens(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two layers, and what a function of the model and the first one's result says in between."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.function = function
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6))
        self.calls, self.kept, self.cache = 0, None, {}

    def forward(self, x: Tensor) -> Any:
        return self.last(self.function(self, self.first(x)))


def writes_buffers(m: Any, x: Tensor) -> Tensor:
    m.steps += 1
    m.mean = 0.9 * m.mean + 0.1 * x.detach().mean(0)
    return x - m.mean


def keeps_tensors(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    m.kept = x.square().mean()
    return x * m.calls


def fills_a_cache(m: Any, x: Tensor) -> Tensor:
    if len(x) not in m.cache:
        m.cache[len(x)] = torch.arange(len(x), dtype=x.dtype)[:, None]
    return x + m.cache[len(x)]


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.tanh()


@torch.no_grad()
def decorated(m: Any, x: Tensor) -> Tensor:
    return x.tanh() * x.sigmoid()


def autocast_off(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x.float() * x.float().sigmoid()


def branches_on_values(m: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 1e9 else x * x.sigmoid()


def asks_for_numbers(m: Any, x: Tensor) -> Tensor:
    return x * x.amax().item() + float(x.mean())


def loops_on_values(m: Any, x: Tensor) -> Tensor:
    while bool((x.abs() > 1).any()):
        x = x / 2
    return x


def checks(m: Any, x: Tensor) -> Tensor:
    torch._check(x.shape[1] == 6)
    return x + torch.from_numpy(x.detach().numpy().copy())


def transposes(m: Any, x: Tensor) -> Tensor:
    return (x @ m.last.weight.T) @ m.first.weight.mT


def writes_a_view(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    view = y[:, :2]
    y += x
    return y + view.sum()


def powers(m: Any, x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.79 * (x + 0.04 * torch.pow(x, 3.0)))) + 2 ** (1 - x)


def maps(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row * row.sigmoid())(x)


@torch.jit.script
def scripted(x: Tensor, times: int) -> Tensor:
    return x * times


IDIOMS = (
    writes_buffers,
    keeps_tensors,
    fills_a_cache,
    without_gradients,
    decorated,
    autocast_off,
    branches_on_values,
    asks_for_numbers,
    loops_on_values,
    checks,
    transposes,
    writes_a_view,
    powers,
    maps,
    lambda m, x: scripted(x, 2),
    lambda m, x: torch.where(x > 0, x, 0.0),
    lambda m, x: x + torch.zeros(x.size(), device=x.device),
    lambda m, x: x[torch.randperm(len(x))],
    lambda m, x: sum(x[:, i : i + 1] for i in range(x.shape[1])) + x,
)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("function", IDIOMS, ids=lambda function: function.__name__)
def test_float_is_the_original(function: Callable[[Any, Tensor], Tensor], training: bool) -> None:
    """Outputs, gradients, buffers, attributes and random numbers, also of another batch size."""
    plain = Net(function)
    net = ready(copy.deepcopy(plain), example_inputs=tokens())
    assert "steps" not in names(net)
    for count in (4, 7):
        outs = []
        for model in (plain.train(training), net.train(training)):
            model.zero_grad()
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16, enabled=function is autocast_off):
                out = model(tokens(count))
            out.float().square().sum().backward()
            outs.append((out.detach(), torch.rand(1)))
        assert outs[0][0].dtype == outs[1][0].dtype
        assert same_bits(outs[0][0].float(), outs[1][0].float())
        assert torch.equal(outs[0][1], outs[1][1])
        for name, buffer in plain.named_buffers():
            assert torch.equal(buffer, net.get_buffer(name)), name
        for layer in ("first", "last"):
            mine, theirs = (getattr(model, layer).bias.grad for model in (net, plain))
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    assert net.calls == plain.calls
    assert type(net.kept) is type(plain.kept)
    assert type(net.cache.get(7)) is type(plain.cache.get(7))


@pytest.mark.parametrize("function", IDIOMS, ids=lambda function: function.__name__)
def test_layers_are_on_a_grid(function: Callable[[Any, Tensor], Tensor]) -> None:
    net = ready(Net(function).eval(), example_inputs=tokens())
    run_calibration(net, tokens())
    found, seen = off_grid(net, tokens())
    if function is transposes:  # the weights of products are factors like others
        found = [where for where in found if "linear" in where]
    assert not found
    assert seen["linear"] == 2


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclasses.dataclass
class Boxed(collections.OrderedDict[str, Tensor]):
    """As transformers' ModelOutput."""

    logits: Tensor

    def __post_init__(self) -> None:
        self["logits"] = self.logits


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "namedtuple": lambda y: Named(y, y),
    "dataclass": lambda y: Boxed(y),
    "OrderedDict": lambda y: collections.OrderedDict(a=y),
    "dict": lambda y: {"a": y},
    "list": lambda y: [y],
    "tuple": lambda y: (y, None, 3),
}


class Outputs(nn.Module):
    def __init__(self, box: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.box = nn.Linear(6, 6), box

    def forward(self, x: Tensor) -> Any:
        return self.box(self.fc(x))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_classes_of_outputs(kind: str) -> None:
    plain = Outputs(OUTPUTS[kind])
    net = ready(plain, example_inputs=tokens())
    for state in STATES:
        set_fake_quantize(net, state)
        assert type(net(tokens())) is type(plain(tokens()))
    if kind == "dataclass":
        assert net(tokens()).logits.shape == (4, 6)


def fills_in_a_default(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("use_cache", False)
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    @fills_in_a_default
    def forward(self, x: Tensor, mask: Tensor | None = None, use_cache: bool | None = None) -> Any:
        return self.fc(x) * 2 if use_cache else self.fc(x) + x


def test_decorated_forwards() -> None:
    net = ready(Decorated(), example_inputs=tokens())
    run_calibration(net, tokens())
    assert {"input_quantizers.x", "fc.activation_quantizer"} < names(net)


class Heads(nn.Module):
    """A second head while training, and another end in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x).tanh()
        if self.training:
            return self.head(y) + x, self.second(y)
        return (self.head(y) + x).softmax(1)


@pytest.mark.parametrize("mapping", [{}, {"second": None}], ids=["quantized", "float"])
def test_other_layers_in_train_and_eval(mapping: dict[Any, Any]) -> None:
    plain = Heads()
    net = prepare_qat(copy.deepcopy(plain), mapping={"": CONFIG} | mapping, example_inputs=tokens())
    for training in (False, True):
        wants, haves = (model.train(training)(tokens()) for model in (plain, net))
        for want, have in zip(wants, haves, strict=True):
            assert same_bits(want.detach(), have.detach())
    run_calibration(net.eval(), tokens())  # which does not come by the second head
    assert off_grid(net, tokens()) == ([], {"linear": 2})
    # A value that both modes have is quantized by one quantizer.
    assert sum("tanh" in name for name in names(net)) == 1
    set_fake_quantize(net.train(), "qat")
    sum(out.square().sum() for out in net(tokens())).backward()
    assert all(p.grad is not None for p in net.parameters())
    set_fake_quantize(net, "validation")
    found, seen = off_grid(net, tokens())
    assert seen == {"linear": 4}
    assert len(found) == (4 if mapping else 0)  # input and weight of two float layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x))) + x
        return out


class Stack(nn.Module):
    """Blocks that are checkpointed as told: None, or ``use_reentrant``."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.one, self.two = nn.Linear(6, 6), Block(), Block()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (self.one, self.two):
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)  # type: ignore[no-untyped-call]
        return x


@pytest.mark.parametrize("method", ["fake_quant", "lsq"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, method: str) -> None:
    results = []
    for how in (None, reentrant):
        config = get_default_qconfig(method, method)  # type: ignore[arg-type]
        net = ready(Stack(how), config, example_inputs=tokens())
        run_calibration(net, tokens())
        set_fake_quantize(net, "qat")
        out = net(tokens())
        out.square().sum().backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        results.append((out.detach(), grads, dict(net.named_buffers())))
    want, have = results
    assert same_bits(want[0], have[0])
    for mine, theirs in zip(want[1:], have[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value is not None
            assert torch.equal(value, theirs[name]), name


def test_parts_alone() -> None:
    net = ready(Stack(), example_inputs=tokens())
    run_calibration(net, tokens())
    want = net(tokens()).detach()
    twin = copy.deepcopy(net)
    for model in (net, twin):
        assert same_bits(model.two(model.one(model.stem(tokens()))).detach(), want)
    with pytest.raises(RuntimeError, match='"one" to belong to a prepared model, got one copied'):
        copy.deepcopy(net.one)(tokens())
    if torch.__version__.startswith("2.11."):
        return  # its Dynamo has no guard for the call that is going on around the part
    torch._dynamo.reset()
    net.one = torch.compile(net.one, backend="eager", fullgraph=True)
    for _ in range(2):
        assert same_bits(net(tokens()).detach(), want)


def test_hooks_compute_what_they_like() -> None:
    seen: list[Tensor] = []
    model = Stack()
    model.one.a.register_forward_hook(lambda *args: seen.append((args[2] * args[2]).sum()))
    net = ready(model, example_inputs=tokens())
    assert len(seen) == 2  # the runs of the example, in eval and in train mode
    run_calibration(net, tokens())
    want = net(tokens()).detach()
    for module in (net, net.one, net.two.a, net.stem):
        module.register_forward_hook(lambda _, __, out: seen.append((out + out).sum()))
        module.register_forward_pre_hook(lambda _, args: seen.append((args[0] + args[0]).sum()))
    before = len(seen)
    assert same_bits(net(tokens()).detach(), want)
    assert len(seen) == before + 9


def test_threads() -> None:
    net = ready(Stack(), example_inputs=tokens())
    run_calibration(net, tokens())
    want = {seed: net(tokens(seed=seed)).detach() for seed in range(4)}
    have: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        for _ in range(20):
            have[seed] = net(tokens(seed=seed)).detach()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, out in want.items():
        assert same_bits(have[seed], out)


def test_functional_call() -> None:
    net = ready(Stack(), example_inputs=tokens())
    run_calibration(net, tokens())
    given = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert same_bits(torch.func.functional_call(net, given, (tokens(),)).detach(), net(tokens()))


def test_a_value_is_observed_once() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.whole = nn.Linear(6, 6), nn.Linear(6, 6)
            self.left, self.right = nn.Linear(3, 6), nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).tanh()
            left, right = y.chunk(2, 1)
            out: Tensor = self.left(left) + self.right(right) + self.whole(y.reshape(-1, 6)) + y
            return out

    net = ready(Parts().eval(), example_inputs=tokens())
    set_fake_quantize(net, "calibration")
    net(tokens(5))
    quantizer = named_quantizers(net)["tanh_quantizer"]
    assert int(quantizer.observer.tally.sum()) == 30
    value = net.get_submodule("first")(tokens(5)).tanh()
    want = torch.stack([value.min(), value.max()])[None]
    assert torch.equal(quantizer.observer.extrema.reshape(1, 2), want)


def test_dropout_does_not_stretch_the_range() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(F.dropout(self.drop(x.tanh()), 0.5, self.training))
            return out

    net = ready(Dropped(), example_inputs=tokens())
    set_fake_quantize(net.train(), "calibration")
    net(tokens())
    set_fake_quantize(net, "validation")
    assert float(named_quantizers(net)["tanh_quantizer"].range.max()) <= 1


def test_a_plain_network_enters_no_function_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_ext.prepare.insertion import running

    entered: list[object] = []
    monkeypatch.setattr(
        running, "InsertionMode", lambda call: entered.append(call) or torch.no_grad()
    )
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ZeroPad2d(1)]
    plain = nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    images = torch.randn(2, 3, 8, 8)
    net = ready(plain.eval(), example_inputs=images)
    run_calibration(net, images)
    assert off_grid(net, images) == ([], {"conv2d": 2, "linear": 1})
    assert not entered
    sums = ready(Stack().eval(), example_inputs=tokens())
    sums(tokens())
    assert not entered  # in FLOAT
    set_fake_quantize(sums, "calibration")
    with pytest.raises(RuntimeError, match="got none of add"):
        sums(tokens())
    assert entered
