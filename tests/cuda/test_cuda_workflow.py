"""The workflow where devices meet: models, statistics and files go from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from devices import assert_same_bits
from nets.exact_net import RULES, batch, exact_net, prepared, ready_for
from sample_data import sample
from statistic_tensors import observed
from torch_ext import FakeQuantState, load_observer_params, save_observer_params, set_fake_quantize

BATCHES = [batch(seed) for seed in range(8)]
STATISTICS = "observer."


def calibrated(rule: str, where: torch.device | str, **keys: Any) -> nn.Module:
    model = prepared(rule, where)
    torch_ext.calibrate(model, BATCHES, progress=False, **keys)
    return model


@pytest.mark.parametrize("rule", RULES)
def test_calibrate(rule: str, device: torch.device):
    """The loader's batches lie on the CPU."""
    here, there = calibrated(rule, "cpu"), calibrated(rule, device)
    assert_same_bits(there.state_dict(), here.state_dict())
    assert_same_bits(there(BATCHES[0].to(device)), here(BATCHES[0]))


@pytest.mark.parametrize("state", list(FakeQuantState), ids=lambda s: s.value)
def test_model_moves_in_any_state(state: FakeQuantState, device: torch.device):
    here, moving = ready_for(state, "mse", "cpu"), ready_for(state, "mse", "cpu")
    for where in (device, torch.device("cpu"), device):
        moving.to(where)
        assert {t.device for t in moving.state_dict().values()} == {where}
        assert_same_bits(moving(BATCHES[1].to(where)), here(BATCHES[1]), where)
        assert_same_bits(moving.state_dict(), here.state_dict(), where)


def test_moving_and_casting_at_once_keeps_the_statistics(device: torch.device):
    model = calibrated("percentile", "cpu")
    want = {k: v.clone() for k, v in model.state_dict().items() if STATISTICS in k}
    model.to(device, torch.float16)
    have = {k: v for k, v in model.state_dict().items() if STATISTICS in k}
    assert_same_bits(have, want)
    assert model(BATCHES[0].to(device).half()).dtype == torch.float16


@pytest.mark.parametrize("rule", RULES)
def test_state_dict_loads_on_the_other_device(rule: str, tmp_path: Path, device: torch.device):
    for start, end in ((device, torch.device("cpu")), (torch.device("cpu"), device)):
        source, target = calibrated(rule, start), prepared(rule, end)
        set_fake_quantize(target, "validation", allow_unobserved=True)
        torch.save(source.state_dict(), tmp_path / "model.pt")
        for state in (source.state_dict(), torch.load(tmp_path / "model.pt", map_location=end)):
            target.load_state_dict(state)
            assert {t.device for t in target.state_dict().values()} == {end}
            assert_same_bits(target.state_dict(), source.state_dict())
            assert_same_bits(target(BATCHES[2].to(end)), source(BATCHES[2].to(start)))


@pytest.mark.parametrize("rule", RULES)
def test_observer_params_go_across(rule: str, tmp_path: Path, device: torch.device):
    here, there = calibrated(rule, "cpu"), calibrated(rule, device)
    files = [tmp_path / "here", tmp_path / "there"]
    save_observer_params(here, files[0])
    save_observer_params(there, files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    for source in (here, there, files[0]):
        for where in ("cpu", device):
            target = prepared(rule, where)
            assert load_observer_params(source, target).complete
            set_fake_quantize(target, "validation")
            assert_same_bits(target.state_dict(), here.state_dict())


def test_params_for_another_grid_and_other_channels_go_across(device: torch.device):
    """Computed anew, on the device of the source."""
    here, there = calibrated("mse", "cpu"), calibrated("mse", device)
    results = []
    for source, where in ((here, "cpu"), (there, device), (here, device), (there, "cpu")):
        target = _with_uint8_activations(where)
        load_observer_params(source, target)
        set_fake_quantize(target, "validation")
        results.append(target.state_dict())
    for result in results[1:]:
        assert_same_bits(result, results[0])


def _with_uint8_activations(where: torch.device | str) -> nn.Module:
    net = exact_net().to(where)
    net.qconfig = torch_ext.get_default_qconfig(  # type: ignore[assignment]
        activation_observer="mse",
        activation_qkwargs={"dtype": "uint8", "qscheme": torch.per_tensor_affine},
        weight_qkwargs={"qscheme": torch.per_tensor_symmetric},
    )
    return torch_ext.prepare_qat(net)


def test_resolve(device: torch.device):
    here, there = calibrated("percentile", "cpu"), calibrated("percentile", device)
    for rule in RULES:
        if rule == "fixed_scale":
            continue
        for model in (here, there):
            torch_ext.resolve(model, activation_observer=rule, weight_observer="mse")
        assert_same_bits(there.state_dict(), here.state_dict(), rule)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("to_device", [True, False])
def test_calibration_resumes_on_the_other_device(
    to_device: bool, tmp_path: Path, device: torch.device
):
    want = calibrated("percentile", "cpu")
    start, end = ("cpu", device) if to_device else (device, "cpu")

    def loader() -> Any:
        yield from BATCHES[:5]
        raise Stopped

    keys: dict[str, Any] = {"checkpoint": tmp_path / "statistics", "every": 2}
    with pytest.raises(Stopped):
        torch_ext.calibrate(prepared("percentile", start), loader(), progress=False, **keys)
    resumed = prepared("percentile", end)
    summary = torch_ext.calibrate(resumed, BATCHES, progress=False, **keys)
    assert summary.resumed_from == 4
    assert_same_bits(resumed.state_dict(), want.state_dict())


def test_half_of_the_batches_on_each_device(device: torch.device):
    """Merged observer by observer, then solved."""
    models = [prepared("percentile", where) for where in ("cpu", device, "cpu")]
    for model in models:
        set_fake_quantize(model, "calibration")
    with torch.no_grad():
        for i, values in enumerate(BATCHES):
            models[i % 2](values.to(device if i % 2 else "cpu"))
            models[2](values)
    for name, module in models[1].named_modules():
        if isinstance(module, torch_ext.Observer) and not module.transient:
            other = models[0].get_submodule(name)
            assert isinstance(other, torch_ext.Observer)
            module.merge_(other)
    for model in models:
        set_fake_quantize(model, "validation")
    assert_same_bits(models[1].state_dict(), models[2].state_dict())


def test_summary_and_description_read_the_device(device: torch.device):
    model = prepared("percentile", device)
    summary = torch_ext.calibrate(model, BATCHES, progress=False)
    want = torch_ext.calibrate(prepared("percentile", "cpu"), BATCHES, progress=False)
    assert summary.quantizers == want.quantizers
    assert str(torch_ext.describe(model)) == str(
        torch_ext.describe(calibrated("percentile", "cpu"))
    )


def test_a_statistic_that_contradicts_itself_is_named_when_it_is_solved(device: torch.device):
    """On the device the solve gives NaN; leaving CALIBRATION waits for it anyway, and looks."""
    model = prepared("percentile", device)
    set_fake_quantize(model, "calibration")
    model(BATCHES[0].to(device))
    quantizer = model.get_submodule("second.input_quantizers.input")
    assert isinstance(quantizer, torch_ext.FakeQuantize)
    quantizer.observer.counts.neg_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"solve: expected .*counts"):
        set_fake_quantize(model, "validation")
    assert_same_bits(model.state_dict(), before)
    assert quantizer.state is FakeQuantState.CALIBRATION


def test_default_device(device: torch.device):
    """A new quantizer lies where Torch's default says, and works there."""
    with torch.device(device):
        observer = torch_ext.Observer("mse")
    assert observer.extrema.device == device
    x = sample("gauss", 1000)
    observer(x.to(device))
    assert_same_bits([observer.extrema, observer.tally, observer.counts], list(observed(x)))
