"""The state machine: every transition, in both modes, for every kind of configuration."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from nets.tiny_net import ACTIVATIONS, WEIGHTS, calibrated, images, prepared, tiny_net
from snapshots import same, same_bits, snapshot
from states import CALIBRATION, EFFECT, FLOAT, QAT, QCONFIGS, VALIDATION, bring, forward
from torch_ext import (
    FakeQuantize,
    FakeQuantState,
    QuantizationWarning,
    fake_quantize_states,
    get_default_qconfig,
    reset_statistics,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", QCONFIGS)
@pytest.mark.parametrize(("before", "after"), list(itertools.product(FakeQuantState, repeat=2)))
def test_every_transition(
    before: FakeQuantState, after: FakeQuantState, kind: str, training: bool
) -> None:
    net, plain = bring(kind, before)
    net.train(training)
    plain.train(training)
    set_fake_quantize(net, after)
    assert set(fake_quantize_states(net).values()) == {after}

    accumulates, follows, quantizes = EFFECT[after]
    start = snapshot(net)
    x = images(seed=9) * 3
    out, want = forward(net, x), forward(plain, x)
    end = snapshot(net)
    changed = {key for key in start if not same({key: start[key]}, {key: end[key]})}
    if training:  # batch norms count on, as in the float model
        changed = {key for key in changed if not key.startswith(("bn1", "bn2"))}

    assert same_bits(out, want) == (not quantizes)
    statistics = {key for key in changed if ".observer." in key}
    ranges = {key for key in changed if key.endswith((".range", ".scale", ".zero_point"))}
    has_data = kind not in ("given", "weights only")
    assert bool(statistics) == (accumulates and has_data)
    moves = kind not in ("frozen", "given", "weights only")
    assert bool(ranges) == (follows and moves)
    assert changed == statistics | ranges
    assert set(fake_quantize_states(net).values()) == {after}


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize("state", FakeQuantState)
def test_the_order_of_mode_and_state_does_not_matter(state: FakeQuantState, first: str) -> None:
    one, other = calibrated(), calibrated()
    getattr(one, first)()
    set_fake_quantize(one, state)
    set_fake_quantize(other, state)
    getattr(other, first)()
    for net in (one, other):
        forward(net, images(seed=4))
    assert same(snapshot(one), snapshot(other))


def test_calibration_survives_eval_and_validation_survives_train() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    net.eval()
    forward(net, images())
    assert int(net.conv1.input_quantizers.input.observer.tally[0, 0]) == images().numel()
    set_fake_quantize(net, VALIDATION)
    net.train()
    before = {k: v for k, v in snapshot(net).items() if "quantizer" in k}
    forward(net, images(seed=3) * 9)
    assert same({k: snapshot(net)[k] for k in before}, before)


def test_float_in_between_leaves_training_able_to_observe() -> None:
    net = calibrated()
    set_fake_quantize(net, FLOAT)
    set_fake_quantize(net, QAT)
    before = net.fc.input_quantizers.input.range.clone()
    forward(net, images(seed=3) * 9)
    assert not torch.equal(net.fc.input_quantizers.input.range, before)


def test_states_are_per_model() -> None:
    one, other = calibrated(), calibrated()
    set_fake_quantize(one, FLOAT)
    assert set(fake_quantize_states(other).values()) == {VALIDATION}
    assert not torch.equal(forward(one, images()), forward(other, images()))


def test_leaving_calibration_solves_activations_from_statistics_and_weights_from_weights() -> None:
    net = prepared(get_default_qconfig(activation_observer="mse", weight_observer="percentile"))
    set_fake_quantize(net, CALIBRATION)
    forward(net, images(4, seed=1))
    forward(net, images(7, seed=2))
    with torch.no_grad():
        net.fc.parametrizations.weight.original.mul_(3)
    set_fake_quantize(net, VALIDATION)
    for name in ACTIVATIONS:
        quantizer = net.get_submodule(name)
        assert isinstance(quantizer, FakeQuantize)
        assert same_bits(quantizer.range, quantizer.observer.range())
        scale, zero_point = quantizer.observer.calculate_qparams()
        assert same_bits(quantizer.scale, scale)
        assert same_bits(quantizer.zero_point, zero_point)
    for name in WEIGHTS:
        quantizer = net.get_submodule(name)
        weight = net.get_submodule(name.rpartition(".")[0]).original
        observer = torch_ext.Observer(
            "percentile", qscheme=torch.per_channel_symmetric, ch_axis=0, channel_len=len(weight)
        )
        observer(weight)
        assert same_bits(quantizer.range, observer.range())
        assert same_bits(quantizer.scale, observer.calculate_qparams()[0])
        assert same_bits(quantizer.observer.extrema, observer.extrema)
        assert quantizer.observer.tally[:, 0].tolist() == [weight[0].numel()] * len(weight)


def test_quantizers_without_data_are_named_and_nothing_changes() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    net.conv1(images())
    before = snapshot(net)
    unseen = [name for name in ACTIVATIONS[1:] if not name.startswith("add")]
    for state in (QAT, VALIDATION, FLOAT):
        with pytest.raises(RuntimeError, match="expected every quantizer to have seen data") as e:
            set_fake_quantize(net, state)
        assert all(name in str(e.value) for name in unseen)
        assert ACTIVATIONS[0] not in str(e.value)
        assert same(snapshot(net), before)


def test_validation_without_a_range_is_refused_by_name() -> None:
    for start in (FLOAT, QAT):
        net = prepared()
        set_fake_quantize(net, start)
        before = snapshot(net)
        with pytest.raises(RuntimeError, match="to have a range for VALIDATION") as caught:
            set_fake_quantize(net, VALIDATION)
        names = [n for n in ACTIVATIONS if not n.startswith("add")]
        assert all(name in str(caught.value) for name in names)
        assert not any(name in str(caught.value) for name in WEIGHTS)  # these could be solved
        assert same(snapshot(net), before)


def test_allowed_unobserved_quantizers_pass_through_and_then_learn() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    net.conv1(images())
    set_fake_quantize(net, VALIDATION, allow_unobserved=True)
    assert net.fc.input_quantizers.input.passes_through
    assert not net.conv1.input_quantizers.input.passes_through
    x = torch.randn(2, 3)
    assert net.fc.input_quantizers.input(x) is x
    set_fake_quantize(net, FLOAT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        set_fake_quantize(net, VALIDATION)  # allowed before
    assert net.fc.input_quantizers.input.passes_through
    set_fake_quantize(net, QAT)
    forward(net, images())
    set_fake_quantize(net, VALIDATION)
    assert not net.fc.input_quantizers.input.passes_through
    assert net.fc.input_quantizers.input.solved.tolist() == [1]


def test_training_may_start_without_calibration() -> None:
    net = prepared()
    set_fake_quantize(net, QAT)
    forward(net, images())
    set_fake_quantize(net, VALIDATION)
    assert same_bits(
        net.conv1.input_quantizers.input.range[0], torch.stack(torch.aminmax(images()))
    )


def test_an_input_without_data_passes_through_with_a_warning() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(self.embedding(tokens))
            return out

    net = Tokens()
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    net = torch_ext.prepare_qat(net, input_qconfig=get_default_qconfig())
    set_fake_quantize(net, CALIBRATION)
    tokens = torch.tensor([[0, 3]])
    forward(net, tokens)
    with pytest.warns(QuantizationWarning, match=r"pass through: input_quantizers\.tokens"):
        set_fake_quantize(net, VALIDATION)
    assert forward(net, tokens).shape == (1, 2, 2)


def test_statistics_go_on_until_reset() -> None:
    net = prepared()
    for count in (4, 3):
        set_fake_quantize(net, CALIBRATION)
        forward(net, images(count))
        set_fake_quantize(net, VALIDATION)
    tally = net.fc.input_quantizers.input.observer.tally
    assert int(tally[0, 0]) == 7 * 4
    reset_statistics(net, "fc.*")
    assert int(tally[0, 0]) == 0
    assert int(net.conv1.input_quantizers.input.observer.tally[0, 0]) == 7 * 64
    assert net.fc.input_quantizers.input.solved.tolist() == [1]


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("fc.input_quantizers.input", {"fc.input_quantizers.input"}),
        ("*.parametrizations.*", set(WEIGHTS)),
        (["conv?.i*", "add.*"], set(ACTIVATIONS[:4])),
        ("*", set(ACTIVATIONS + WEIGHTS)),
    ],
)
def test_patterns_choose_quantizers(pattern: Any, chosen: set[str]) -> None:
    net = calibrated()
    set_fake_quantize(net, FLOAT, pattern)
    states = fake_quantize_states(net)
    assert {name for name, state in states.items() if state is FLOAT} == chosen


def test_weights_alone_need_no_data() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION, "*.parametrizations.*")
    set_fake_quantize(net, VALIDATION, "*.parametrizations.*")
    assert torch.unique(net.fc.weight[0]).numel() <= 256
    assert not torch.equal(net.fc.weight, net.fc.parametrizations.weight.original)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_gradient_mode_of_calibration_does_not_matter(mode: Any) -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    with mode():
        net(images())
    set_fake_quantize(net, VALIDATION)
    assert same(snapshot(net), snapshot(calibrated()))


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"state": "train"}, ValueError, "unknown state 'train'; known: calibration, qat, valid"),
        ({"state": None}, ValueError, "unknown state None"),
        ({"pattern": "head*"}, ValueError, 'no quantizer matches pattern "head*"; known: conv1'),
        ({"pattern": ["fc.*", "head"]}, ValueError, 'no quantizer matches pattern "head"'),
        ({"pattern": [3]}, TypeError, "pattern to be text, got 3"),
        ({"pattern": 5}, TypeError, "expected pattern to be text or a list of texts, got 5"),
        ({"pattern": []}, ValueError, "pattern to name quantizers, got an empty list"),
    ],
)
def test_bad_arguments_change_nothing(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    net = calibrated()
    before = snapshot(net)
    with pytest.raises(kind) as caught:
        set_fake_quantize(net, **({"state": "qat"} | arguments))
    assert text in str(caught.value)
    assert same(snapshot(net), before)


def test_models_without_quantizers_are_refused() -> None:
    with pytest.raises(ValueError, match="model to have quantizers, got none; call prepare_qat"):
        set_fake_quantize(tiny_net(), "qat")
    with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got None"):
        set_fake_quantize(None, "qat")  # type: ignore[arg-type]


def test_wrappers_do_not_change_names() -> None:
    net = calibrated()
    wrapped = nn.DataParallel(torch.compile(net, backend="eager"))  # type: ignore[arg-type]
    set_fake_quantize(wrapped, FLOAT, "fc.input_quantizers.input")
    assert fake_quantize_states(wrapped) == fake_quantize_states(net)
    assert net.fc.input_quantizers.input.state is FLOAT


def test_compiled_parts_do_not_change_names() -> None:
    net = calibrated()
    want = fake_quantize_states(net)
    net.fc = torch.compile(net.fc, backend="eager")  # type: ignore[assignment]
    assert fake_quantize_states(net).keys() == want.keys()
    assert torch_ext.load_observer_params(calibrated(), net).complete


def test_ordinary_data_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        calibrated()


def test_state_survives_copies_but_not_the_state_dict() -> None:
    net = calibrated()
    assert set(fake_quantize_states(copy.deepcopy(net)).values()) == {VALIDATION}
    loaded = prepared()
    loaded.load_state_dict(net.state_dict())
    assert set(fake_quantize_states(loaded).values()) == {FLOAT}
    set_fake_quantize(loaded, VALIDATION)
    assert same_bits(forward(loaded, images()), forward(net, images()))
