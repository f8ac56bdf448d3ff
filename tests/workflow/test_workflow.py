"""The whole path on a tiny net: from float to quantization-trained, in the steps users take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import TinyNet
from snapshots import same, snapshot
from torch_ext import (
    FakeQuantState,
    get_default_qconfig,
    load_observer_params,
    prepare_qat,
    resolve,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of horizontal, vertical and no stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    wave = torch.tensor([1.0, -1.0] * 4)
    kinds = torch.stack([wave[:, None].expand(8, 8), wave.expand(8, 8), torch.zeros(8, 8)])
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return kinds[labels].unsqueeze(1) + 0.7 * noise, labels


def train(model: nn.Module, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(steps):
        x, labels = stripes(64, 100 + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


def correct(model: nn.Module) -> float:
    model.eval()
    x, labels = stripes(500, 7)
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())


def batches() -> Iterator[Tensor]:
    for seed in range(8):
        yield stripes(16, seed)[0]


def test_eleven_steps() -> None:
    torch.manual_seed(0)
    # 1. the float model, with BatchNorm and Dropout
    model = TinyNet()
    train(model, 120, 2e-2)
    accuracy = correct(model)
    assert accuracy > 0.9
    # 2. qconfig and prepare
    keys = {"weight_qkwargs": {"dtype": "int4"}}
    model.qconfig = get_default_qconfig(activation_observer="percentile", **keys)  # type: ignore
    calibration_model = prepare_qat(model)
    # 3. and 4. observe; the float model's output, bit for bit
    set_fake_quantize(calibration_model, FakeQuantState.CALIBRATION)
    with torch.no_grad():
        for x in batches():
            assert torch.equal(calibration_model(x), model(x))
    # 5. and 6. no eval() between; other options without another pass
    set_fake_quantize(calibration_model, FakeQuantState.VALIDATION)
    for percentile in (50.0, 99.9):
        resolve(calibration_model, activation_observer="percentile", percentile=percentile)
        poor_to_good = correct(calibration_model)
    assert poor_to_good > 0.6
    # 7. and 8. anew from the float model, with another qconfig, and the calibrated parameters
    model.qconfig = get_default_qconfig(activation_observer="min_max", **keys)  # type: ignore
    qat_model = prepare_qat(model)
    before = snapshot(model)
    load_observer_params(calibration_model, qat_model)
    for name in ("conv1", "fc"):
        have = qat_model.get_submodule(f"{name}.input_quantizers.input")
        want = calibration_model.get_submodule(f"{name}.input_quantizers.input")
        assert torch.equal(have.scale, want.scale)  # type: ignore[arg-type]
    # 9. and 10. train
    set_fake_quantize(qat_model, FakeQuantState.QAT)
    train(qat_model, 60, 2e-3)
    # 11. evaluate
    set_fake_quantize(qat_model, FakeQuantState.VALIDATION)
    assert correct(qat_model) > accuracy - 0.05
    weight = qat_model.get_submodule("fc").weight
    assert isinstance(weight, Tensor)
    assert all(len(row.unique()) <= 16 for row in weight)
    assert same(snapshot(model), before)


def test_training_at_rate_zero_keeps_the_calibrated_accuracy() -> None:
    torch.manual_seed(0)
    model = torch_ext.fuse(TinyNet().eval())
    model.qconfig = get_default_qconfig(activation_observer="mse")  # type: ignore[assignment]
    calibrated = prepare_qat(model)
    torch_ext.calibrate(calibrated, batches())
    model.qconfig = get_default_qconfig(  # type: ignore[assignment]
        activation_qkwargs={"averaging_constant": 0.0}
    )
    qat = prepare_qat(model)
    load_observer_params(calibrated, qat)
    set_fake_quantize(qat, FakeQuantState.QAT)
    train(qat, 3, 0.0)
    set_fake_quantize(qat, FakeQuantState.VALIDATION)
    x = stripes(32, 3)[0]
    assert torch.equal(qat.eval()(x), calibrated.eval()(x))


def test_ranges_do_not_depend_on_how_data_is_split_or_ordered() -> None:
    model = TinyNet().eval()
    model.qconfig = get_default_qconfig(activation_observer="kl")  # type: ignore[assignment]
    x = torch.cat(list(batches()))
    seen: dict[str, Tensor] = {}
    probe = prepare_qat(model)
    set_fake_quantize(probe, FakeQuantState.CALIBRATION)
    for name, quantizer in probe.named_modules():
        if isinstance(quantizer, torch_ext.FakeQuantize) and not quantizer.transient:
            quantizer.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone())
            )
    probe(x)
    results = []
    straight = torch.arange(len(x))
    for order, size in ((straight, 128), (straight, 1), (torch.randperm(len(x)), 7)):
        fresh = prepare_qat(model)
        set_fake_quantize(fresh, FakeQuantState.CALIBRATION)
        for name, values in seen.items():
            for part in values[order].split(size):
                fresh.get_submodule(name)(part)
        set_fake_quantize(fresh, FakeQuantState.VALIDATION)
        results.append(snapshot(fresh))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
