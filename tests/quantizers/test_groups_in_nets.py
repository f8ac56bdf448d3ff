"""Models whose weights have groups: placement, training, files, reports, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from grouped_values import by_numpy
from snapshots import same_bits
from torch_ext import (
    calibrate,
    describe,
    export,
    get_default_qconfig,
    load_observer_params,
    named_quantizers,
    ops,
    prepare_qat,
    resolve,
    save_observer_params,
    set_fake_quantize,
)
from torch_ext.files.compare import compare
from torch_ext.files.quantizer_params import params_from, params_of, spec_of, tensors_of
from training import losses_of

INT4 = {"dtype": "int4", "group_size": 4}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 12, 2, groups=2)
        self.fc = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.conv(x))))
        return self.fc(self.up(x).mean((2, 3)))


def images(seed: int = 2) -> Tensor:
    return torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def prepared(method: Any = "fake_quant", example: bool = False, **keys: Any) -> nn.Module:
    net = Net().eval()
    net.qconfig = get_default_qconfig(  # type: ignore[assignment]
        weight_fake_quant=method, weight_qkwargs={**INT4, **keys}
    )
    return prepare_qat(net, example_inputs=images() if example else None)


def solved(*args: Any, **keys: Any) -> nn.Module:
    net = prepared(*args, **keys)
    calibrate(net, [images()], progress=False)
    return net


@pytest.mark.parametrize("example", [False, True])
def test_prepare_finds_the_inputs_of_each_layer(example: bool) -> None:
    net = solved(example=example)
    found = {
        name.split(".")[0]: quantizer.observer
        for name, quantizer in named_quantizers(net).items()
        if quantizer.transient
    }
    counts = {name: observer.channel_len for name, observer in found.items()}
    assert counts == {"conv": 72, "grouped": 72, "up": 48, "fc": 24}
    axes = {name: observer.ch_axis for name, observer in found.items()}
    assert axes == {"conv": 1, "grouped": 1, "up": 0, "fc": 1}
    weight = Net().up.weight.detach()  # [in, out / 2, 2, 2]: four of the eight inputs share a scale
    halves = [half.movedim(0, 1) for half in weight.chunk(2)]
    want = torch.cat([by_numpy(half, 4, False, -8, 7).movedim(1, 0) for half in halves])
    assert same_bits(net.up.weight.detach(), want)  # type: ignore[union-attr,operator]
    text = str(describe(net))
    assert "int4 [-8, 7], groups of 4 symmetric" in text
    assert "(72 groups)" in repr(net)


@pytest.mark.parametrize("method", ["fake_quant", "lsq"])
def test_training_and_files(method: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = solved(method)
    set_fake_quantize(net, "qat")
    target = torch.randn(3, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = losses_of(net, images(), target, optimizer, 8)
    assert losses[-1] < losses[0]
    set_fake_quantize(net, "validation")
    want = net(images())
    fresh = prepared(method)
    fresh.load_state_dict(net.state_dict())
    set_fake_quantize(fresh, "validation")
    assert same_bits(fresh(images()), want)

    path = tmp_path / "net.safetensors"
    save_observer_params(net, path)
    read = torch_ext.read_quantizers(path)
    save_observer_params(read, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    other = prepared(method)
    torch_ext.load_float_state_dict(other, torch_ext.float_state_dict(net))
    assert load_observer_params(path, other, verbose=False).complete
    set_fake_quantize(other, "validation")
    assert same_bits(other(images()), want)


def test_json(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import json

    net = solved()
    export.json(net, tmp_path / "net.json")
    schema = Path(torch_ext.__file__).parent / "export/calibration.schema.json"
    jsonschema.validate(
        json.loads((tmp_path / "net.json").read_text()), json.loads(schema.read_text())
    )
    record = export.read_json(tmp_path / "net.json").quantizers["fc.parametrizations.weight.0"]
    assert record.spec["group_size"] == 4
    assert record.scale.shape == (24,)
    assert record.tally.shape == (1, 5)
    assert int(record.tally[0, 0]) == 96


def test_other_groups_are_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_observer_params(solved(), path)
    for size, text in ((2, "groups of 4 for groups of 2"), (None, "groups of 4 for no groups")):
        other = prepared(group_size=size)
        with pytest.raises(ValueError, match=text):
            load_observer_params(path, other, verbose=False)
        report = load_observer_params(path, other, strict=False, verbose=False)
        assert len(report.mismatched) == 4
        assert all(text in why for why in report.mismatched.values())
    save_observer_params(solved(group_size=None), path)
    report = load_observer_params(path, prepared(), strict=False, verbose=False)
    assert set(report.mismatched.values()) == {"no groups for groups of 4"}


def test_resolve_and_report(tmp_path: Path) -> None:
    net = solved()
    resolve(net, weight_observer="mse")
    quantizer = named_quantizers(net)["fc.parametrizations.weight.0"]
    rows = Net().fc.weight.detach().reshape(-1, 4)
    want = ops.mse(rows, quant_min=-8, quant_max=7, symmetric=True, ch_axis=0)
    assert torch.equal(quantizer.range, want)
    torch_ext.report(net, tmp_path / "net.html")
    assert "groups</caption>" in (tmp_path / "net.html").read_text()
    before = quantizer.range.clone()
    with pytest.raises(ValueError, match=r"fc.*a scale for each group of 4"):
        resolve(net, backend="tensorrt")
    assert torch.equal(quantizer.range, before)


def test_files_with_wrong_groups() -> None:
    """A file claims groups that no quantizer has."""
    quantizer = named_quantizers(solved())["fc.parametrizations.weight.0"]
    tensors, spec = tensors_of(quantizer), spec_of(quantizer)
    assert params_from(tensors, spec).group_size == 4
    wrong = [1, -4, "4", 2.5, True, 2**40]
    for given, text in (*((size, "group_size") for size in wrong), (None, "observer.extrema")):
        with pytest.raises(ValueError, match=text):
            params_from(tensors, {**spec, "group_size": given})
    with pytest.raises(ValueError, match="group_size to be None but for a weight"):
        params_from(tensors, {**spec, "transient": False})
    three_rows = {**tensors, "observer.tally": tensors["observer.tally"].expand(3, 5)}
    with pytest.raises(ValueError, match=r"observer.tally: expected"):
        params_from(three_rows, spec)
    other = params_of(named_quantizers(solved(group_size=None))["fc.parametrizations.weight.0"])
    (row,) = compare({"fc": params_of(quantizer)}, {"fc": other}).rows
    assert row.note == "groups of 4 and no groups"


# ---- refusals


def test_sizes_that_do_not_divide_are_all_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)).eval()
    net.qconfig = get_default_qconfig(weight_qkwargs=INT4)  # type: ignore[assignment]
    for keys in ({}, {"example_inputs": torch.randn(1, 3, 9, 9)}):
        with pytest.raises(
            ValueError, match="expected group_size to divide every weight"
        ) as raised:
            prepare_qat(net, inplace=True, **keys)
        text = str(raised.value)
        assert 'mapping=dict.fromkeys(["0", "1"])' in text
        assert "0.weight: 3 on axis 1, group_size 4" in text
        assert "1.weight: 1 on axis 1, group_size 4" in text
        assert "2.weight" not in text
        assert not named_quantizers(net)
        plain = get_default_qconfig()
        for other, count in ((None, 1), (plain, 3)):
            made = prepare_qat(net, mapping=dict.fromkeys(["0", "1"], other), **keys)
            weights = [q for q in named_quantizers(made).values() if q.transient]
            assert len(weights) == count


def test_an_axis_that_a_weight_lacks() -> None:
    net = Net().eval()
    keys = {**INT4, "ch_axis": 3}
    net.qconfig = get_default_qconfig(weight_qkwargs=keys)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"fc.weight: expected ch_axis to be below 2, got 3"):
        prepare_qat(net)
