"""Models with dynamic scales in everything that is done to a calibrated model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import images, tiny_net
from snapshots import same, snapshot
from torch_ext import (
    calibrate,
    describe,
    export,
    get_default_qconfig,
    load_observer_params,
    named_quantizers,
    prepare_qat,
    read_quantizers,
    report,
    resolve,
    save_observer_params,
    sensitivity,
    set_fake_quantize,
    sweep,
    sync_observers,
)
from torch_ext.cli.main import main

BLOCKS = {"dtype": "float8_e4m3", "group_size": 2, "power_of_two": True, "ch_axis": 0}


def model(dynamic: bool = True, **keys: Any) -> nn.Module:
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig(activation_qkwargs={"dynamic": dynamic, **keys})
    return prepare_qat(net, example_inputs=images())


def activations(net: nn.Module) -> list[str]:
    return [name for name, q in named_quantizers(net).items() if not q.transient]


@pytest.fixture
def net() -> nn.Module:
    made = model()
    calibrate(made, [images()])
    return made


def test_nothing_has_to_be_calibrated() -> None:
    net, x = model(), images()
    set_fake_quantize(net, "validation")
    want = net(x)
    other = model()
    other.load_state_dict(net.state_dict())
    set_fake_quantize(other, "qat")
    set_fake_quantize(other, "validation")
    assert torch.equal(other(x), want)
    summary = calibrate(net, [x, 2 * x])
    assert torch.equal(net(x), want)
    assert summary.unobserved == ()
    assert not set(summary.quantizers) & set(activations(net))


def test_calibration_with_a_checkpoint(tmp_path: Path) -> None:
    net = model()
    batches = [images(), 2 * images(), 3 * images()]

    def interrupted(model: nn.Module, x: Tensor) -> Any:
        if x is batches[2]:
            raise KeyboardInterrupt
        return model(x)

    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        calibrate(net, batches, forward=interrupted, checkpoint=path, every=1)
    assert calibrate(net, batches, checkpoint=path).resumed_from == 2


@pytest.mark.parametrize("keys", [{}, BLOCKS], ids=["token", "blocks"])
def test_files(keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = model(**keys)
    calibrate(net, [images()])
    path = tmp_path / "net.safetensors"
    save_observer_params(net, path)
    saved = read_quantizers(path)
    values = torch.randn(4, 6, 8, 8)
    for name in activations(net):
        mine, theirs = named_quantizers(net)[name], named_quantizers(saved)[name]
        assert repr(theirs) == repr(mine)
        assert theirs.state.value == "validation"
        assert torch.equal(theirs(values), mine(values))
    again = model(**keys)
    loaded = load_observer_params(path, again, verbose=False)
    assert loaded.complete
    assert sorted(loaded.kept) == sorted(activations(net))
    for command in (["show"], ["show", "--json"], ["compare", str(path)]):
        assert main([command[0], str(path), *command[1:]]) == 0
        assert "dynamic" in capsys.readouterr().out or command[0] == "compare"
    with pytest.raises(ValueError, match="its scales are dynamic"):
        export.json(saved, tmp_path / "net.json")
    assert main(["convert", str(path), "--to", "json", "-o", str(tmp_path / "net.json")]) != 0
    assert "its scales are dynamic" in capsys.readouterr().err
    assert not (tmp_path / "net.json").exists()


def test_a_file_that_was_tampered_with(tmp_path: Path) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    net = model()
    calibrate(net, [images()])
    path = tmp_path / "net.safetensors"
    save_observer_params(net, path)
    with safe_open(str(path), "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    (key,) = metadata
    for old, new in (
        ('"dynamic": true', '"dynamic": "yes"'),
        ('"group_size": null', '"group_size": -3'),
        ('"scale_dtype": null', '"scale_dtype": "int3"'),
        ('"dynamic": true, ', ""),
    ):
        text = json.dumps(json.loads(metadata[key]))
        assert old in text
        save_file(tensors, path, {key: text.replace(old, new, 1)})
        with pytest.raises(torch_ext.FileError):
            read_quantizers(path)


def test_to_and_from_static_quantizers(net: nn.Module) -> None:
    static = model(dynamic=False)
    calibrate(static, [images()])
    before = snapshot(static)
    loaded = load_observer_params(net, static, strict=False, verbose=False)
    assert sorted(loaded.unsolved) == sorted(activations(net))
    assert loaded.missing == ["bn2.activation_quantizer"]  # of a sum, which stays float
    assert same(snapshot(static), before)
    loaded = load_observer_params(static, net, strict=False, verbose=False)
    assert sorted(loaded.kept) == sorted(activations(net))


@pytest.mark.parametrize("with_data", [False, True])
def test_report_and_description(net: nn.Module, with_data: bool, tmp_path: Path) -> None:
    summary = report(net, tmp_path / "page.html", [images()] if with_data else None)
    assert not [name for name, _ in summary.warnings if name in activations(net)]
    page = (tmp_path / "page.html").read_text()
    assert "int8 [-128, 127], dynamic symmetric" in page
    rows = {row.name: row for row in describe(net).quantizers}
    for name in activations(net):
        assert rows[name].scale == "dynamic"
        assert "dynamic" in rows[name].grid


def test_rules_and_engines(net: nn.Module) -> None:
    before = snapshot(net)
    with pytest.raises(ValueError, match="none; as their scales are dynamic"):
        resolve(net, activation_observer="percentile")
    with pytest.raises(ValueError, match="its scales are dynamic, and the engine's are fixed"):
        resolve(net, backend="onnxruntime")
    with pytest.raises(ValueError, match="their scales are dynamic"):
        sweep(net, lambda m: 0.0)
    assert same(snapshot(net), before)
    resolve(net, weight_observer="mse")
    with pytest.raises(ValueError, match="without dynamic"):
        get_default_qconfig(backend="tensorrt", activation_qkwargs={"dynamic": True})


def test_sensitivity(net: nn.Module) -> None:
    """Of each quantizer, also with other widths: there is nothing to solve again."""
    x = images()
    result = sensitivity(net, [x], bits=[4, 8])
    rows = {row.name: row for row in result.rows}
    assert rows.keys() == named_quantizers(net).keys()
    name = activations(net)[0]
    assert rows[name].losses[4] > rows[name].losses[8] > 0
    blocks = model(dtype="float4_e2m1", scale_dtype="float8_e4m3", group_size=2, ch_axis=0)
    calibrate(blocks, [x])
    with pytest.raises(ValueError, match="relative to one of the whole tensor"):
        sensitivity(blocks, [x], bits=[8], pattern=activations(blocks))


def test_every_export_refuses(net: nn.Module, tmp_path: Path) -> None:
    x = images()
    exports = {
        "onnx": lambda: export.onnx(net, x, tmp_path / "net.onnx"),
        "json": lambda: export.json(net, tmp_path / "net.json"),
        "pt2e": lambda: export.pt2e(net, x, backend="x86"),
        "tensorrt": lambda: export.tensorrt_cache(net, tmp_path / "net.cache", version="8.6.1"),
    }
    for write in exports.values():
        with pytest.raises(ValueError, match="its scales are dynamic, a file has fixed ones") as e:
            write()
        for name in activations(net):
            assert name in str(e.value)
    assert not list(tmp_path.iterdir())
    set_fake_quantize(net, "float", pattern=activations(net))
    export.onnx(net, x, tmp_path / "net.onnx")


def test_corrections(net: nn.Module) -> None:
    x = images()
    torch_ext.correct_bias(net, [x])
    torch_ext.reconstruct(net, [x])
    with torch.no_grad():
        want = tiny_net().eval()(x)
        assert float((net(x) - want).norm() / want.norm()) < 0.05
    linear = nn.Sequential(nn.Linear(32, 16))
    linear.qconfig = torch_ext.get_block_qconfig("nvfp4")
    blocks = prepare_qat(linear)
    calibrate(blocks, [torch.randn(4, 32)])
    with pytest.raises(ValueError, match="the scales of its groups follow its values"):
        torch_ext.reconstruct(blocks, [torch.randn(4, 32)])


def test_pt2e_has_no_dynamic_scales() -> None:
    pt2e = pytest.importorskip("torch_ext.pt2e")
    for key in ({"dynamic": True}, {"scale_dtype": "float8_e4m3"}, {"group_size": 4}):
        with pytest.raises(ValueError, match="unknown key"):
            pt2e.fake_quant_spec(**key)


def test_synchronising_processes(net: nn.Module) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for state in ("calibration", "qat"):
            set_fake_quantize(net, state)
            net(images())
            sync_observers(net)
    finally:
        dist.destroy_process_group()
