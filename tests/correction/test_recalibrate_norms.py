"""recalibrate_norms: each norm has the mean and variance of what it reads, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from corrections import (
    INT4,
    Interrupted,
    Normed,
    Stopping,
    batches,
    calibrated,
    depthwise,
    filled,
    interrupted_at_every_forward,
    output_error,
    seen_by_hooks,
)
from snapshots import same, snapshot
from torch_ext import recalibrate_norms

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches()


def check_statistics(model: nn.Module, data: list[Tensor]) -> None:
    """Against numpy in float64, on what forward hooks see."""
    for name, read in seen_by_hooks(model, data, (nn.BatchNorm2d,), inputs=True).items():
        x = torch.cat(read).double().transpose(0, 1).flatten(1).numpy()
        norm: Any = model.get_submodule(name)
        want = torch.from_numpy(x.mean(1)), torch.from_numpy(x.var(1, ddof=1))
        torch.testing.assert_close(norm.running_mean.double(), want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), want[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("data", [DATA, [torch.cat(DATA)]], ids=["several", "one batch"])
def test_statistics_are_those_of_what_norms_read(data: list[Tensor], captured: bool) -> None:
    net = filled(Normed())
    recalibrate_by_hand(net, data)
    model = calibrated(net, data, captured=captured)
    before = snapshot(model)
    report = recalibrate_norms(model, data)
    check_statistics(model, data)
    after = snapshot(model)
    changed = {key for key in after if not same({key: after[key]}, {key: before[key]})}
    assert changed == {f"bn{i}.running_{of}" for i in (1, 2, 3) for of in ("mean", "var")}
    assert [row.name for row in report.rows] == ["bn1", "bn2", "bn3"]
    assert all(row.shift > 0 and row.least_ratio < row.greatest_ratio for row in report.rows)
    assert report.after == pytest.approx(output_error(net, model, data), rel=1e-6)
    assert report.after < report.before
    assert "3 norms; relative squared error of the outputs" in str(report)


def recalibrate_by_hand(net: nn.Module, data: list[Tensor]) -> None:
    """Norms of a float net as after training: their statistics are those of the data."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        net.train()(torch.cat(data))
    net.eval()


def test_batches_do_not_matter() -> None:
    models = [calibrated(filled(Normed()), DATA) for _ in range(2)]
    recalibrate_norms(models[0], DATA)
    recalibrate_norms(models[1], [torch.cat(DATA)[:5], torch.cat(DATA)[5:]])
    left, right = (m.state_dict() for m in models)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", [torch.per_channel_symmetric, torch.per_tensor_symmetric])
def test_norms_that_weights_are_quantized_with(scheme: torch.qscheme) -> None:
    """Their factor changes, so the weights' ranges are solved again."""
    config = torch_ext.get_default_qconfig(weight_qkwargs={"dtype": "int4", "qscheme": scheme})
    model: Any = calibrated(filled(Normed()), DATA, config, fold_batch_norms=True)
    recalibrate_norms(model, DATA)
    quantizer = model.conv2.parametrizations.weight[1]
    factor = model.bn2.weight / (model.bn2.running_var + model.bn2.eps).sqrt()
    folded = model.conv2.parametrizations.weight.original * factor.view(-1, 1, 1, 1)
    largest = folded.abs().flatten(1).amax(1)
    want = largest if len(quantizer.range) > 1 else largest.max()[None]
    torch.testing.assert_close(quantizer.scale, 2 * want / 15, rtol=1e-5, atol=0)
    before = snapshot(model)
    torch_ext.set_fake_quantize(model, "validation")  # has nothing to solve any more
    assert same(snapshot(model), before)


def test_norms_folded_into_rounded_weights_are_refused() -> None:
    """Their factor would take the weights off the grid that the quantizers hold."""
    model = calibrated(filled(Normed()), DATA, fold_batch_norms=True)
    torch_ext.reconstruct(model, DATA, pattern="conv2.*", progress=False)
    before = snapshot(model)
    want = (
        "recalibrate_norms: expected norms whose layer's weight was not rounded by reconstruct, "
        "got bn2; recalibrate before reconstruct, or leave them out by pattern"
    )
    for pattern in (None, "bn2"):
        with pytest.raises(RuntimeError, match=f"^{want}$"):
            recalibrate_norms(model, DATA, pattern=pattern)
        assert same(snapshot(model), before)
    rows = recalibrate_norms(model, DATA, pattern=["bn1", "bn3"]).rows
    assert [row.name for row in rows] == ["bn1", "bn3"]


def test_chosen_norms() -> None:
    model = calibrated(filled(Normed()), DATA)
    before = snapshot(model)
    report = recalibrate_norms(model, DATA, pattern=["bn3"])
    assert [row.name for row in report.rows] == ["bn3"]
    after = snapshot(model)
    changed = {key for key in after if not same({key: after[key]}, {key: before[key]})}
    assert changed == {"bn3.running_mean", "bn3.running_var"}


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole, model = (calibrated(filled(Normed()), DATA, fold_batch_norms=True) for _ in range(2))
    want = recalibrate_norms(whole, DATA)
    path = tmp_path / "run.safetensors"
    report, interruptions = interrupted_at_every_forward(
        model, lambda forward: recalibrate_norms(model, DATA, forward=forward, checkpoint=path)
    )
    assert interruptions > 8
    assert report == want
    assert same(snapshot(model), snapshot(whole))
    assert not path.exists()


class TestBadInput:
    def check(
        self, model: nn.Module, data: Any, error: type[Exception] = ValueError, **keys: Any
    ) -> str:
        before = snapshot(model)
        with pytest.raises(error) as caught:
            recalibrate_norms(model, data, **keys)
        assert str(caught.value).startswith("recalibrate_norms: ")
        assert same(snapshot(model), before)
        return str(caught.value)

    def test_no_norms(self) -> None:
        fused = torch_ext.fuse(filled(Normed()), example_inputs=DATA[0])
        for net in (fused, depthwise(1)):
            text = self.check(calibrated(net, DATA), DATA)
            assert "batch norms with running statistics, got none: fuse folds them" in text
            assert "correct_bias" in text

    def test_data(self) -> None:
        model = calibrated(filled(Normed()), DATA)
        assert "got none" in self.check(model, [])
        assert "run over again" in self.check(model, iter(DATA), TypeError)
        assert "finite" in self.check(model, [DATA[0] / 0])
        assert 'no norm matches pattern "conv*"; known: bn1' in self.check(
            model, DATA, pattern="conv*"
        )

    def test_too_little(self) -> None:
        net = filled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        data = list(torch.randn(8, 4).split(4))
        model = calibrated(net, data)
        text = self.check(model, [data[0][:1]])
        assert "expected data to give each channel 2 values or more, got 1 in 1" in text

    def test_models(self) -> None:
        assert "call prepare_qat first" in self.check(filled(Normed()), DATA)
        net = filled(Normed())
        net.qconfig = INT4
        text = self.check(torch_ext.prepare_qat(net), DATA, RuntimeError)
        assert "have a range for VALIDATION" in text

    @pytest.mark.parametrize("count", [7, 12, 18])
    def test_a_forward_that_fails(self, count: int) -> None:
        model = calibrated(filled(Normed()), DATA, fold_batch_norms=True)
        before = snapshot(model)
        with pytest.raises(Interrupted):
            recalibrate_norms(model, DATA, forward=Stopping(count - 1))
        assert same(snapshot(model), before)


def test_callable_in_any_order_with_correct_bias() -> None:
    """After both, means are right at the norms, and the statistics are those of the last."""
    model = calibrated(filled(Normed()), DATA)
    torch_ext.correct_bias(model, DATA)
    recalibrate_norms(model, DATA)
    check_statistics(model, DATA)
    steps: list[Callable[[], object]] = [lambda: torch_ext.describe(model), lambda: str(model)]
    assert all(step() for step in steps)
