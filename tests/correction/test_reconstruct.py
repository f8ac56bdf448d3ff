"""reconstruct: less error in every layer than nearest rounding, on the same grid, for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from rounded_net import INT4, ORDER, data, made, net, weights
from snapshots import same, same_bits, snapshot
from torch_ext import (
    QConfig,
    calibrate,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    reconstruct,
)

pytestmark = pytest.mark.usefixtures("one_thread")
AFFINE = {"dtype": "uint4", "qscheme": "per_channel_affine", "ch_axis": 0}
GRIDS: dict[str, dict[str, Any]] = {
    "int4 per channel": INT4,
    "int8 per channel": {},
    "int4 per tensor": {"dtype": "int4", "qscheme": "per_tensor_symmetric", "ch_axis": -1},
    "uint4 affine": AFFINE,
    "power of two": {"dtype": "int4", "power_of_two": True},
    "tvm": {"dtype": "int4", "scale_rule": "tvm"},
    "narrow": {"quant_min": -3, "quant_max": 3},
    "float8_e4m3": {"dtype": "float8_e4m3"},
}


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("fold", [False, True])
def test_every_grid_keeps_its_scales_and_no_layer_becomes_worse(
    grid: str, method: Any, fold: bool
) -> None:
    model = made(GRIDS[grid], fold_batch_norms=fold)
    before = snapshot(model)
    if method == "adaround" and grid == "float8_e4m3":
        with pytest.raises(ValueError, match=f"can be rounded, got none: {ORDER[0]}: adaround ro"):
            reconstruct(model, data(), method, progress=False)
        assert same(before, snapshot(model))
        return
    result = reconstruct(model, data(), method, iterations=200, progress=False)
    assert [row.name for row in result.layers] == ORDER
    assert not result.left
    for row in result.layers:
        assert row.after <= row.before
        assert 0 <= row.changed < 1
    assert sum(row.changed > 0 for row in result.layers) >= 4
    assert sum(row.after for row in result.layers) < sum(row.before for row in result.layers)
    after = snapshot(model)
    for key in before:
        if key.endswith((".scale", ".zero_point", ".range", ".state", ".training")):
            equal = before[key] == after[key]
            assert equal if isinstance(equal, bool) else bool(equal.all()), key
    for name, quantizer in named_quantizers(model).items():
        assert quantizer.holds_range == quantizer.transient, name


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_errors_are_those_of_the_layers_outputs(method: Any, batches: int, bias: bool) -> None:
    """Computed again in float64, from what each layer reads in the model that is rounded."""
    model = net()
    model.qconfig = QConfig(None, get_default_qconfig(weight_qkwargs=INT4).weight)
    model = prepare_qat(model, example_inputs=data()[0])
    calibrate(model, data(), progress=False)
    given = data(batches)
    result = reconstruct(
        model, given, method, target="quantized", bias=bias, progress=False, iterations=300
    )
    for row in result.layers:
        if row.name == "twice":  # whose second call read what its first computed, unrounded
            continue
        module = model.get_submodule(row.name)
        found: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args, f=found: f.append(args[0].double()))
        with torch.no_grad():
            for x in given:
                model(x)
        hook.remove()
        layer = float_layer(row.name)
        centred = bias and layer.bias is not None
        weight, layer.bias = layer.weight.clone(), None
        want = [layer(x) for x in found]
        quantizer = module.get_submodule("parametrizations.weight")[-2 if row.name == "up" else 0]
        if centred:  # the bias takes up the mean
            want = [y - mean_of(want) for y in want]
        errors = []
        for other in (nearest_of(weight, quantizer, layer), module.weight.detach()):
            layer.weight.data = other.double()
            have = [layer(x) for x in found]
            if centred:
                have = [y - mean_of(have) for y in have]
            pairs = zip(have, want, strict=True)
            errors.append(float(sum((x - y).square().sum() for x, y in pairs)))
        power = float(sum(y.square().sum() for y in want))
        assert row.before == pytest.approx(errors[0] / power, rel=1e-3)
        assert row.after == pytest.approx(errors[1] / power, rel=1e-3)
        assert errors[1] < errors[0]


def mean_of(outputs: list[Tensor]) -> Tensor:
    """Of each channel, over the positions of all batches."""
    channels = torch.cat([y.movedim(1, 0).flatten(1) for y in outputs], 1)
    return channels.mean(1).view(-1, *[1] * (outputs[0].dim() - 2))


def float_layer(name: str) -> Any:
    return net().get_submodule(name).double().requires_grad_(False)


def nearest_of(weight: Tensor, quantizer: Any, layer: Any) -> Tensor:
    grid = (quantizer.observer.quant_min, quantizer.observer.quant_max)
    qparams, axis = (quantizer.scale, quantizer.zero_point), quantizer.observer.ch_axis
    if not isinstance(layer, nn.ConvTranspose2d):
        return torch_ext.ops.fake_quant(weight.float(), *qparams, *grid, axis)
    # Each group's output channels have scales of their own.
    groups, size = layer.groups, weight.shape[1]
    parts = [
        torch_ext.ops.fake_quant(
            part.float(), *(t[i * size : (i + 1) * size] for t in qparams), *grid, axis
        )
        for i, part in enumerate(weight.chunk(groups))
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_learned_and_given_scales(method: Any) -> None:
    keys = INT4 if method == "lsq" else {"dtype": "int4", "qscheme": "per_tensor_symmetric"}
    if method == "pact":
        keys["ch_axis"] = -1
    model = made(keys, method=method)
    want = {n: q.calculate_qparams()[0].clone() for n, q in named_quantizers(model).items()}
    result = reconstruct(model, data(), progress=False)
    assert all(row.after <= row.before for row in result.layers)
    for name, quantizer in named_quantizers(model).items():
        assert same_bits(quantizer.calculate_qparams()[0], want[name])


@pytest.mark.parametrize("example", [False, True])
def test_placements_and_targets(example: bool) -> None:
    for target in ("float", "quantized"):
        model = made(example=example)
        result = reconstruct(model, data(), target=target, progress=False)  # type: ignore[arg-type]
        assert [row.name for row in result.layers] == ORDER
        assert all(row.after <= row.before for row in result.layers)


def test_it_is_the_same_each_time_for_any_positions_and_seed() -> None:
    def values(**keys: Any) -> dict[str, Tensor]:
        model = made()
        reconstruct(model, data(), progress=False, **keys)
        return weights(model)

    first, again = values(positions=50), values(positions=50)
    assert all(same_bits(first[name], again[name]) for name in first)
    other = values(positions=50, seed=1)
    assert not all(same_bits(first[name], other[name]) for name in first)


def test_a_pattern_leaves_the_others() -> None:
    model = made()
    before = weights(model)
    result = reconstruct(model, data(), pattern="*first*", progress=False)
    assert [row.name for row in result.layers] == ["first"]
    after = weights(model)
    assert all(same_bits(before[n], after[n]) == (n != "first") for n in before)
    assert "first" in str(result)


class _Stop(Exception):
    pass


class Failing(list[Tensor]):
    """Batches whose iteration fails when they are run over for the time ``at``."""

    at = -1

    def __iter__(self) -> Any:
        self.at -= 1
        if self.at == 0:
            raise _Stop
        return super().__iter__()


@pytest.mark.parametrize("at", [1, 2, 3, 4, 7])
def test_a_failed_run_changes_nothing_and_goes_on_from_its_checkpoint(
    at: int, tmp_path: Path
) -> None:
    complete = made()
    want = reconstruct(complete, data(), progress=False)
    model = made()
    before = snapshot(model)
    batches = Failing(data())
    batches.at = at
    path = tmp_path / "checkpoint"
    with pytest.raises(_Stop):
        reconstruct(model, batches, progress=False, checkpoint=path)
    assert same(before, snapshot(model))
    assert path.exists() == (at > 3)
    have = reconstruct(model, data(), progress=False, checkpoint=path)
    assert same(snapshot(model), snapshot(complete))
    assert have == want
    assert not path.exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    batches = Failing(data())
    batches.at = 6
    with pytest.raises(_Stop):
        reconstruct(made(), batches, progress=False, checkpoint=path)
    kept = path.read_bytes()
    for wrong in (
        lambda: reconstruct(made(), data(), "adaround", progress=False, checkpoint=path),
        lambda: reconstruct(made(), data(2), progress=False, checkpoint=path),
        lambda: reconstruct(made({}), data(), progress=False, checkpoint=path),
    ):
        with pytest.raises(torch_ext.FileError, match="about: the file is of another"):
            wrong()
    path.write_bytes(kept[:100])
    with pytest.raises(torch_ext.FileError):
        reconstruct(made(), data(), progress=False, checkpoint=path)


def nan_data() -> list[Tensor]:
    found = data()
    found[1][0, 0, 0, 0] = float("nan")
    return found


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    model[2].weight = model[0].weight
    model.qconfig = get_default_qconfig()
    prepared = prepare_qat(model, example_inputs=data()[0])
    calibrate(prepared, data(), progress=False)
    return prepared


BAD: list[Any] = [
    (lambda: (nn.Linear(3, 3), data()), {}, ValueError, "to have quantizers"),
    (lambda: (made(), []), {}, ValueError, "to give batches"),
    (lambda: (made(), data()[0]), {}, TypeError, "data to be batches"),
    (lambda: (made(), iter(data())), {}, TypeError, "run over again"),
    (lambda: (made(), nan_data()), {}, ValueError, "first reads to be finite.*batch 1"),
    (lambda: (made(), data()), {"method": "nearest"}, ValueError, 'method to be "gptq" or'),
    (lambda: (made(), data()), {"target": "int"}, ValueError, 'target to be "float" or'),
    (lambda: (made(), data()), {"damping": 0}, ValueError, "damping to be above 0, got 0"),
    (lambda: (made(), data()), {"damping": float("nan")}, ValueError, "damping to be above 0"),
    (lambda: (made(), data()), {"damping": "x"}, TypeError, "damping to be a number"),
    (lambda: (made(), data()), {"iterations": 0}, ValueError, "iterations"),
    (lambda: (made(), data()), {"positions": 0}, ValueError, "positions"),
    (lambda: (made(), data()), {"seed": -1}, ValueError, "seed"),
    (lambda: (made(), data()), {"activation_order": 2}, TypeError, "activation_order"),
    (lambda: (made(), data()), {"bias": 2}, TypeError, "bias"),
    (lambda: (made(), data()), {"pattern": "none"}, ValueError, "no quantizer matches"),
    (lambda: (made(), data()), {"pattern": "*input*"}, ValueError, "layers with quantized weights"),
    (lambda: (tied(), data()), {}, ValueError, "of one module each, got one that is 0.*and 2"),
]


@pytest.mark.parametrize(("make", "keys", "kind", "text"), BAD)
def test_bad_input(make: Any, keys: dict[str, Any], kind: type[Exception], text: str) -> None:
    model, batches = make()
    before = snapshot(model)
    with pytest.raises(kind, match=f"^reconstruct: .*{text}"):
        reconstruct(model, batches, progress=False, **keys)
    assert same(before, snapshot(model))


def test_without_ranges_and_with_weights_that_are_computed() -> None:
    model = net()
    model.qconfig = get_default_qconfig()
    bare = prepare_qat(model)
    with pytest.raises(
        RuntimeError, match=r"^reconstruct: expected every quantizer to have a range"
    ):
        reconstruct(bare, data(), progress=False)

    normed = net()
    torch.nn.utils.parametrizations.weight_norm(normed.fc)
    normed.qconfig = get_default_qconfig(weight_qkwargs=INT4)
    prepared = prepare_qat(normed, example_inputs=data()[0])
    calibrate(prepared, data(), progress=False)
    result = reconstruct(prepared, data(), progress=False)
    assert result.left == {"fc": "its weight is computed by _WeightNorm"}
    assert [row.name for row in result.layers] == ORDER[:-1]


def test_a_dtype_that_holds_no_grid_is_refused_and_one_that_does_is_not() -> None:
    def half(bits: str) -> nn.Module:
        model = net().to(torch.bfloat16)
        model.qconfig = get_default_qconfig(weight_qkwargs={"dtype": bits})
        prepared = prepare_qat(model, example_inputs=data()[0].bfloat16())
        calibrate(prepared, batches, progress=False)
        return prepared

    batches = [x.bfloat16() for x in data()]
    model = half("int4")
    result = reconstruct(model, batches, progress=False)
    assert all(row.after <= row.before for row in result.layers)
    model = half("int16")
    before = snapshot(model)
    with pytest.raises(ValueError, match="weight to be of a dtype that holds its grid's values"):
        reconstruct(model, batches, progress=False)
    assert all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before.values(), snapshot(model).values(), strict=True)
    )
