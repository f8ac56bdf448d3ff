"""correct_bias: which corrections are kept, and runs that are interrupted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from corrections import (
    BOTH_WAYS,
    Interrupted,
    Normed,
    Several,
    Stopping,
    batches,
    calibrated,
    channel_means,
    depthwise,
    filled,
    interrupted_at_every_forward,
    message,
    output_error,
)
from snapshots import same, same_bits, snapshot

# Most tests are about the corrections, not about which of them are kept.
correct_bias = functools.partial(torch_ext.correct_bias, keep="all")
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches()


class TestCloser:
    """By default what does not bring the outputs closer is taken back."""

    @pytest.fixture
    def data(self) -> list[Tensor]:
        """Mostly a constant, whose rounding error is the mean error of what reads it."""
        found = batches()
        for batch in found:
            batch[..., : batch.shape[-1] * 3 // 4] = 0.37
        return found

    @BOTH_WAYS
    def test_no_correction_makes_the_outputs_worse(
        self, data: list[Tensor], captured: bool
    ) -> None:
        net = filled(depthwise())
        given = calibrated(net, data, captured=captured)
        every, closer = copy.deepcopy(given), copy.deepcopy(given)
        correct_bias(every, data)
        report = torch_ext.correct_bias(closer, data)
        errors = [output_error(net, model, data) for model in (given, every, closer)]
        assert errors[2] < min(errors[:2])
        assert report.before == pytest.approx(errors[0], rel=1e-6)
        assert report.after == pytest.approx(errors[2], rel=1e-6)
        assert {row.kept for row in report.rows} == {True, False}

    def test_each_was_kept_for_what_it_gives(self, data: list[Tensor]) -> None:
        """Against a loop of the test's own, which takes means by hooks."""
        net = filled(depthwise())
        model = calibrated(net, data)
        own = copy.deepcopy(model)
        counting = Stopping(1000)
        report = torch_ext.correct_bias(model, data, forward=counting)
        assert counting.calls == (3 + len(report.rows)) * len(data)
        want = channel_means(net, data)
        for row in report.rows:
            tried = copy.deepcopy(own)
            layer = tried.get_submodule(row.name)
            shift = want[row.name] - channel_means(own, data)[row.name]
            before = 0.0 if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter((before + shift).float())
            closer = output_error(net, tried, data) < output_error(net, own, data)
            assert row.kept == closer == (row.shift > 0), row.name
            own = tried if closer else own
        torch.testing.assert_close(model(data[0]), own(data[0]))

    def test_a_bias_that_was_created_in_vain_is_gone(self, data: list[Tensor]) -> None:
        net = filled(Normed())
        model = calibrated(net, data)
        report = torch_ext.correct_bias(model, data)
        for row in report.rows:
            bias = model.get_submodule(row.name).bias
            was = net.get_submodule(row.name).bias
            assert row.created == (was is None and row.kept)
            if not row.kept:
                assert (bias is None) == (was is None)
                assert was is None or same_bits(bias, was)

    def test_an_interrupted_run_goes_on(self, tmp_path: Path, data: list[Tensor]) -> None:
        """Also behind layers whose correction was taken back, by the bits."""
        net, data, path = filled(depthwise()), data[:1], tmp_path / "run.safetensors"
        whole, model = calibrated(net, data), calibrated(net, data)
        want = torch_ext.correct_bias(whole, data)
        report, _ = interrupted_at_every_forward(
            model,
            lambda forward: torch_ext.correct_bias(model, data, forward=forward, checkpoint=path),
        )
        assert not all(row.kept for row in want.rows)
        assert same(snapshot(model), snapshot(whole))
        assert report == want

    def test_an_unknown_name(self) -> None:
        model = calibrated(filled(depthwise()), DATA)
        before = snapshot(model)
        text = message(lambda: torch_ext.correct_bias(model, DATA, keep="best"))  # type: ignore[arg-type]
        assert text == "correct_bias: unknown keep 'best'; known: closer, all"
        assert same(snapshot(model), before)


@pytest.mark.parametrize("keep", ["all", "closer"])
@pytest.mark.parametrize("data", [DATA, [torch.cat(DATA)]], ids=["several", "one batch"])
def test_an_interrupted_run_goes_on(tmp_path: Path, data: list[Tensor], keep: Any) -> None:
    """At every forward once; the result has the bits of a run without interruptions."""
    net = filled(Several())
    whole = calibrated(net, data)
    want = correct_bias(whole, data, keep=keep)
    path = tmp_path / "run.safetensors"
    model = calibrated(net, data)
    report, interruptions = interrupted_at_every_forward(
        model,
        lambda forward: correct_bias(model, data, keep=keep, forward=forward, checkpoint=path),
    )
    assert interruptions > 3
    assert same(snapshot(model), snapshot(whole))
    assert report == want
    assert not path.exists()


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    net = filled(Several())
    model, path = calibrated(net, DATA), tmp_path / "run.safetensors"
    with pytest.raises(Interrupted):
        correct_bias(model, DATA, forward=Stopping(11), checkpoint=path)
    content = path.read_bytes()
    before = snapshot(model)
    other = batches(seed=9)
    calls: list[Callable[[], object]] = [
        lambda: correct_bias(model, other, checkpoint=path),
        lambda: correct_bias(model, DATA, checkpoint=path, pattern="fc.*"),
        lambda: torch_ext.recalibrate_norms(model, DATA, checkpoint=path),
    ]
    for call in calls:
        text = message(call, torch_ext.FileError)
        assert "another model, other data" in text or "kind: expected" in text
        assert same(snapshot(model), before)
    path.write_bytes(content[:-3])
    message(lambda: correct_bias(model, DATA, checkpoint=path), torch_ext.FileError)
    assert same(snapshot(model), before)
