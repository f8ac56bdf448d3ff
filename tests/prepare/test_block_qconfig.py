"""The QConfigs of the formats in blocks: MX and NVFP4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from block_values import Quantize, floats, in_groups, mxint8, nvfp4
from torch_ext import (
    calibrate,
    get_block_qconfig,
    load_observer_params,
    named_quantizers,
    prepare_qat,
    save_observer_params,
    set_fake_quantize,
)
from training import losses_of

FLOATS = {
    "mxfp8_e4m3": "float8_e4m3",
    "mxfp8_e5m2": "float8_e5m2",
    "mxfp6_e2m3": "float6_e2m3",
    "mxfp6_e3m2": "float6_e3m2",
    "mxfp4": "float4_e2m1",
}
MX: dict[tuple[str, str | None], Quantize] = {
    **{(name, None): floats(dtype, "floor") for name, dtype in FLOATS.items()},
    **{(name, "ceil"): floats(dtype, "ceil") for name, dtype in FLOATS.items()},
    ("mxint8", "floor"): mxint8,
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))


def plain(net: nn.Module, x: Tensor, quantize: Quantize, group: int) -> Tensor:
    for layer in net:
        if isinstance(layer, nn.Linear):
            weight = in_groups(layer.weight, quantize, -1, group)
            x = F.linear(in_groups(x, quantize, -1, group), weight, layer.bias)
        else:
            x = layer(x)
    return x


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("case", MX, ids=str)
def test_mx(case: tuple[str, Any], with_example: bool) -> None:
    """Weights and inputs in blocks of 32 along the sums, without a calibration."""
    net, x = mlp(), torch.randn(5, 64) * 10
    net.qconfig = get_block_qconfig(*case)
    model = prepare_qat(net, example_inputs=x if with_example else None)
    set_fake_quantize(model, "validation")
    assert torch.equal(model(x), plain(net, x, MX[case], 32))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
def test_equals_torchaos_mx(name: str, rule: Any) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    kinds = {"float6_e2m3": "fp6_e2m3", "float6_e3m2": "fp6_e3m2", "float8_e5m2": "float8_e5m2"}
    kinds |= {"float8_e4m3": "float8_e4m3fn", "float4_e2m1": "float4_e2m1fn_x2"}
    kind = kinds[FLOATS[name]]
    kind = getattr(torch, kind, kind)
    mode = mx.ScaleCalculationMode[{"ceil": "RCEIL"}.get(rule, rule.upper())]

    def quantize(rows: Tensor) -> Tensor:
        scale, codes = mx.to_mx(rows.float(), kind, 32, mode)
        return mx.to_dtype(codes, scale, kind, 32, torch.float32).double()

    net, x = mlp(), torch.randn(5, 64) * 10
    net.qconfig = get_block_qconfig(name, rule)  # type: ignore[arg-type]
    model = prepare_qat(net)
    set_fake_quantize(model, "validation")
    assert torch.equal(model(x), plain(net, x, quantize, 32))


@pytest.mark.parametrize("observer", ["min_max", "percentile"])
def test_nvfp4(observer: Any) -> None:
    """Both factors have a scale of the tensor: a calibrated one, and the weight's own."""
    net, x = mlp(), torch.randn(50, 64)
    net.qconfig = get_block_qconfig("nvfp4", activation_observer=observer)
    model = prepare_qat(net)
    with pytest.raises(RuntimeError, match="expected every quantizer to have a range"):
        set_fake_quantize(model, "validation")
    calibrate(model, [x])
    quantizers = named_quantizers(model)
    want = x
    for i, layer in enumerate(net):
        if isinstance(layer, nn.Linear):
            scale = quantizers[f"{i}.input_quantizers.input"].scale
            own = (layer.weight.abs().max() / 2688).view(1)
            assert torch.equal(quantizers[f"{i}.parametrizations.weight.0"].scale, own)
            weight = in_groups(layer.weight, nvfp4(own), -1, 16)
            want = F.linear(in_groups(want, nvfp4(scale), -1, 16), weight, layer.bias)
        else:
            want = layer(want)
    assert torch.equal(model(x), want)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2)  # type: ignore[union-attr]
    set_fake_quantize(model, "validation")
    own = (2 * net[0].weight.abs().max() / 2688).view(1)
    assert torch.equal(quantizers["0.parametrizations.weight.0"].scale, own)


@pytest.mark.parametrize("format", ["mxfp8_e4m3", "mxfp4", "nvfp4"])
def test_training_and_files(format: Any, tmp_path: Path) -> None:
    """The loss falls; a file gives the model back; and so does a state dict."""
    torch.manual_seed(1)
    net, x = mlp(), torch.randn(64, 64)
    target = torch.randn(64, 32)
    net.qconfig = get_block_qconfig(format)
    model = prepare_qat(net, example_inputs=x)
    set_fake_quantize(model, "qat")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = losses_of(model, x, target, optimizer, 20)
    assert losses[-1] < 0.9 * losses[0]
    set_fake_quantize(model, "validation")
    out = model(x)
    path = tmp_path / "net.safetensors"
    save_observer_params(model, path)
    fresh = prepare_qat(net, example_inputs=x)
    load_observer_params(model, fresh, weights=True, verbose=False)
    report = load_observer_params(path, fresh, verbose=False)
    assert report.complete
    set_fake_quantize(fresh, "validation")
    assert torch.equal(fresh(x), out)
    other = prepare_qat(net, example_inputs=x)
    other.load_state_dict(model.state_dict())
    set_fake_quantize(other, "validation")
    assert torch.equal(other(x), out)


@pytest.mark.parametrize("format", ["mxfp8_e5m2", "nvfp4"])
@pytest.mark.parametrize("with_example", [False, True])
def test_layers_whose_inputs_no_block_divides(format: Any, with_example: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3, groups=32),
        nn.ConvTranspose2d(32, 64, 2),
    )  # fmt: skip
    x = torch.randn(1, 3, 12, 12)
    net.qconfig = get_block_qconfig(format)
    example = x if with_example else None
    with pytest.raises(ValueError, match="prepare_qat: expected group"):
        prepare_qat(net, example_inputs=example)
    model = prepare_qat(net, example_inputs=example, mapping={"0": None, "2": None})
    calibrate(model, [x])
    quantizers = named_quantizers(model)
    group = 16 if format == "nvfp4" else 32

    def quantized(i: int, name: str, value: Tensor, axis: int) -> Tensor:
        quantize = floats("float8_e5m2", "floor")
        if format == "nvfp4":
            quantize = nvfp4(quantizers[name].scale)
        return in_groups(value, quantize, axis, group)

    hidden, reads = net[0](x), [n for n, q in quantizers.items() if not q.transient]
    weight = quantized(1, "1.parametrizations.weight.0", net[1].weight, 1)
    hidden = F.conv2d(quantized(1, reads[0], hidden, 1), weight, net[1].bias)
    hidden = net[2](hidden)
    weight = quantized(3, "3.parametrizations.weight.0", net[3].weight, 0)
    want = F.conv_transpose2d(quantized(3, reads[1], hidden, 1), weight, net[3].bias)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_mapping_by_module() -> None:
    """Formats side by side; the module's own QConfig decides what it reads."""
    net, x = mlp(), torch.randn(5, 64)
    mapping = {nn.Linear: get_block_qconfig("mxfp4"), "0": get_block_qconfig("mxfp8_e4m3", "ceil")}
    for example in (None, x):
        model = prepare_qat(net, example_inputs=example, mapping=mapping)
        set_fake_quantize(model, "validation")
        hidden = plain(net[:2], x, floats("float8_e4m3", "ceil"), 32)
        assert torch.equal(model(x), plain(net[2:], hidden, floats("float4_e2m1", "floor"), 32))


REFUSED = {
    "format": (("mxfp5",), {}, "unknown format 'mxfp5'; known: mxfp8_e4m3"),
    "rule": (("mxfp4", "up"), {}, "unknown scale_rule 'up'; known: floor, ceil, even"),
    "integers": (("mxint8", "even"), {}, "expected scale_rule to be floor or ceil with mxint8"),
    "nvfp4": (("nvfp4", "floor"), {}, "expected scale_rule to be None with nvfp4, got 'floor'"),
    "mapping": (("mxfp4",), {"weight_qkwargs": 3}, "weight_qkwargs to be a mapping, got 3"),
    "decided": (
        ("mxfp4",),
        {"activation_qkwargs": {"dtype": "int8"}},
        "expected activation_qkwargs without dtype, which mxfp4 decides",
    ),
    "other rule": (
        ("mxfp4", "ceil"),
        {"weight_qkwargs": {"scale_rule": "floor"}},
        "expected weight_qkwargs without scale_rule, which mxfp4 decides",
    ),
    "rounded up": (
        ("mxint8", "floor"),
        {"activation_qkwargs": {"power_of_two": True}},
        "expected activation_qkwargs without power_of_two, which mxint8 decides",
    ),
    "key": (("mxfp4",), {"weight_qkwargs": {"foo": 1}}, 'weight_qkwargs: unknown key "foo"'),
    "observed": (("mxfp4",), {"activation_observer": "mse"}, "expected name to be min_max"),
    "levels": (("nvfp4",), {"activation_observer": "kl"}, "kl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    args, keys, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        get_block_qconfig(*args, **keys)
    assert message in str(caught.value)
