"""Quantizers of float formats through the whole workflow: as those of integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import export_models
import torch_ext
from nets.tiny_net import images, prepared, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    Observer,
    export,
    get_default_qconfig,
    named_quantizers,
    set_fake_quantize,
)
from torch_ext.analysis.report.quality import quality_of, weight_sample
from torch_ext.files.quantizer_params import params_of
from training import losses_of

FLOATS = {"float8_e4m3": (torch.float8_e4m3fn, 448), "float8_e5m2": (torch.float8_e5m2, 57344)}
PER_CHANNEL = {"qscheme": "per_channel_symmetric", "ch_axis": 0}


def config(name: str, *methods: str, **keys: Any) -> torch_ext.QConfig:
    each = {"activation_qkwargs": {"dtype": name}, "weight_qkwargs": {"dtype": name}}
    return get_default_qconfig(*methods, **each, **keys)


def cast(x: Tensor, quantizer: FakeQuantize) -> Tensor:
    dtype, largest = FLOATS[str(quantizer.observer.dtype)]
    scale = quantizer.calculate_qparams()[0]
    axis = quantizer.observer.ch_axis
    scale = scale.view([-1 if i == axis else 1 for i in range(x.dim())]) if axis >= 0 else scale
    return (x / scale).clamp(-largest, largest).to(dtype).float() * scale


@pytest.mark.parametrize("name", FLOATS)
def test_names_of_the_dtype(name: str) -> None:
    dtype, largest = FLOATS[name]
    for given in (name, dtype, str(dtype), str(dtype).removeprefix("torch.")):
        observer = Observer("min_max", dtype=given)
        assert observer.dtype == name
        assert (observer.quant_min, observer.quant_max) == (-largest, largest)
    assert Observer("min_max", dtype=name, quant_min=-largest, quant_max=largest).dtype == name
    assert name in repr(Observer("min_max", dtype=name))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("channels", [False, True])
def test_calibration_to_validation(name: str, channels: bool) -> None:
    keys = {**PER_CHANNEL, "channel_len": 3} if channels else {}
    quantizer = FakeQuantize(dtype=name, **keys)
    quantizer.state = "calibration"
    x = torch.randn(3, 500) * torch.tensor([[1.0], [30.0], [0.01]])
    assert quantizer(x) is x
    quantizer.state = "validation"
    largest = x.abs().amax(1) if channels else x.abs().max().view(1)
    scale, zero_point = quantizer.calculate_qparams()
    assert torch.equal(scale, (largest.double() / FLOATS[name][1]).float())
    assert not zero_point.any()
    assert same_bits(quantizer(2 * x), cast(2 * x, quantizer))
    given = torch.randn(3, 500, requires_grad=True)
    quantizer(given * 100).sum().backward()
    assert given.grad is not None
    assert set(given.grad.unique().tolist()) <= {0.0, 100.0}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("methods", [(), ("lsq", "lsq"), ("pact", "lsq")])
def test_training(name: str, methods: tuple[str, ...]) -> None:
    """The loss falls, ranges and learned parameters move, and VALIDATION is on the format."""
    torch.manual_seed(0)
    net = export_models.run(prepared(config(name, *methods)), images())
    target = torch.randn(6, 3)
    set_fake_quantize(net, "qat")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    losses = losses_of(net, images(), target, optimizer, 12)
    assert losses[-1] < losses[0]
    after = net.state_dict()
    learned = [key for key in after if key.rpartition(".")[2] in ("scale", "alpha", "range")]
    assert learned
    assert any(not torch.equal(after[key], before[key]) for key in learned)
    set_fake_quantize(net.eval(), "validation")
    for path, quantizer in named_quantizers(net).items():
        x = torch.randn(4, 3, 3, 3)
        if quantizer.observer.ch_axis < 0:
            assert same_bits(quantizer(x).detach(), cast(x, quantizer).detach()), path


def test_lsq_starts_without_calibration() -> None:
    quantizer = FakeQuantize("lsq", dtype="float8_e4m3")
    quantizer.state = "qat"
    x = torch.randn(4, 100)
    quantizer(x)
    want = 2 * x.abs().double().mean() / 448**0.5
    assert float(quantizer.scale.detach()) == pytest.approx(float(want), rel=2e-3)


@pytest.mark.parametrize("name", FLOATS)
def test_compiled_and_exported(name: str) -> None:
    net = export_models.run(prepared(config(name)), images())
    want = net(images())
    assert same_bits(torch.compile(net, fullgraph=True, backend="aot_eager")(images()), want)
    with torch.no_grad():
        program = torch.export.export(net, (images(),))
    assert same_bits(program.module()(images()), want)


@pytest.mark.parametrize("name", FLOATS)
def test_files(name: str, tmp_path: Path) -> None:
    net = export_models.run(prepared(config(name, activation_observer="mse")), images())
    path = tmp_path / "net.safetensors"
    torch_ext.save_observer_params(net, path)
    other = prepared(config(name, activation_observer="mse"))
    assert torch_ext.load_observer_params(path, other).complete
    set_fake_quantize(other, "validation")
    assert same_bits(other(images()), net(images()))
    read = named_quantizers(torch_ext.read_quantizers(path))
    for key, quantizer in named_quantizers(net).items():
        assert read[key].observer.grid == quantizer.observer.grid
    fresh = prepared(config(name, activation_observer="mse"))
    fresh.load_state_dict(net.state_dict())
    set_fake_quantize(fresh, "validation")
    assert same_bits(fresh(images()), net(images()))


@pytest.mark.parametrize("name", FLOATS)
def test_json(name: str, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import json

    net = export_models.run(prepared(config(name, "lsq", "fake_quant")), images())
    export.json(net, tmp_path / "net.json")
    document = (tmp_path / "net.json").read_text()
    schema = Path(torch_ext.__file__).parent / "export/calibration.schema.json"
    jsonschema.validate(json.loads(document), json.loads(schema.read_text()))
    for key, record in export.read_json(tmp_path / "net.json").quantizers.items():
        quantizer = named_quantizers(net)[key]
        assert record.spec["dtype"] == name
        assert same_bits(record.scale, quantizer.calculate_qparams()[0])


def test_ranges_move_between_integers_and_floats() -> None:
    """A range is one of the data: its scale is that of the grid it is loaded to."""
    integers = export_models.run(prepared(), images())
    floats = prepared(config("float8_e4m3"))
    report = torch_ext.load_observer_params(integers, floats)
    notes = set(report.converted.values())
    assert notes == {"[-128, 127] symmetric to float8_e4m3 symmetric"}
    quantizer = floats.get_submodule("conv1.input_quantizers.input")
    source = integers.get_submodule("conv1.input_quantizers.input")
    assert torch.equal(quantizer.range, source.range)
    top = source.range.abs().amax(1).double()
    assert torch.equal(quantizer.scale, (top / 448).float())
    torch_ext.resolve(floats, backend="tensorrt")
    assert quantizer.observer.dtype == torch.int8
    assert torch.equal(quantizer.scale, (top / 127.5).float())


def test_resolve_sweep_sensitivity_and_reports(tmp_path: Path) -> None:
    net = prepared(config("float8_e4m3"), inplace=False)
    keep = get_default_qconfig(
        activation_qkwargs={"dtype": "float8_e4m3", "histogram": True},
        weight_qkwargs={"dtype": "float8_e4m3"},
    )
    net = export_models.run(prepared(keep), images())
    before = net(images())
    torch_ext.resolve(net, activation_observer="mse")
    assert not torch.equal(before, net(images()))

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(images()) - before).square().mean())

    table = torch_ext.sweep(net, evaluate)
    rules = {
        choice.rule for row in table.rows for choice in (row.activations, row.weights) if choice
    }
    assert "mse" in rules
    assert not rules & {"kl", "aciq"}
    summary = torch_ext.report(net, tmp_path / "report.html", [images()])
    text = (tmp_path / "report.html").read_text()
    assert "float8_e4m3 [-448, 448]" in text
    assert "No value is negative" not in text
    assert summary.quantizers == len(named_quantizers(net))


@pytest.mark.parametrize("name", FLOATS)
def test_clipped_is_what_is_beyond_the_largest_number(name: str) -> None:
    """Not what is more than half a scale away: the largest numbers are 32 scales apart, or 8192."""
    quantizer = FakeQuantize(dtype=name, observer="fixed_scale", scale=1.0)
    largest = FLOATS[name][1]
    half = {"float8_e4m3": 16, "float8_e5m2": 4096}[name]
    x = torch.tensor([[1.0, largest - half + 1, largest + half - 1, largest + half + 1]])
    sample = weight_sample(x, -1)
    quality = quality_of(sample, *quantizer.calculate_qparams(), params_of(quantizer))
    assert quality.clipped == 0.25


# ---- bad input


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dtype": "float8_e4m3fnuz"}, "unknown dtype 'float8_e4m3fnuz'; known: int4"),
        ({"dtype": "float4_e2m1"}, "expected group_size with float4_e2m1, got None"),
        ({"dtype": torch.float16}, "unknown dtype torch.float16"),
        (
            {"dtype": "float8_e4m3", "qscheme": "per_tensor_affine"},
            "expected qscheme to be symmetric with float8_e4m3, got per_tensor_affine",
        ),
        (
            {"dtype": "float8_e4m3", "quant_min": -240},
            "expected quant_min to be -448 with float8_e4m3, got -240",
        ),
        (
            {"dtype": "float8_e5m2", "quant_max": 448},
            "expected quant_max to be 57344 with float8_e5m2, got 448",
        ),
        ({"dtype": "float8_e4m3", "scale_rule": "tvm"}, "expected scale_rule to be grid"),
    ],
)
def test_refuses_grids(keys: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as error:
        FakeQuantize(**keys)
    assert message in str(error.value)


@pytest.mark.parametrize("rule", ["kl", "aciq"])
def test_refuses_rules_of_integers(rule: str) -> None:
    want = rf"expected the grid to be of integers for {rule} \(it.*\), got float8_e4m3"
    with pytest.raises(RuntimeError, match=want):
        FakeQuantize("fake_quant", rule, dtype="float8_e4m3")
    net = export_models.run(prepared(config("float8_e4m3")), images())
    state = snapshot(net)
    with pytest.raises((RuntimeError, ValueError), match=rule):
        torch_ext.resolve(net, activation_observer=rule)
    assert same(snapshot(net), state)


def test_refuses_a_learned_zero_point() -> None:
    with pytest.raises(ValueError, match="expected learn_zero_point to be False, got True"):
        FakeQuantize("lsq", dtype="float8_e4m3", learn_zero_point=True)


def test_exports_of_integers_refuse_by_name(tmp_path: Path) -> None:
    net = tiny_net().eval()
    net = torch_ext.fuse(net)
    net.qconfig = config("float8_e4m3")
    net = export_models.run(torch_ext.prepare_qat(net, example_inputs=images()), images())
    state = snapshot(net)
    calls = {
        "ncnn": lambda: export.ncnn_table(net, images(), tmp_path / "net.table"),
        "tvm": lambda: export.tvm_scales(net, tmp_path / "net.json"),
        "tensorrt": lambda: export.tensorrt_cache(net, tmp_path / "net.cache", "8.6.1"),
        "x86": lambda: export.pt2e(net, images(), backend="x86"),
        "xnnpack": lambda: export.pt2e(net, images(), backend="xnnpack"),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"\n  \S+: its grid is float8_e4m3"):
            call()
    assert list(tmp_path.iterdir()) == []
    assert same(snapshot(net), state)
