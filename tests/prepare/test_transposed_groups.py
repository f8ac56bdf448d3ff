"""Transposed convolutions with groups have one scale for each of their output channels."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    calibrate,
    export,
    float_state_dict,
    get_default_qconfig,
    load_float_state_dict,
    load_observer_params,
    named_quantizers,
    prepare_qat,
    remove_quantizers,
    save_observer_params,
    set_fake_quantize,
)

LAYERS: dict[str, Any] = {
    "1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    "depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
    "3d": lambda: nn.ConvTranspose3d(6, 3, 2, groups=3),
    "no groups": lambda: nn.ConvTranspose2d(4, 6, 3),
}


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = LAYERS[name]()
    with torch.no_grad():  # so that channels and groups differ much
        weight = made.weight
        assert isinstance(weight, Tensor)
        weight.mul_(torch.rand(weight.shape[:2]).mul(8).exp()[(..., *[None] * (weight.dim() - 2))])
    return made


def data(made: nn.Module) -> Tensor:
    sizes = (5,) * (made.weight.dim() - 2)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, made.in_channels, *sizes, generator=generator)


def prepared(made: nn.Module, **keys: Any) -> nn.Sequential:
    net = nn.Sequential(made)
    weight = get_default_qconfig(weight_qkwargs={"dtype": "int4", "quant_min": -7, **keys}).weight
    net.qconfig = torch_ext.QConfig(activation=None, weight=weight)
    return prepare_qat(net)


def weight_quantizer(net: nn.Module) -> FakeQuantize:
    (quantizer,) = (q for q in named_quantizers(net).values() if q.transient)
    return quantizer


def by_hand(made: nn.Module) -> tuple[Tensor, Tensor]:
    """The scale of each output channel, and the weight quantized with them, by loops."""
    weight = made.weight.detach()
    ins, outs = made.in_channels // made.groups, made.out_channels // made.groups
    scales, result = torch.empty(made.out_channels), weight.clone()
    for group in range(made.groups):
        rows = slice(group * ins, (group + 1) * ins)
        for j in range(outs):
            values = weight[rows, j]
            scale = (values.double().abs().max() / 7).float()
            result[rows, j] = (values / scale).round().clamp(-7, 7) * scale
            scales[group * outs + j] = scale
    return scales, result


@pytest.mark.parametrize("name", LAYERS)
def test_one_scale_per_output_channel(name: str) -> None:
    made = layer(name)
    net = prepared(made)
    assert same_bits(net(data(made)).detach(), made(data(made)).detach())  # in FLOAT
    set_fake_quantize(net, "validation")
    scales, weight = by_hand(made)
    assert same_bits(weight_quantizer(net).scale, scales)
    assert torch.equal(net[0].weight, weight)
    quantized = copy.deepcopy(made)
    quantized.weight.data.copy_(weight)
    assert same_bits(net(data(made)).detach(), quantized(data(made)).detach())


@pytest.mark.parametrize("name", LAYERS)
def test_training_and_gradients(name: str) -> None:
    made = layer(name)
    net = prepared(made)
    set_fake_quantize(net, "qat")
    net(data(made)).square().sum().backward()
    other = copy.deepcopy(made)
    other.weight.data.copy_(by_hand(made)[1])
    other(data(made)).square().sum().backward()
    got = net[0].parametrizations.weight.original.grad
    assert torch.allclose(got, other.weight.grad)  # straight through: nothing is clipped


def test_one_scale_for_all_needs_no_rearranging() -> None:
    for keys in ({"qscheme": torch.per_tensor_symmetric}, {"qscheme": torch.per_tensor_affine}):
        net = prepared(layer("2d"), **keys)
        assert list(named_quantizers(net)) == ["0.parametrizations.weight.0"]
        set_fake_quantize(net, "validation")
        assert bool(net(data(net[0])).isfinite().all())


def test_copies_pickles_float_keys_and_removal() -> None:
    made = layer("2d")
    net = prepared(made)
    set_fake_quantize(net, "validation")
    want = net(data(made)).detach()
    assert same_bits(copy.deepcopy(net)(data(made)).detach(), want)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=False)(data(made)).detach(), want)
    assert set(float_state_dict(net)) == {"0.weight", "0.bias"}
    load_float_state_dict(net, {key: value * 2 for key, value in float_state_dict(net).items()})
    assert same_bits(weight_quantizer(net).scale, by_hand(made)[0] * 2)
    removed = remove_quantizers(net)
    assert type(removed[0]) is type(made)
    assert torch.equal(removed[0].weight, made.weight * 2)


def test_files_have_the_scales_of_the_output_channels(tmp_path: Path) -> None:
    source, target = prepared(layer("2d")), prepared(layer("2d"))
    set_fake_quantize(source, "validation")
    path = tmp_path / "params.safetensors"
    save_observer_params(source, path)
    assert load_observer_params(path, target, verbose=False).complete
    assert same_bits(weight_quantizer(target).scale, by_hand(layer("2d"))[0])


@pytest.mark.parametrize("quantized_weights", [False, True])
@pytest.mark.parametrize("name", ["2d", "depthwise"])
def test_onnx_computes_what_validation_does(
    name: str, quantized_weights: bool, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    made = layer(name).eval()
    net = prepared(made)
    set_fake_quantize(net, "validation")
    path = tmp_path / "model.onnx"
    export.onnx(net, data(made), path, quantized_weights=quantized_weights)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: data(made).numpy()})
    want = net(data(made)).detach()
    assert torch.allclose(
        torch.from_numpy(out), want, rtol=1e-5, atol=1e-5 * float(want.abs().max())
    )


def test_formats_that_have_no_such_scales_raise_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)).eval()
    net.qconfig = get_default_qconfig(
        activation_qkwargs={"quant_min": -127}, weight_qkwargs={"quant_min": -127}
    )
    x = torch.randn(2, 4, 5, 5)
    model = prepare_qat(net, example_inputs=x)
    calibrate(model, [x])
    name = "0.parametrizations.weight.1"
    with pytest.raises(ValueError, match=f"{name}/quantized: it is per channel"):
        export.onnx(model, x, tmp_path / "model.onnx", profile="tensorrt")
    with pytest.raises(ValueError, match=f"{name}: it is of a layer that has no row"):
        export.ncnn_table(model, x, tmp_path / "model.table")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_folded_batch_norm_scales_output_channels(groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        net[1].running_var.copy_(torch.rand(6) * 20 + 0.1)
        net[1].weight.copy_(torch.rand(6) + 0.5)
    net.qconfig = get_default_qconfig()
    x = torch.randn(2, 4, 5, 5)
    apart = prepare_qat(net, example_inputs=x, fold_batch_norms=True)
    fused = prepare_qat(torch_ext.fuse(net), example_inputs=x)
    for model in (apart, fused):
        calibrate(model, [x])
    scales = weight_quantizer(apart).scale
    assert scales.shape == (6,)
    assert torch.allclose(scales, weight_quantizer(fused).scale, rtol=1e-5)
    assert torch.allclose(apart(x), fused(x), atol=1e-4)
