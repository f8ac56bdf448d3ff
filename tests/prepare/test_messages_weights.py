"""Weights that hooks compute (weight_norm, spectral_norm, prune): quantized, in both modes; and
what is said of weights that cannot be."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils import remove_spectral_norm as no_spectral_norm
from torch.nn.utils import remove_weight_norm as no_weight_norm

from prepare_steps import CONFIG, names
from snapshots import same_bits
from torch_ext import (
    calibrate,
    fuse,
    load_observer_params,
    named_quantizers,
    prepare_qat,
    remove_quantizers,
    set_fake_quantize,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning"),
]

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
QUANTIZER = "0.weight_quantizer"

# How to make a weight computed, and a parameter again.
KINDS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "weight_norm": (weight_norm, no_weight_norm),
    "spectral_norm": (spectral_norm, no_spectral_norm),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
}
MODES = pytest.mark.parametrize("example", [None, X], ids=["plain", "example"])


def float_net(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    KINDS[kind][0](net[0])
    net(X).sum().backward()  # the weight has a history of gradients now, so deepcopy raises
    net.zero_grad()
    net.qconfig = CONFIG  # type: ignore[assignment]
    return net


def permanent(kind: str, trained: nn.Module) -> nn.Module:
    """A float copy whose weight is a parameter with the same values."""
    net = float_net(kind)
    net.load_state_dict(trained.state_dict())
    net.eval()(X)  # in which the hooks compute the weight
    KINDS[kind][1](net.eval()[0])
    return net


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A forward and backward in train mode: output, gradients, buffers."""
    net.train().zero_grad()
    out = net(x)
    out.square().sum().backward()
    grads = {f"{n}.grad": p.grad for n, p in net.named_parameters() if p.grad is not None}
    inside = tuple(f"{name}." for name in named_quantizers(net))
    float_buffers = {n: b for n, b in net.named_buffers() if not n.startswith(inside or "?")}
    return {"out": out.detach(), **grads, **float_buffers}


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_float_is_the_original(kind: str, example: Tensor | None) -> None:
    plain = float_net(kind)
    net = prepare_qat(plain, example_inputs=example)
    assert QUANTIZER in names(net)
    want, have = step(plain, X), step(net, X)
    renamed = {k.replace("parametrizations.weight.original", "weight"): v for k, v in have.items()}
    assert want.keys() == renamed.keys()
    assert all(same_bits(want[key], renamed[key]) for key in want)


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_that_of_a_parameter(kind: str, example: Tensor | None) -> None:
    plain = float_net(kind)
    net = prepare_qat(plain.eval(), example_inputs=example)
    wanted = prepare_qat(permanent(kind, plain), example_inputs=example)
    calibrate(net, [X])
    calibrate(wanted, [X])
    want = wanted.get_buffer("0.parametrizations.weight.0.scale")
    assert same_bits(net.get_buffer(f"{QUANTIZER}.scale"), want)
    assert same_bits(net(X).detach(), wanted(X).detach())
    assert not same_bits(net(X).detach(), plain(X).detach())


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_its_range_is_that_of_the_present_weight(
    kind: str, example: Tensor | None
) -> None:
    plain = float_net(kind)
    net = prepare_qat(plain, example_inputs=example)
    calibrate(net, [X], state="qat")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        step(net, X)
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    set_fake_quantize(net, "validation")
    back = remove_quantizers(net).eval()
    back(X)
    weight: Any = back.get_submodule("0").weight
    want = weight.detach().abs().amax(1) / 127.5
    torch.testing.assert_close(net.get_buffer(f"{QUANTIZER}.scale"), want)
    assert len(back.get_submodule("0")._forward_pre_hooks) == 1
    assert back.state_dict().keys() == plain.state_dict().keys()


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_copies_and_loads(kind: str, example: Tensor | None) -> None:
    net = prepare_qat(float_net(kind).eval(), example_inputs=example)
    calibrate(net, [X])
    torch._dynamo.reset()
    with torch.no_grad():
        want = net(X)
        compiled = torch.compile(net, fullgraph=True, backend="eager")(X)
        twin = copy.deepcopy(net)
        assert same_bits(twin(X), want)
    assert same_bits(compiled, want)
    assert twin.get_submodule("0").weight is not net.get_submodule("0").weight
    other = prepare_qat(float_net(kind).eval(), example_inputs=example)
    load_observer_params(net, other, verbose=False)
    set_fake_quantize(other, "validation")
    assert same_bits(other(X).detach(), want)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert same_bits(other(X).detach(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_exported(kind: str) -> None:
    net = prepare_qat(float_net(kind).eval(), example_inputs=X)
    calibrate(net, [X])
    program = torch.export.export(net, (X,))
    assert same_bits(program.module()(X).detach(), net(X).detach())


@MODES
def test_a_weight_that_is_made_a_parameter_afterwards_is_refused(example: Tensor | None) -> None:
    net = prepare_qat(float_net("prune"), example_inputs=example)
    prune.remove(net.get_submodule("0"), "weight")
    with pytest.raises(RuntimeError, match="its weight to be computed by a hook") as error:
        net(X)
    assert "prune.remove" in str(error.value)
    # The advice: before prepare_qat, or after remove_quantizers.
    back = remove_quantizers(prepare_qat(float_net("prune"), example_inputs=example))
    prune.remove(back.get_submodule("0"), "weight")
    calibrate(prepare_qat(back, example_inputs=example), [X])


def test_the_out_proj_of_attention_whose_hook_never_runs() -> None:
    def make(*, pruned: bool) -> nn.Module:
        net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        prune.l1_unstructured(net.self_attn.out_proj, "weight", 0.5)
        if not pruned:
            prune.remove(net.self_attn.out_proj, "weight")
        net.qconfig = CONFIG  # type: ignore[assignment]
        return net

    with pytest.raises(ValueError, match=r"self_attn.out_proj.weight to be a parameter.*never run"):
        prepare_qat(make(pruned=True))
    calibrate(prepare_qat(make(pruned=False)), [X[None]])
    calibrate(prepare_qat(make(pruned=True), mapping={"self_attn.out_proj": None}), [X[None]])
    calibrate(prepare_qat(make(pruned=True), example_inputs=X[None]), [X[None]])


class Buffer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 6)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class OwnHook(nn.Linear):
    """Scales its weight at each call, by a hook of its own."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.plain = nn.Parameter(self.weight.detach())
        del self.weight
        self.weight = self.plain.detach()
        self.register_forward_pre_hook(OwnHook.scale)

    def scale(self, _: object) -> None:
        self.weight = self.plain * 0.5


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


@pytest.mark.parametrize("kind", [Buffer, OwnHook])
def test_other_weights_that_are_no_parameters(kind: Callable[[], nn.Module]) -> None:
    def make() -> nn.Module:
        net = nn.Sequential(kind(), nn.ReLU(), nn.Linear(6, 4))
        net.qconfig = CONFIG  # type: ignore[assignment]
        return net

    what = "a buffer" if kind is Buffer else "a plain attribute"
    with pytest.raises(ValueError, match=f"0.weight to be a parameter, got {what}") as error:
        prepare_qat(make())
    for advice in ("an nn.Parameter", "parametrize", "example_inputs", "qconfig=None"):
        assert advice in str(error.value)
    calibrate(prepare_qat(make(), mapping={"0": None}), [X])
    net = prepare_qat(make(), example_inputs=X)  # which reads the weight where the forward does
    assert (QUANTIZER if kind is Buffer else "0.mul_quantizer") in names(net)
    calibrate(net, [X])
    plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    parametrize.register_parametrization(plain[0], "weight", Half())
    plain.qconfig = CONFIG  # type: ignore[assignment]
    calibrate(prepare_qat(plain), [X])


def test_new_style_norms_still_work() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU())
    net.qconfig = CONFIG  # type: ignore[assignment]
    assert "0.parametrizations.weight.1" in names(prepare_qat(net, example_inputs=X))


class Keeps(nn.Module):
    """Leaves a result with a history of gradients on itself, in a container of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.norm = nn.BatchNorm1d(2)
        self.kept: dict[str, list[Tensor]] = {"last": []}

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        self.kept["last"] = [out]
        return out


@MODES
def test_a_model_that_keeps_a_result_is_copied(example: Tensor | None) -> None:
    net = Keeps()
    x = torch.randn(2, 1, 8)
    net(x)
    with pytest.raises(RuntimeError, match="support the deepcopy protocol"):
        copy.deepcopy(net)
    net.qconfig = CONFIG  # type: ignore[assignment]
    kept = net.kept["last"][0]
    made = prepare_qat(net, example_inputs=None if example is None else x)
    assert made.kept["last"][0].grad_fn is None
    assert same_bits(made.kept["last"][0], kept.detach())
    assert net.kept["last"][0] is kept
    fuse(net, example_inputs=x)
    fuse(net)
    made(x)
    remove_quantizers(made)


@MODES
def test_what_cannot_be_copied_is_named(example: Tensor | None) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    net.qconfig = CONFIG  # type: ignore[assignment]
    net[1].rows = (row for row in range(3))
    with pytest.raises(
        TypeError, match=r'copy.deepcopy can copy, got one with the attribute "1\.rows"'
    ) as e:
        prepare_qat(net, example_inputs=example)
    assert "generator" in str(e.value)
    del net[1].rows
    calibrate(prepare_qat(net, example_inputs=example), [X])
