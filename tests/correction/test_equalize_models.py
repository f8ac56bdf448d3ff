"""equalize: architectures that other people wrote, prepared models, and what it is for."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from batch_norms import shake
from nets.architectures import architecture
from nets.equalizable import uneven
from torch_ext import (
    FakeQuantState,
    calibrate,
    equalize,
    export,
    fake_quantize_states,
    fuse,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def distance(have: Tensor, want: Tensor) -> float:
    return float((have - want).norm() / want.norm())


# Name -> how many values are scaled, without and with data.
MODELS = {
    "resnet18": (8, 8),
    "mobilenet_v2": (37, 37),
    "mobilenet_v3_small": (15, 15),
    "efficientnet_lite0": (35, 35),
    "vit_b_16": (0, 25),
    "convnext_atto": (0, 16),
    "swin": (0, 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures_compute_the_same(name: str) -> None:
    model, x = architecture(name)
    model, x = shake(model).double().eval(), x.double()
    want = model(x)
    for data, count in zip((None, [x]), MODELS[name], strict=True):
        net = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = equalize(net, x, data, clipped="scale")
        assert len(result.rows) == count, result
        assert distance(net(x), want) < 1e-9


def imbalanced() -> tuple[nn.Module, nn.Module]:
    """A net of depthwise and pointwise layers, and one that computes the same, with channels that
    differ by up to 10^3."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3)]
    for _ in range(2):
        layers += [nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1)]
    even = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(16, 5, 1))
    other = copy.deepcopy(even)
    with torch.no_grad():
        for first, last in itertools.pairwise(other[::2]):
            assert isinstance(first, nn.Conv2d)
            assert isinstance(last, nn.Conv2d)
            assert first.bias is not None
            factors = 10 ** (3 * torch.rand(16) - 1.5)
            first.weight *= factors.view(-1, 1, 1, 1)
            first.bias *= factors
            last.weight /= factors.view((-1, 1, 1, 1) if last.groups > 1 else (1, -1, 1, 1))
    return even, other


def weight_error(model: nn.Module, x: Tensor) -> float:
    """Of the outputs with weights on 8 bits per tensor, by this test's own rounding."""
    net = copy.deepcopy(model)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                step = layer.weight.abs().max() / 127
                layer.weight.copy_((layer.weight / step).round() * step)
    return distance(net(x), model(x))


def test_a_scale_per_tensor_loses_less_by_an_order() -> None:
    (even, model), x = imbalanced(), torch.randn(8, 3, 16, 16)
    before, want = weight_error(model, x), model(x)
    equalize(model, x[:1])
    assert distance(model(x), want) < 1e-5
    assert weight_error(model, x) < before / 10
    assert weight_error(model, x) < 2 * weight_error(even, x)


@pytest.mark.parametrize("example", [True, False])
def test_a_prepared_model_is_calibrated_again(example: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 1)
    )
    net = uneven(net, 2).float()
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    x = torch.rand(8, 3, 12, 12)
    model = prepare_qat(net, example_inputs=x[:1] if example else None)
    calibrate(model, x.split(4))
    want, keys = net(x), list(model.state_dict())
    result = equalize(model, x[:1])
    assert [row.name for row in result.rows] == ["0"]
    assert set(fake_quantize_states(model).values()) == {FakeQuantState.FLOAT}
    assert list(model.state_dict()) == keys
    assert distance(model(x), want) < 1e-5
    quantizers = named_quantizers(model)
    fresh = {name for name, quantizer in quantizers.items() if not bool(quantizer.solved)}
    assert set(result.stale) == fresh
    changed = {"0.parametrizations.weight.0", "2.parametrizations.weight.0"}
    assert changed < fresh < set(quantizers)
    assert any("activation" in name or "input" in name for name in fresh)
    with pytest.raises(RuntimeError, match="expected every quantizer to have a range"):
        set_fake_quantize(model, "validation")
    calibrate(model, x.split(4))
    assert distance(model(x), want) < 0.1
    twin = prepare_qat(uneven_copy(net, x), example_inputs=x[:1] if example else None)
    calibrate(twin, x.split(4))
    assert twin(x).equal(model(x))


def uneven_copy(net: nn.Module, x: Tensor) -> nn.Module:
    made = copy.deepcopy(net)
    equalize(made, x[:1])
    return made


def test_weights_quantized_as_folded() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    net = uneven(net).float()
    net.qconfig = get_default_qconfig(backend="ncnn")  # type: ignore[assignment]
    x = torch.rand(8, 3, 12, 12)
    model = prepare_qat(net, example_inputs=x, fold_batch_norms=True)
    calibrate(model, [x])
    result = equalize(model, x)
    assert [row.name for row in result.rows] == ["0", "3"]
    assert distance(model(x), net(x)) < 1e-5
    calibrate(model, [x])
    folded = fuse(net, example_inputs=x)
    folded.qconfig = net.qconfig
    equalize(folded, x)
    folded = prepare_qat(folded, example_inputs=x)
    calibrate(folded, [x])
    assert distance(model(x), folded(x)) < 0.02


def test_the_result_is_exported(tmp_path: object) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: run `make test`")
    net = uneven(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.ReLU()), 2
    ).float()
    x = torch.rand(4, 3, 12, 12)
    equalize(net, x, clipped="scale")
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    model = prepare_qat(net, example_inputs=x)
    calibrate(model, [x])
    path = f"{tmp_path}/net.onnx"
    export.onnx(model, x, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    made = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert distance(torch.from_numpy(made), model(x)) < 1e-3
