"""What users hold in their hands first: arguments in the wrong place, prints, hints, types."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from nets.tiny_net import calibrated, images, prepared, tiny_net
from paths import ROOT
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    LearnedFakeQuantize,
    QuantizationWarning,
    calibrate,
    describe,
    export,
    get_default_qconfig,
    load_observer_params,
    named_quantizers,
    prepare_qat,
    report,
    sensitivity,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# No message may print a model, a tensor or a whole data set.
LONGEST = 700


def message(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert len(text) < LONGEST
    return text


class TestArgumentsInTheWrongPlace:
    def test_a_mapping_for_inplace(self) -> None:
        net = tiny_net()
        net.qconfig = get_default_qconfig()  # type: ignore[assignment]
        before, kinds = snapshot(net), [type(m) for m in net.modules()]
        text = message(TypeError, lambda: prepare_qat(net, {"fc": None}))  # type: ignore[arg-type]
        assert "prepare_qat: expected inplace to be True or False, got {'fc': None}" in text
        assert "pass mapping=" in text
        assert same(snapshot(net), before)
        assert [type(m) for m in net.modules()] == kinds

    @pytest.mark.parametrize("flag", ["inplace", "verbose", "fold_batch_norms"])
    def test_flags_are_flags(self, flag: str) -> None:
        net = tiny_net()
        text = message(TypeError, lambda: prepare_qat(net, **{flag: "no"}))
        assert f"prepare_qat: expected {flag} to be True or False, got 'no'" in text

    def test_what_follows_inplace_has_a_name(self) -> None:
        kinds = [p.kind for p in inspect.signature(prepare_qat).parameters.values()]
        assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
        assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}

    @pytest.mark.parametrize("flag", ["weights", "strict", "verbose"])
    def test_flags_of_load_observer_params(self, flag: str) -> None:
        source, target = calibrated(), prepared()
        before = snapshot(target)
        text = message(TypeError, lambda: load_observer_params(source, target, **{flag: 1}))
        assert f"load_observer_params: expected {flag} to be True or False, got 1" in text
        assert same(snapshot(target), before)

    def test_a_swapped_load(self, tmp_path: Path) -> None:
        net, path = calibrated(), tmp_path / "a.safetensors"
        torch_ext.save_observer_params(net, path)
        text = message(TypeError, lambda: load_observer_params(net, path))  # type: ignore[arg-type]
        assert "load_observer_params: expected to_model to be a torch.nn.Module, got " in text
        text = message(TypeError, lambda: load_observer_params(images(), net))  # type: ignore[arg-type]
        assert "expected from_model to be a model or a file, got a tensor torch.float32" in text

    def test_a_swapped_export(self, tmp_path: Path) -> None:
        net, path = calibrated(), tmp_path / "net.onnx"
        wrong: list[tuple[tuple[Any, ...], str]] = [
            ((images(), net, path), "export.onnx: expected model to be a torch.nn.Module, got a t"),
            ((net, path, images()), "export.onnx: expected path to be a file's path, got a tensor"),
            (
                (net, images(64), net),
                "export.onnx: expected path to be a file's path, got a module ",
            ),
        ]
        for arguments, want in wrong:
            assert want in message(TypeError, lambda a=arguments: export.onnx(*a))  # type: ignore[misc]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("value", [42, "net", None, torch.zeros(64, 64), list(range(5000))])
    def test_what_is_no_model(self, value: Any) -> None:
        for function in (describe, named_quantizers):
            text = message(TypeError, lambda f=function: f(value))  # type: ignore[misc]
            assert f"{function.__name__}: expected model to be a torch.nn.Module, got" in text

    def test_a_learned_quantizer_of_nothing(self) -> None:
        text = message(ValueError, LearnedFakeQuantize)
        want = 'LearnedFakeQuantize: expected method to be one of lsq, pact, got "fake_quant"'
        assert want in text
        for method in ("lsq", "pact"):
            quantizer = LearnedFakeQuantize(method)
            assert [n for n, _ in quantizer.named_parameters()] == list(quantizer.learned) != [""]


class TestBatches:
    """A tensor would be taken apart into samples."""

    WRONG = (images(), "images", b"images", {"x": images()}, 7, None)

    @pytest.mark.parametrize("data", WRONG, ids=lambda d: type(d).__name__)
    def test_calibrate(self, data: Any) -> None:
        net = prepared()
        before = snapshot(net)
        text = message(TypeError, lambda: calibrate(net, data))
        assert "calibrate: expected loader to be batches, got " in text
        assert same(snapshot(net), before)

    @pytest.mark.parametrize("data", WRONG, ids=lambda d: type(d).__name__)
    def test_sensitivity(self, data: Any) -> None:
        text = message(TypeError, lambda: sensitivity(calibrated(), data))
        assert "sensitivity: expected data to be batches, got " in text

    @pytest.mark.parametrize("data", WRONG[:-1], ids=lambda d: type(d).__name__)
    def test_report(self, data: Any, tmp_path: Path) -> None:
        text = message(TypeError, lambda: report(calibrated(), tmp_path / "page.html", data))
        assert "report: expected data to be batches, got " in text
        assert list(tmp_path.iterdir()) == []

    def test_the_way_out_works(self) -> None:
        net = prepared()
        with pytest.raises(TypeError, match=r"pass a list, such as tensor\.split\(32\)"):
            calibrate(net, images())
        assert calibrate(net, images().split(32)).samples == len(images())

    def test_an_empty_batch_is_of_the_function_that_was_called(self, tmp_path: Path) -> None:
        calls: dict[str, Callable[[], object]] = {
            "calibrate": lambda: calibrate(prepared(), [()]),
            "sensitivity": lambda: sensitivity(calibrated(), [()]),
            "report": lambda: report(calibrated(), tmp_path / "page.html", [()]),
        }
        for name, call in calls.items():
            text = message(ValueError, call)
            assert text == f"{name}: expected batches to hold inputs, got an empty one"

    @pytest.mark.parametrize("device", [5, "tpu:0:1", images()])
    def test_devices(self, device: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="calibrate: expected device to be a dev"):
            calibrate(prepared(), [images()], device=device)


class TestPrint:
    def test_range_and_scale_show_once_they_are_there(self) -> None:
        net = prepared(get_default_qconfig())
        lines = repr(net).splitlines()
        quantizers = len(named_quantizers(net))
        assert sum("not solved" in line for line in lines) == quantizers
        calibrate(net, [images()])
        text = repr(net)
        assert "not solved" not in text
        quantizer = net.fc.input_quantizers.input
        (low, high), (scale,) = quantizer.range[0].tolist(), quantizer.scale.tolist()
        assert f"range=[{low:.6g}, {high:.6g}], scale={scale:.6g}" in repr(quantizer)
        weight = net.fc.parametrizations.weight[0]
        low, high = weight.scale.min().item(), weight.scale.max().item()
        assert f"scale={low:.6g} to {high:.6g} ({len(weight.scale)} channels)" in repr(weight)

    def test_where_there_are_no_values(self) -> None:
        with torch.device("meta"):
            assert "no values" in repr(FakeQuantize())
        with torch._subclasses.FakeTensorMode():
            assert "no values" in repr(FakeQuantize("lsq"))

    def test_broken_numbers(self) -> None:
        quantizer = FakeQuantize("lsq", averaging_constant=0.0)
        quantizer.state = "qat"
        quantizer(torch.randn(9))
        with torch.no_grad():
            quantizer.scale.fill_(torch.nan)
        assert "range not finite" in repr(quantizer)


class TestHints:
    def test_a_qconfig_of_torch_ao(self) -> None:
        quantization = pytest.importorskip("torch.ao.quantization")
        net = tiny_net()
        net.qconfig = quantization.default_qconfig
        text = message(TypeError, lambda: prepare_qat(net))
        assert "prepare_qat: expected qconfig to be a torch_ext.QConfig or None, got" in text
        assert "torch.ao.quantization.qconfig's: take torch_ext.get_default_qconfig()" in text

    def test_torchs_onnx_export_points_to_ours(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript")
        net = calibrated().eval()
        with (
            pytest.warns(QuantizationWarning, match=r"torch_ext\.export\.onnx\(model, example_inp"),
            pytest.raises(Exception, match=r"torch_ext\.fake_quant"),
        ):
            torch.onnx.export(net, (images(),), tmp_path / "a.onnx", dynamo=True, verbose=False)
        # In FLOAT it is a float model; ours does what the hint says, without a warning.
        with warnings.catch_warnings():
            warnings.simplefilter("error", QuantizationWarning)
            export.onnx(net, images(), tmp_path / "b.onnx")
            torch.export.export(net, (images(),))
            set_fake_quantize(net, "float")
            torch.onnx.export(net, (images(),), tmp_path / "c.onnx", dynamo=True, verbose=False)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_the_older_onnx_export_raises(self, tmp_path: Path) -> None:
        def export_by_tracing(net: nn.Module) -> None:
            torch.onnx.export(net, (images(),), tmp_path / "a.onnx", dynamo=False)

        pytest.importorskip("onnx")
        net = calibrated().eval()
        with pytest.raises(RuntimeError, match=r"torch_ext\.export\.onnx\(model, example_inputs"):
            export_by_tracing(net)
        export.onnx(net, images(), tmp_path / "b.onnx")
        for state in ("calibration", "qat"):
            set_fake_quantize(net, state)  # type: ignore[arg-type]
            before = snapshot(net)
            with pytest.raises(
                RuntimeError, match=r'set_fake_quantize\(model, "validation"\) first'
            ):
                export_by_tracing(net)
            assert same(snapshot(net), before)
        set_fake_quantize(net, "validation")
        torch.jit.trace(net, images())  # TorchScript may call our ops
        set_fake_quantize(net, "float")
        export_by_tracing(net)

    def test_a_checkpoint_of_validation_into_a_float_model(self, tmp_path: Path) -> None:
        source, target = calibrated().eval(), prepared().eval()
        torch.save(source.state_dict(), tmp_path / "net.pt")
        state = torch.load(tmp_path / "net.pt", weights_only=True)
        with pytest.warns(QuantizationWarning, match="saved in VALIDATION, and the model is in"):
            target.load_state_dict(state)
        set_fake_quantize(target, "validation")
        assert same_bits(target(images()), source(images()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target.load_state_dict(state)  # in VALIDATION already
            set_fake_quantize(source, "float")
            prepared().load_state_dict(source.state_dict())  # of FLOAT


USER = """
import torch
import torch_ext
from torch_ext import FakeQuantize, Observer, export, get_default_qconfig, ops, set_fake_quantize

x = torch.randn(3)
model = torch.nn.Linear(3, 3)
{line}
"""

RIGHT = (
    "ops.percentile(x, percentile=99.9)",
    'ops.kl(x, variant="slides")',
    'set_fake_quantize(model, "qat")',
    "set_fake_quantize(model, torch_ext.FakeQuantState.QAT)",
    'FakeQuantize("lsq", "kl")',
    "[Observer(rule) for rule in torch_ext.observers()]",
    'get_default_qconfig("pact", activation_observer="mse")',
    'ops.fake_quant(x, x, x, 0, 255, rounding="half_away", mask="paper")',
    'export.onnx(model, x, "net.onnx", profile="tensorrt")',
    'torch_ext.resolve(model, activation_observer="kl")',
    'torch_ext.calibrate(model, [x], state="calibration")',
)
WRONG = (
    "ops.percentyle(x)",
    "ops.percentile(x, percentil=99.9)",
    'ops.kl(x, variant="slide")',
    'set_fake_quantize(model, "qatt")',
    'FakeQuantize("lsqq")',
    'FakeQuantize("lsq", "kll")',
    'Observer("min_maxx")',
    'get_default_qconfig("lsqq")',
    'get_default_qconfig(weight_observer="percentyle")',
    'ops.fake_quant(x, x, x, 0, 255, rounding="half_odd")',
    'ops.fake_quant(x, x, x, 0, 255, mask="round")',
    'export.onnx(model, x, "net.onnx", profile="tensorrtt")',
    'torch_ext.resolve(model, weight_observer="kll")',
    'torch_ext.calibrate(model, [x], state="calibrated")',
    "torch_ext.prepare_qat(model, False, {})",
)


def test_type_checkers_know_the_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    folder = tmp_path / "user"
    folder.mkdir()
    for kind, lines in (("right", RIGHT), ("wrong", WRONG)):
        for i, line in enumerate(lines):
            (folder / f"{kind}_{i}.py").write_text(USER.format(line=line))
    command = ["-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir=cache", "user"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    errors = [row for row in done.stdout.splitlines() if ": error:" in row]
    reported = {Path(row.partition(":")[0]).stem for row in errors}
    assert reported == {f"wrong_{i}" for i in range(len(WRONG))}, done.stdout + done.stderr


def test_every_public_object_says_what_it_is() -> None:
    for module in (torch_ext, torch_ext.ops, torch_ext.export):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "") != "torch_ext._C":
                text = inspect.getdoc(value) or ""
                assert text, f"{module.__name__}.{name}"


def test_a_tensor_in_a_message_is_a_shape() -> None:
    wrong: Any = torch.zeros(512, 512)
    text = message(TypeError, lambda: get_default_qconfig(activation_qkwargs=wrong))
    assert "got a tensor torch.float32 of shape [512, 512]" in text


def test_named_quantizers_do_not_depend_on_wrappers() -> None:
    net = prepared()
    names = list(named_quantizers(net))
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend=lambda g, _: g)):
        assert list(named_quantizers(wrapped)) == names
    assert list(named_quantizers(FakeQuantize())) == [""]
    assert named_quantizers(tiny_net()) == {}
