"""choose_bits: widths within a budget, against all assignments, and what becomes of the choice."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from bit_nets import DATA, net_of, output_error
from nets.tiny_net import WEIGHTS, TinyNet, images, tiny_net
from snapshots import same, snapshot
from torch_ext import (
    BitChoice,
    choose_bits,
    get_default_qconfig,
    named_quantizers,
    resolve,
    sensitivity,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"conv1": 36, "conv2": 36, "fc": 12}
MACS = {"conv1": 64 * 36, "conv2": 64 * 36, "fc": 12}
BITS = (3, 4, 8, 16)
# How much worse than the best assignment the sum of losses may be, and the loss itself.
SUM_FACTOR, LOSS_FACTOR = 1.0001, 1.1


def by_hand(bits: dict[str, int], on: list[str] | None = None) -> TinyNet:
    """Quantizers of other widths, calibrated for them; those that are ``on`` (default: all)."""

    def keys(name: str) -> dict[str, Any]:
        return {"dtype": f"int{bits.get(name, 8)}"}

    configs = {
        layer: get_default_qconfig(
            activation_observer="percentile",
            activation_qkwargs=keys(f"{layer}.input_quantizers.input"),
            weight_qkwargs=keys(f"{layer}.parametrizations.weight.0"),
        )
        for layer in SIZES
    }
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig(activation_observer="percentile")  # type: ignore[assignment]
    for layer, config in configs.items():
        net.get_submodule(layer).qconfig = config  # type: ignore[assignment]
    made = torch_ext.prepare_qat(net)
    torch_ext.calibrate(made, [images()], progress=False)
    if on is not None:
        set_fake_quantize(made, "float")
        set_fake_quantize(made, "validation", pattern=on)
    return made


def layer_of(name: str) -> str:
    return name.partition(".")[0]


def size(bits: dict[str, int]) -> float:
    return sum(SIZES[layer_of(name)] * bits[name] / 8 for name in WEIGHTS)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.75, 1.0, 1.5, 3.0])
def test_size_against_all_assignments(share: float) -> None:
    found = choose_bits(net_of(), DATA, share, bits=BITS)
    assert [row.name for row in found.rows] == WEIGHTS
    assert found.eight == sum(SIZES.values())
    assert found.budget == share * found.eight
    bits: dict[str, int] = {row.name: row.bits for row in found.rows}  # type: ignore[misc]
    assert found.cost == size(bits) == sum(row.size for row in found.rows) <= found.budget

    alone = {(n, b): output_error(by_hand({n: b}, [n])) for n in WEIGHTS for b in BITS}
    for row in found.rows:
        assert row.losses == pytest.approx({b: alone[row.name, b] for b in BITS}, rel=1e-9)
        assert row.loss == row.losses[row.bits]
    assert found.predicted == pytest.approx(sum(row.loss for row in found.rows))
    fitting = [
        given
        for widths in itertools.product(BITS, repeat=3)
        if size(given := dict(zip(WEIGHTS, widths, strict=True))) <= found.budget
    ]
    best_sum = min(sum(alone[entry] for entry in given.items()) for given in fitting)
    assert found.predicted <= SUM_FACTOR * best_sum
    assert found.chosen == pytest.approx(output_error(by_hand(bits)), rel=1e-9)


def wide_net() -> tuple[nn.Module, Tensor]:
    """Layers wide enough that the errors of one do not undo those of another by chance."""
    layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 16)).eval()
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    x = torch.randn(16, 3, 12, 12)
    made = torch_ext.prepare_qat(net, example_inputs=x)
    torch_ext.calibrate(made, [x], progress=False)
    return made, x


@pytest.mark.parametrize("share", [0.5, 0.75, 1.2])
def test_the_loss_itself_against_all_assignments(share: float) -> None:
    net, x = wide_net()
    found = choose_bits(net, [x], share, bits=BITS)
    set_fake_quantize(net, "float")
    want = net(x).detach().double()
    set_fake_quantize(net, "validation")
    values = {row.name: row.size * 8 / row.bits for row in found.rows}  # type: ignore[operator]
    losses = []
    for widths in itertools.product(BITS, repeat=len(found.rows)):
        rows = [replace(row, bits=b) for row, b in zip(found.rows, widths, strict=True)]
        if sum(values[row.name] * row.bits / 8 for row in rows) <= found.budget:  # type: ignore[operator]
            replace(found, rows=tuple(rows)).apply(net)
            have = net(x).detach().double()
            losses.append(float((have - want).square().sum() / want.square().sum()))
    assert len(losses) >= 10
    assert found.chosen <= LOSS_FACTOR * min(losses)


LAYERS = tuple(SIZES)
FACTORS = [(f"{n}.input_quantizers.input", f"{n}.parametrizations.weight.0") for n in LAYERS]


def operations(bits: dict[str, int]) -> float:
    return sum(MACS[layer_of(left)] * bits[left] * bits[right] for left, right in FACTORS)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.2])
@pytest.mark.parametrize("pairs", [False, True])
def test_operations_against_all_assignments(share: float, pairs: bool) -> None:
    widths = (4, 8, 16)
    found = choose_bits(net_of(), DATA, share, of="operations", pairs=pairs, bits=widths)
    names = [name for factors in FACTORS for name in factors]
    assert {row.name for row in found.rows} == set(names)
    bits: dict[str, int] = {row.name: row.bits for row in found.rows}  # type: ignore[misc]
    assert found.eight == 64 * sum(MACS.values())
    assert found.cost == operations(bits) <= found.budget == share * found.eight
    losses = {row.name: row.losses for row in found.rows}
    groups = FACTORS if pairs else [(name,) for name in names]
    assert {row.together for row in found.rows} == set(groups)
    best = math.inf
    for given in itertools.product(widths, repeat=len(groups)):
        every = {n: b for group, b in zip(groups, given, strict=True) for n in group}
        if operations(every) <= found.budget:
            total = sum(losses[group[0]][b] for group, b in zip(groups, given, strict=True))
            best = min(best, total)
    assert found.predicted <= SUM_FACTOR * best
    for row in found.rows:
        left, right = next(factors for factors in FACTORS if row.name in factors)
        assert row.operations == MACS[layer_of(left)] * bits[left] * bits[right]


def test_losses_are_those_of_sensitivity() -> None:
    net = net_of("mse", weight_observer="mse")
    found = choose_bits(net, DATA, 0.75, bits=BITS)
    rows = {row.name: row.losses for row in sensitivity(net, DATA, bits=BITS).rows}
    for row in found.rows:
        assert row.losses == rows[row.name]


def test_an_absolute_budget_and_a_pattern() -> None:
    found = choose_bits(net_of(), DATA, 50.0, absolute=True, bits=(4, 8), pattern="conv*weight*")
    assert [row.name for row in found.rows] == WEIGHTS[:2]
    # The last layer keeps its 8 bits and counts 12 bytes.
    with pytest.raises(ValueError, match="expected budget to be at least 48, which"):
        choose_bits(net_of(), DATA, 47.9, absolute=True, bits=(4, 8), pattern="conv*weight*")
    assert found.budget == 50


def test_an_own_metric() -> None:
    calls = []

    def accuracy(model: nn.Module, data: Any) -> float:
        calls.append(data)
        return -output_error(model)

    found = choose_bits(net_of(), "nothing to run", 0.75, accuracy, bits=(4, 8))
    plain = choose_bits(net_of(), DATA, 0.75, bits=(4, 8))
    assert [row.bits for row in found.rows] == [row.bits for row in plain.rows]
    assert [row.loss for row in found.rows] == pytest.approx([row.loss for row in plain.rows])
    assert found.metric == "accuracy"
    assert found.chosen == pytest.approx(-plain.chosen)
    assert calls == ["nothing to run"] * (3 + 2 * 3)


def test_a_backend_offers_what_it_takes() -> None:
    net = net_of(backend="onnxruntime")
    found = choose_bits(net, DATA, 1.6, of="operations", backend="onnxruntime")
    assert {bits for row in found.rows for bits in row.losses} == {8, "float"}
    for layer in LAYERS:
        assert len({row.bits for row in found.rows if row.name.startswith(f"{layer}.")}) == 1
    assert found.cost <= found.budget
    assert {row.bits for row in found.rows} == {8, "float"}
    reduced = net_of(backend="onnxruntime", reduce_range=True)
    assert choose_bits(reduced, DATA, 1.0, backend="onnxruntime").cost == found_size()
    with pytest.raises(ValueError, match='on a grid of "tensorrt", got others for conv1'):
        choose_bits(net, DATA, 2.0, backend="tensorrt")
    resolve(net, backend="tensorrt")
    choose_bits(net, DATA, 2.0, backend="tensorrt")


def found_size() -> float:
    return float(sum(SIZES.values()))


def test_a_value_that_two_layers_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.left(x) * torch.sigmoid(self.right(x)))

    net = Net().eval()
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    x = torch.randn(5, 6)
    made = torch_ext.prepare_qat(net, example_inputs=x)
    torch_ext.calibrate(made, [x], progress=False)
    found = choose_bits(made, [x], 1.0, pairs=True)
    together = {row.together for row in found.rows}
    weights = [n for n in named_quantizers(made) if n.startswith(("left.p", "right.p"))]
    assert any(set(weights) <= set(group) for group in together)
    assert len(together) == 2


@pytest.mark.parametrize("state", ["calibration", "qat", "validation", "float"])
def test_the_model_stays_as_it_was(state: str) -> None:
    net = net_of("mse").train()
    set_fake_quantize(net, state)
    before, random = snapshot(net), torch.get_rng_state()
    choose_bits(net, DATA, 0.8, of="operations")
    calls = 0

    def fail(model: nn.Module, data: Any) -> float:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls == 4:
            raise InterruptedError
        return 0.0

    with pytest.raises(InterruptedError):
        choose_bits(net, DATA, 0.8, fail)
    assert same(snapshot(net), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    calls = 0

    def run(fails_at: int) -> BitChoice:
        nonlocal calls
        calls = 0

        def forward(model: nn.Module, batch: Tensor) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise InterruptedError
            return model(batch)

        return choose_bits(net_of(), DATA, 0.75, forward=forward, checkpoint=path)

    with pytest.raises(InterruptedError):
        run(2 * 6 + 1)
    assert path.exists()
    found = run(-1)
    assert calls == 2 * (9 + 3) - 2 * 5
    assert not path.exists()
    assert found == choose_bits(net_of(), DATA, 0.75)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    found = choose_bits(net_of(), DATA, 0.75)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{found.cost:.6g} bytes of a budget of 63, ")
    assert lines[1].startswith("relative squared error of the outputs: float 0, as it was ")
    assert lines[2].split() == ["quantizer", "of", "bits", "loss", "bytes"]
    assert len(lines) == 4 + 3
    assert capsys.readouterr() == ("", "")
    found = choose_bits(net_of(), DATA, 0.75, of="operations", progress=True)
    assert str(found).splitlines()[2].endswith("bit operations")
    assert "18/18" in capsys.readouterr().err
