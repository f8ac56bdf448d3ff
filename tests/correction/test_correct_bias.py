"""correct_bias: mean errors vanish, against float64 and forward hooks of the tests' own."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import onnx_runs
import torch_ext
from corrections import (
    BOTH_WAYS,
    INT4,
    ORDER,
    Interrupted,
    Normed,
    Several,
    Stopping,
    all_at_once,
    batches,
    calibrated,
    channel_means,
    depthwise,
    filled,
    message,
    output_error,
)
from snapshots import same, same_bits, snapshot

# Most tests are about the corrections, not about which of them are kept.
correct_bias = functools.partial(torch_ext.correct_bias, keep="all")
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches()


def mean_errors(net: nn.Module, model: nn.Module, data: list[Tensor]) -> dict[str, float]:
    """The largest mean error of a channel, relative to the largest mean."""
    want, have = channel_means(net, data), channel_means(model, data)
    return {
        name: float((have[name] - mean).abs().max() / mean.abs().max())
        for name, mean in want.items()
    }


@BOTH_WAYS
@pytest.mark.parametrize("data", [DATA, [torch.cat(DATA)]], ids=["several", "one batch"])
@pytest.mark.parametrize("make", [Several, depthwise, Normed])
def test_mean_errors_are_gone_when_measured_again(
    make: Callable[[], nn.Module], data: list[Tensor], captured: bool
) -> None:
    net = filled(make())
    model = calibrated(net, data, captured=captured)
    before = mean_errors(net, model, data)
    report = correct_bias(model, data)
    after = mean_errors(net, model, data)
    assert max(before.values()) > 1e-2
    if make is Several:
        # Its correction changes what its second call reads, and so does that of `up` between them.
        assert after.pop("shared") < 0.5 * before["shared"]
    assert max(after.values()) < 1e-5
    assert [row.name for row in report.rows] == (ORDER if make is Several else list(before))
    assert all(row.after < row.before for row in report.rows)
    assert all(row.after < 1e-5 for row in report.rows if row.name in after)
    assert report.left == {}
    assert report.after == pytest.approx(output_error(net, model, data), rel=1e-6)
    assert report.after < report.before


@pytest.mark.parametrize("fold", [True, False])
def test_norms_beside_their_layer(fold: bool) -> None:
    net = filled(Normed())
    model = calibrated(net, DATA, fold_batch_norms=fold)
    report = correct_bias(model, DATA)
    assert [row.created for row in report.rows] == [True] * 3 + [False]
    assert max(mean_errors(net, model, DATA).values()) < 1e-5
    # The norm turns a mean of the convolution into one of its own.
    assert max(mean_errors_of(net, model, nn.BatchNorm2d)) < 1e-5


def mean_errors_of(net: nn.Module, model: nn.Module, kind: type[nn.Module]) -> list[float]:
    from corrections import seen_by_hooks

    want, have = (seen_by_hooks(m, DATA, (kind,), inputs=False) for m in (net, model))
    return [
        float(
            (torch.cat(have[n]).double() - torch.cat(want[n]).double()).mean((0, 2, 3)).abs().max()
        )
        for n in want
    ]


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (5, 4, 7, 7)),
    "row": (nn.Conv1d(4, 6, 3), (5, 4, 9)),
    "volume": (nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (5, 4, 5, 5)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 5, 5)),
    "linear": (nn.Linear(4, 6, bias=False), (20, 4)),
    "linear of tokens": (nn.Linear(4, 6), (5, 3, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_one_layer_against_float64(case: str) -> None:
    """Weights and input are quantized here by the formula, what follows is in float64."""
    layer, shape = copy.deepcopy(CASES[case])
    net: Any = filled(nn.Sequential(layer))
    data = list(torch.randn(shape).split(2))
    model: Any = calibrated(net, data)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach()
    # One scale for each output channel.
    rows = weight.transpose(0, 1) if transposed else weight
    if transposed and groups > 1:
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    scale = (rows.flatten(1).abs().amax(1).double() * 2 / 15).float()
    scale = scale.view(-1, *[1] * (rows.dim() - 1))
    rows = (rows / scale).round().clamp(-8, 7) * scale
    quantized = rows.transpose(0, 1) if transposed else rows
    if transposed and groups > 1:
        quantized = rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    x = torch.cat(data)
    step = (x.abs().max().double() * 2 / 255).float()
    read = (x / step).round().clamp(-128, 127) * step

    double = copy.deepcopy(layer).double()
    with torch.no_grad():
        want = double(x.double())
        double.weight.copy_(quantized)
        error = want - double(read.double())
    axis = -1 if isinstance(layer, nn.Linear) else 1
    shift = error.movedim(axis, 0).flatten(1).mean(1)
    bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros_like(shift)

    report = correct_bias(model, data)
    torch.testing.assert_close(model[0].bias.double(), bias + shift, rtol=1e-5, atol=2e-6)
    assert report.rows[0].shift == pytest.approx(float(shift.abs().max()), rel=1e-3)
    assert report.rows[0].created == (layer.bias is None)


def test_one_after_the_other_beats_all_at_once() -> None:
    net = depthwise(depth=10)
    data, other = batches(4, 8), batches(4, 8, seed=6)
    model = calibrated(net, data)
    at_once = output_error(net, all_at_once(net, model, data), other)
    as_it_was = output_error(net, model, other)
    correct_bias(model, data)
    corrected = output_error(net, model, other)
    assert corrected < 0.5 * at_once
    assert corrected < 0.5 * as_it_was


def test_batches_do_not_matter() -> None:
    net = filled(Several())
    models = [calibrated(net, DATA) for _ in range(2)]
    correct_bias(models[0], DATA)
    correct_bias(models[1], [torch.cat(DATA)])
    left, right = (m.state_dict() for m in models)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-6)


def test_what_changes_and_what_does_not() -> None:
    net = filled(Several())
    model = calibrated(net, DATA).train()
    torch_ext.set_fake_quantize(model, "float")
    before = snapshot(model)
    keys = list(model.state_dict())
    report = correct_bias(model, DATA)
    after = snapshot(model)
    biases = {f"{name}.bias" for name in ORDER}
    created = {"fc.bias", "up.bias", "row.bias"}
    assert {key for key in after if key not in before} == created
    assert [key for key in model.state_dict() if key in keys] == keys
    rest = {key: value for key, value in after.items() if key not in biases}
    assert same(rest, {key: value for key, value in before.items() if key not in biases})
    assert {f"{row.name}.bias" for row in report.rows if row.created} == created
    assert all(p.requires_grad for p in model.parameters())
    # In FLOAT the model computes with the corrected biases, and so do files and copies.
    text = str(report)
    assert "6 layers corrected; relative squared error of the outputs" in text
    assert text.count("created") == 3
    state = torch_ext.float_state_dict(model)
    again = filled(Several())
    for name in created:
        again.get_submodule(name.partition(".")[0]).bias = nn.Parameter(
            torch.zeros(state[name].shape)
        )
    again.load_state_dict(state)
    assert same_bits(again.eval()(DATA[0]), model.eval()(DATA[0]))


def test_chosen_layers() -> None:
    model = calibrated(filled(Several()), DATA)
    before = snapshot(model)
    report = correct_bias(model, DATA, pattern=["fc.*", "shared.*"])
    assert [row.name for row in report.rows] == ["shared", "fc"]
    changed = {key for key in snapshot(model) if key not in before}
    assert changed == {"fc.bias"}


def test_copies_pickles_and_a_second_call() -> None:
    net = filled(Several())
    model = calibrated(net, DATA)
    correct_bias(model, DATA)
    want = model(DATA[0])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert same_bits(torch.load(buffer, weights_only=False)(DATA[0]), want)
    assert same_bits(copy.deepcopy(model)(DATA[0]), want)
    # The float model has the corrections by now: what is left is the error against that.
    again = correct_bias(model, DATA)
    assert not any(row.created for row in again.rows)


@pytest.mark.parametrize("fold", [True, False])
def test_the_onnx_file_has_the_corrections(tmp_path: Path, fold: bool) -> None:
    pytest.importorskip("onnx")
    net = filled(Normed())
    config = torch_ext.get_default_qconfig(backend="onnxruntime")
    model = calibrated(net, DATA, config, fold_batch_norms=fold)
    before = model(DATA[0]).detach()
    correct_bias(model, DATA)
    want = model(DATA[0]).detach()
    assert not torch.equal(before, want)
    path = tmp_path / "net.onnx"
    torch_ext.export.onnx(model, DATA[0], path)
    have = onnx_runs.run(path, DATA[0])[0]
    error, shift = (have - want).abs().max(), (before - want).abs().max()
    assert float(error) < 0.05 * float(shift) or float(error) < 1e-4 * float(want.abs().max())


def test_the_pt2e_program_has_the_corrections() -> None:
    net = torch_ext.fuse(filled(Normed()), example_inputs=DATA[0])
    model = calibrated(net, DATA, torch_ext.get_default_qconfig(backend="x86"))
    before = model(DATA[0]).detach()
    correct_bias(model, DATA)
    want = model(DATA[0]).detach()
    program = torch_ext.export.pt2e(model, DATA[0], backend="x86")
    have = program.module()(DATA[0])
    assert float((have - want).abs().mean()) < 0.1 * float((before - want).abs().mean())


def test_wrappers_do_not_matter() -> None:
    net = filled(Several())
    models: list[Any] = [calibrated(net, DATA) for _ in range(3)]
    models[2].shared = torch.compile(models[2].shared, backend="eager")
    wrapped = [models[0], nn.DataParallel(models[1]), models[2]]
    reports = [correct_bias(model, DATA) for model in wrapped]
    assert reports[0] == reports[1] == reports[2]
    outputs = [model(DATA[0]) for model in models[:2]]
    assert same_bits(*outputs)


class TestBadInput:
    @pytest.fixture
    def model(self) -> nn.Module:
        return calibrated(filled(Several()), DATA)

    def check(self, model: nn.Module, data: Any, error: type[Exception] = ValueError) -> str:
        before = snapshot(model)
        text = message(lambda: correct_bias(model, data), error)
        assert text.startswith("correct_bias: ")
        assert same(snapshot(model), before)
        return text

    def test_data(self, model: nn.Module) -> None:
        assert "got none" in self.check(model, [])
        assert "run over again" in self.check(model, iter(DATA), TypeError)
        assert "batches" in self.check(model, DATA[0], TypeError)
        assert "expected batches to hold inputs" in self.check(model, [()])

    def test_too_little(self) -> None:
        net = filled(nn.Sequential(nn.Linear(4, 3)))
        data = [torch.randn(8, 4)]
        model = calibrated(net, data)
        text = self.check(model, [data[0][:1]])
        assert "expected data to give each channel 2 values or more, got 1 in 0" in text

    def test_values_that_are_not_finite(self, model: nn.Module) -> None:
        broken = [DATA[0], DATA[1] * float("nan")]
        text = self.check(model, broken)
        assert "expected the float model to compute finite values" in text
        assert "first" in text

    def test_a_weight_that_is_not_finite(self, model: Any) -> None:
        model.grouped.parametrizations.weight.original.data[0] = float("inf")
        assert "grouped" in self.check(model, DATA)

    def test_a_bias_of_two_layers(self) -> None:
        net: Any = filled(Several())
        net.shared.bias = net.first.bias
        text = self.check(calibrated(net, DATA), DATA)
        assert '"shared.bias" and "first.bias", which are one parameter' in text
        assert "by pattern" in text
        report = correct_bias(calibrated(net, DATA), DATA, pattern=["up.*", "fc.*"])
        assert [row.name for row in report.rows] == ["up", "fc"]

    def test_a_float_model(self) -> None:
        assert "call prepare_qat first" in self.check(filled(Several()), DATA)
        text = message(lambda: correct_bias(3, DATA), TypeError)  # type: ignore[arg-type]
        assert "correct_bias: expected model to be a torch.nn.Module" in text

    def test_a_model_that_is_not_calibrated(self) -> None:
        net = filled(Several())
        net.qconfig = INT4
        text = self.check(torch_ext.prepare_qat(net), DATA, RuntimeError)
        assert "expected every quantizer to have a range for VALIDATION" in text

    def test_layers_that_do_not_read_their_bias(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.weight, None if self.bias is None else self.bias * 2)

        class Without(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.weight)

        data = list(torch.randn(12, 4).split(4))
        model = calibrated(filled(nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))), data)
        report = correct_bias(model, data)
        assert [row.name for row in report.rows] == ["1"]
        assert report.left == {"0": "its forward does not read its bias as it is"}
        assert "left as it was: 0 (its forward does not read" in str(report)
        net = nn.Sequential(Without(4, 4, bias=False), nn.Linear(4, 4))
        text = self.check(calibrated(filled(net), data), data, RuntimeError)
        assert 'expected "0" to read the bias that it got' in text

    def test_a_forward_that_fails_at_last(self, model: nn.Module) -> None:
        before = snapshot(model)
        stopping = Stopping(26)  # of 3 * 3 + 6 * 3, in the last run over the data
        with pytest.raises(Interrupted):
            correct_bias(model, DATA, forward=stopping)
        assert same(snapshot(model), before)
