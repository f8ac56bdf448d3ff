"""reconstruct moves means: into biases, or into the mean that a folded norm takes off."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rounded_net import INT4, data, made, net, weights
from snapshots import same_bits, snapshot
from torch_ext import (
    QConfig,
    calibrate,
    float_state_dict,
    get_default_qconfig,
    load_float_state_dict,
    prepare_qat,
    reconstruct,
)
from torch_ext.correction.rounding.layer_costs import LayerCosts
from torch_ext.correction.walk.layer_walk import LayerCall, WalkedLayer

pytestmark = pytest.mark.usefixtures("one_thread")
# Where each layer's output has its mean; "twice" has one bias for two calls.
ENDS = {"first": "first", "depthwise": "norm2", "grouped": "grouped", "up": "up", "fc": "fc"}


def channel_means(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    sums: dict[str, list[Tensor]] = {name: [] for name in ENDS}
    hooks = [
        model.get_submodule(end).register_forward_hook(
            lambda _, __, made, name=name: sums[name].append(made.double().movedim(1, 0).flatten(1))
        )
        for name, end in ENDS.items()
    ]
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts, 1).mean(1) for name, parts in sums.items()}


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize("batches", [1, 3])
def test_each_layer_makes_the_means_of_the_float_model(method: Any, batches: int) -> None:
    given = data(batches)
    want = channel_means(net(), given)
    for bias, least, most in ((True, 0.0, 1e-5), (False, 1e-3, 9.0)):
        model = made(fold_batch_norms=True)
        reconstruct(model, given, method, bias=bias, iterations=100, progress=False)
        have = channel_means(model, given)
        for name in ENDS:
            error = float((have[name] - want[name]).abs().max())
            assert least <= error <= most, (name, bias)


def test_the_report_has_the_shifts_and_no_parameter_is_made() -> None:
    model = made(fold_batch_norms=True)
    before = snapshot(model)
    norms = {n: t.clone() for n, t in net().state_dict().items() if "running" in n}
    result = reconstruct(model, data(), progress=False)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert model.get_submodule("depthwise").bias is None
    for row in result.layers:
        key, old = f"{row.name}.bias", before
        if row.name == "depthwise":
            key, old = "norm2.running_mean", norms
        assert row.shift == pytest.approx(float((after[key] - old[key]).abs().max()), rel=1e-4)
        assert row.shift > 0
    for key in ("norm.running_mean", "norm.running_var", "norm2.running_var", "norm2.bias"):
        assert same_bits(after[key], before[key])
    assert "largest shift" in str(result)
    kept = made(fold_batch_norms=True)
    result = reconstruct(kept, data(), bias=False, progress=False)
    assert all(row.shift == 0 for row in result.layers)
    changed = [key for key, t in snapshot(kept).items() if not equal(t, before[key])]
    assert {key.partition(".")[2] for key in changed} <= {
        "parametrizations.weight.original",
        *(f"parametrizations.weight.{i}.{b}" for i in (0, 1) for b in ("solved", "range")),
    }


def equal(a: Any, b: Any) -> bool:
    return same_bits(a, b) if isinstance(a, Tensor) else bool(a == b)


def test_a_model_of_the_same_keys_takes_what_was_moved() -> None:
    model = made(fold_batch_norms=True)
    reconstruct(model, data(), progress=False)
    other = made(fold_batch_norms=True)
    load_float_state_dict(other, float_state_dict(model))
    for key in ("first.bias", "norm2.running_mean", "fc.bias"):
        assert same_bits(other.state_dict()[key], model.state_dict()[key])


class Shared(nn.Module):
    """Biases that cannot move: of two layers, of none, one that the forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(9, 9)
        self.two = nn.Linear(9, 9)
        self.two.bias = self.one.bias
        self.none = nn.Linear(9, 9, bias=False)
        self.scaled = Scaled(9, 9)
        self.own = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.relu(self.one(x.mean((1, 2)))))
        x = self.scaled(torch.relu(self.none(torch.relu(x))))
        return self.own(torch.relu(x))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, 2 * self.bias)


def test_biases_that_others_read_too_stay() -> None:
    model = Shared()
    model.qconfig = get_default_qconfig(weight_qkwargs=INT4)
    prepared = prepare_qat(model, example_inputs=data()[0])
    calibrate(prepared, data(), progress=False)
    before = copy.deepcopy(prepared.state_dict())
    result = reconstruct(prepared, data(), progress=False)
    assert {row.name: row.shift > 0 for row in result.layers} == {
        "one": False,
        "two": False,
        "none": False,
        "scaled": False,
        "own": True,
    }
    after = prepared.state_dict()
    assert before.keys() == after.keys()
    for key in ("one.bias", "two.bias", "scaled.bias"):
        assert same_bits(before[key], after[key])


@pytest.mark.parametrize("weight", [INT4, {"dtype": "int4", "qscheme": "per_tensor_symmetric"}])
def test_inputs_that_do_not_change_cost_nothing(weight: dict[str, Any]) -> None:
    """Their errors are means, which biases take up: the output is exact, whatever the rounding."""
    if "qscheme" in weight:
        weight = weight | {"ch_axis": -1}
    model = made(weight, {"dtype": "int16"}, fold_batch_norms=True)
    x = torch.full((4, 3, 9, 9), 0.7)
    with torch.no_grad():
        want = net().eval()(x)
    reconstruct(model, [x], progress=False)
    with torch.no_grad():
        have = model.eval()(x)
    assert torch.allclose(have, want, atol=2e-3)
    assert all(bool(t.isfinite().all()) for t in weights(model).values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("samples", [6, 200])
def test_the_fit_to_the_float_model_is_a_ridge_regression(samples: int, bias: bool) -> None:
    """On a grid so fine that rounding does not count; the fewer samples, the nearer it stays."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():  # an input that is always 0, whose weight makes the range a wide one
        model[0].weight[0] = model[0].bias[0] = 0
        model[2].weight[:, 0] = 2
    x = torch.randn(samples, 9)
    first, last = (copy.deepcopy(model[i]).requires_grad_(False) for i in (0, 2))
    for i, dtype in ((0, "int4"), (2, "int16")):
        model[i].qconfig = QConfig(
            None, get_default_qconfig(weight_qkwargs={"dtype": dtype}).weight
        )
    prepared = prepare_qat(model, example_inputs=x)
    calibrate(prepared, [x], progress=False)
    reconstruct(prepared, [x], pattern="2*", bias=bias, damping=0.05, progress=False)
    reads = torch.tanh(prepared[0](x)).detach().double().numpy()
    wanted = torch.tanh(first(x)).double().numpy() @ last.weight.double().numpy().T
    weight, offset = last.weight.double().numpy(), last.bias.double().numpy()
    if bias:
        offset = offset + wanted.mean(0)
        means, wanted = reads.mean(0), wanted - wanted.mean(0)
        reads = reads - means
    square = reads.T @ reads
    ridge = (0.05 + 16 / samples) * square.diagonal()[1:].mean() * np.eye(16)
    weight = weight + (wanted - reads @ weight.T).T @ reads @ np.linalg.inv(square + ridge)
    if bias:
        offset = offset - weight @ means
    have = prepared[2]
    assert np.abs(have.weight.detach().numpy() - weight).max() < 1e-4
    assert np.abs(have.bias.detach().numpy() - offset).max() < 1e-3
    assert np.abs(have.weight.detach().numpy() - last.weight.numpy()).max() > 2e-3


def test_what_is_left_of_inputs_without_their_means() -> None:
    """By two passes; of a constant nothing is left, not the rounding of its sums."""
    torch.manual_seed(2)
    x = torch.randn(70, 6)
    x[:, [1, 4]] = 12.345678
    layer: Any = WalkedLayer("fc", nn.Linear(6, 2), None, None)  # type: ignore[arg-type]
    call = LayerCall(layer, nn.functional.linear, (x, layer.module.weight.detach(), None), {})
    costs = LayerCosts("fc", 1000, 0)
    costs.want(call)
    costs.add(call)
    hessian, wanted = costs.sums(centred=True)
    rest = x.double() - x.double().mean(0)
    rest[:, [1, 4]] = 0
    assert wanted is not None
    assert torch.allclose(hessian[0], rest.T @ rest, rtol=1e-9, atol=1e-9)
    assert not hessian[0, [1, 4]].any()
    made = rest @ layer.module.weight.detach().double().T
    assert torch.allclose(wanted[0], made.T @ rest, rtol=1e-5, atol=1e-4)
    assert not wanted[0, :, [1, 4]].any()
