"""Groups of a weight's values that share a scale, through the whole workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_ext
from reference.fake_quant import fake_quant
from reference.grid import Grid
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    Observer,
    calibrate,
    describe,
    export,
    get_default_qconfig,
    load_observer_params,
    named_quantizers,
    ops,
    prepare_qat,
    quantization_parameters,
    resolve,
    save_observer_params,
    set_fake_quantize,
)
from torch_ext.files.compare import compare
from torch_ext.files.quantizer_params import params_from, params_of, spec_of, tensors_of
from torch_ext.quantizers import groups

WEIGHT = (6, 8, 3, 2)  # of a convolution: [outputs, inputs, height, width]
INT4 = {"dtype": "int4", "group_size": 4}


def quantizer_of(method: Any = "fake_quant", rule: Any = "min_max", **keys: Any) -> FakeQuantize:
    count = int(np.prod(WEIGHT)) // 4
    given = {"channel_len": count, "transient": True, "averaging_constant": 1.0, **INT4, **keys}
    return FakeQuantize(method, rule, **given)


def weight_of(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-6, 4, WEIGHT, generator=generator).float())
    return torch.randn(WEIGHT, generator=generator) * sizes


def by_numpy(x: Tensor, size: int, affine: bool, low: int, high: int) -> Tensor:
    """Each group of inputs by itself, from the definition: min and max, scale, rounding."""
    values, out = x.numpy(), np.empty(x.shape, np.float32)
    for o in range(x.shape[0]):
        for first in range(0, x.shape[1], size):
            for position in np.ndindex(*x.shape[2:]):
                index = (o, slice(first, first + size), *position)
                least, most = values[index].astype(np.float64).min(), values[index].max()
                least, most = min(float(least), 0.0), max(float(most), 0.0)
                if affine:
                    scale = (most - least) / (high - low)
                    point = np.clip(np.rint(low - least * (high - low) / (most - least)), low, high)
                else:
                    scale, point = 2 * max(-least, most) / (high - low), 0
                grid = Grid(low, high, not affine)
                out[index] = fake_quant(values[index], np.float32(scale), np.float32(point), grid)
    return torch.from_numpy(out)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("dtype", "ends"), [("int4", (-8, 7)), ("int8", (-128, 127))])
def test_equals_numpy(affine: bool, dtype: str, ends: tuple[int, int]) -> None:
    scheme = "per_channel_affine" if affine else "per_channel_symmetric"
    quantizer = quantizer_of(dtype=dtype, qscheme=scheme)
    quantizer.state = "qat"
    x = weight_of()
    want = by_numpy(x, 4, affine, *ends)
    assert same_bits(quantizer(x), want)
    quantizer.state = "validation"
    assert same_bits(quantizer(x), want)
    # In another memory format the same numbers, in that format.
    turned = x.to(memory_format=torch.channels_last)
    assert same_bits(quantizer(turned), want)
    assert quantizer(turned).stride() == turned.stride()
    assert quantizer(x).stride() == x.stride()


@pytest.mark.parametrize("rule", torch_ext.observers())
@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3"])
def test_rules_solve_each_group(rule: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each group alone, per tensor; in parts of few groups as all at once."""
    if dtype != "int4" and rule in ("kl", "aciq"):
        with pytest.raises((ValueError, RuntimeError), match=rule):
            quantizer_of(rule=rule, dtype=dtype)
        return
    quantizer, x = quantizer_of(rule=rule, dtype=dtype), weight_of(3)
    quantizer.state = "qat"
    out = quantizer(x)
    alone = FakeQuantize(
        "fake_quant", rule, 1.0, dtype=dtype, transient=True, mantissa_bits=7, octaves=12
    )
    alone.state = "qat"
    for g, row in enumerate(x.movedim(1, -1).reshape(-1, 4)[:20]):
        alone.reset_parameters()
        alone(row)
        assert torch.equal(quantizer.range[g], alone.range[0])
        assert torch.equal(quantizer.scale[g], alone.scale[0])
    monkeypatch.setattr(groups, "_AT_ONCE", 5 * 8 * 2 * 12 * 128)
    parts = quantizer_of(rule=rule, dtype=dtype)
    parts.state = "qat"
    assert same_bits(parts(x), out)
    assert int(parts.solved) == 1
    solution = quantizer.solve_weight(x).solution
    assert solution is not None
    assert torch.equal(solution.range, quantizer.range)


def test_straight_through_gradient() -> None:
    quantizer, x = quantizer_of(rule="percentile", percentile=60.0), weight_of(5)
    quantizer.state = "qat"
    given = x.clone().requires_grad_()
    upstream = torch.randn(WEIGHT)
    quantizer(given).backward(upstream)
    assert given.grad is not None
    scale = groups.spread(quantizer.scale, WEIGHT, 1, 4)
    q = (x / scale).round()
    inside = (q >= -8) & (q <= 7)
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(given.grad, upstream * inside)


def test_lsq_learns_a_scale_for_each_group() -> None:
    """Its gradient is that of lsq on the matrix of groups; the mask is the paper's."""
    quantizer, x = quantizer_of("lsq"), weight_of(6)
    quantizer.state = "qat"
    given = x.clone().requires_grad_()
    quantizer(given).square().sum().backward()
    rows = x.movedim(1, -1).reshape(-1, 4)
    scale = quantizer.scale.detach().double()
    start = 2 * rows.abs().double().mean(1) / 7**0.5
    torch.testing.assert_close(scale, start, rtol=2**-6, atol=0)
    v = rows.double() / scale[:, None]
    q = v.round().clamp(-8, 7)
    inside = (v > -8) & (v < 7)
    upstream = 2 * (q * scale[:, None]).float().double()
    each = torch.where(inside, v.round() - v, q) * upstream
    want = each.sum(1) / (4 * 7) ** 0.5
    (parameter,) = quantization_parameters(quantizer)
    assert parameter.shape == (len(rows),)
    torch.testing.assert_close(parameter.grad, want.float(), rtol=1e-4, atol=1e-5)


def test_given_scale_and_held_range() -> None:
    quantizer = quantizer_of(rule="fixed_scale", scale=0.5)
    assert quantizer.range.shape == (len(quantizer.scale), 2)
    assert bool((quantizer.scale == 0.5).all())
    held = quantizer_of(rule="mse")
    held.state = "qat"
    held(weight_of())
    before = held.range.clone()
    held.hold_range()
    held(weight_of(9))
    assert torch.equal(held.range, before)
    assert int(held.solved) == 2


def test_groups_of_zeros_and_of_non_finite_values() -> None:
    quantizer, x = quantizer_of(), weight_of()
    x[0, :4] = 0
    x[1, 0, 0, 0] = torch.inf
    x[2, :4, 0, 0] = torch.nan
    quantizer.state = "qat"
    out = quantizer(x)
    scale = groups.blocks_of(quantizer.scale, WEIGHT, 1, 4)
    assert bool((scale[0, 0] == 1).all())
    assert float(scale[2, 0, 0, 0]) == 1
    assert torch.equal(out[1, 0, 0, 0], 7 * scale[1, 0, 0, 0])
    assert bool(out[2, :4, 0, 0].isnan().all())
    assert int(out.isnan().sum()) == 4


@pytest.mark.parametrize("method", ["fake_quant", "lsq"])
def test_compiled(method: Any) -> None:
    eager, compiled = quantizer_of(method, "mse"), quantizer_of(method, "mse")
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for state in ("qat", "validation"):
        eager.state = state
        compiled.state = state
        x, y = weight_of().requires_grad_(), weight_of().requires_grad_()
        out = eager(x)
        assert same_bits(run(y).detach(), out.detach())
        out.sum().backward()
        run(y).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, y.grad)


# ---- models


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
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (net(images()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
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


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"group_size to be None but for a weight.*dynamic=True"):
        get_default_qconfig(activation_qkwargs={"group_size": 32})
    with pytest.raises(ValueError, match="group_size to be None"):
        get_default_qconfig(weight_fake_quant="pact", weight_qkwargs={"group_size": 32})
    with pytest.raises(ValueError, match="without group_size where a backend"):
        get_default_qconfig(backend="tensorrt", weight_qkwargs={"group_size": 32})
    for size, kind in ((1, ValueError), (0, ValueError), (-4, ValueError), (4.0, TypeError)):
        with pytest.raises(kind, match="expected group_size to be"):
            Observer("min_max", group_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="histogram to be False with group_size"):
        Observer("min_max", group_size=4, histogram=True)
    quantizer = quantizer_of()
    quantizer.state = "qat"
    with pytest.raises(RuntimeError, match=r"groups of 4 along axis 1, got shape \[2, 6\]"):
        quantizer(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match=r"groups of 4 along axis 1, got shape \[8\]"):
        quantizer(torch.randn(8))
    with pytest.raises(RuntimeError, match="follow_fake_quant"):
        quantizer(torch.randn(2, 8))
    observer = Observer("min_max", group_size=4, channel_len=2)
    observer(torch.randn(1, 8))
    with pytest.raises(RuntimeError, match="expected group_size to be None, got 4"):
        observer.range()
    net = Net().eval()
    keys = {**INT4, "ch_axis": 3}
    net.qconfig = get_default_qconfig(weight_qkwargs=keys)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"fc.weight: expected ch_axis to be below 2, got 3"):
        prepare_qat(net)


def test_a_weight_that_the_forward_computes_is_refused() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1))
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * self.scale)

    net = Computed().eval()
    net.qconfig = get_default_qconfig(weight_qkwargs=INT4)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"prepare_qat: .*expected group_size to be None"):
        prepare_qat(net, example_inputs=torch.randn(2, 8))
