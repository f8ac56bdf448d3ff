"""A choice of widths: applied, exported, kept in a file, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from bit_nets import DATA, learned, net_of, output_error
from nets.tiny_net import WEIGHTS, TinyNet, images, prepared, tiny_net
from snapshots import same, snapshot
from torch_ext import (
    BitChoice,
    FileError,
    QuantizationWarning,
    choose_bits,
    get_default_qconfig,
    named_quantizers,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class TestApplied:
    def chosen(self, **keys: Any) -> tuple[BitChoice, TinyNet]:
        net = net_of("mse", weight_observer="mse")
        return choose_bits(net, DATA, **({"budget": 0.7, "bits": (4, 8, 16)} | keys)), net

    def test_the_model_computes_what_was_measured(self) -> None:
        found, net = self.chosen()
        found.apply(net)
        assert output_error(net) == pytest.approx(found.chosen, rel=1e-12)
        for row in found.rows:
            observer = named_quantizers(net)[row.name].observer
            assert str(observer.dtype).removeprefix("torch.") == f"int{row.bits}"
            assert (observer.name, observer.options) == (row.rule, row.options)

    def test_states_keep_the_widths(self) -> None:
        found, net = self.chosen()
        found.apply(net)
        want = snapshot(net)
        set_fake_quantize(net, "float")
        set_fake_quantize(net, "validation")
        assert same(snapshot(net), want)

    def test_weights_that_changed_in_float(self) -> None:
        _, net = self.chosen()
        set_fake_quantize(net, "float")
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(3)
        found = choose_bits(net, DATA, 0.7)
        found.apply(net)
        quantizers = [named_quantizers(net)[row.name] for row in found.rows]
        scales = [quantizer.scale.clone() for quantizer in quantizers]
        set_fake_quantize(net, "validation")
        assert all(torch.equal(q.scale, scale) for q, scale in zip(quantizers, scales, strict=True))

    def test_a_model_that_was_left_in_calibration(self) -> None:
        net = net_of("mse", weight_observer="mse")
        set_fake_quantize(net, "calibration")
        for batch in DATA:
            net(batch)
        found = choose_bits(net, DATA, 0.7)
        found.apply(net)
        set_fake_quantize(net, "validation")  # those of activations, which the choice leaves
        assert output_error(net) == pytest.approx(found.chosen, rel=1e-12)

    def test_a_choice_after_another(self) -> None:
        _, net = self.chosen()
        fresh = snapshot(net)
        wide = choose_bits(net, DATA, 2.0, bits=(16,))
        eight = choose_bits(net, DATA, 1.0, bits=(8,))
        wide.apply(net)
        assert {row.rule for row in wide.rows} == {"min_max"}
        eight.apply(net)
        assert same(snapshot(net), fresh)

    def test_float_and_back(self) -> None:
        found, net = self.chosen(budget=4.0, bits=("float", 4))
        assert {row.bits for row in found.rows} == {"float"}
        assert found.predicted == 0
        found.apply(net)
        states = torch_ext.fake_quantize_states(net)
        assert {n for n, s in states.items() if s.value == "float"} == set(WEIGHTS)
        assert output_error(net) == pytest.approx(found.chosen, rel=1e-12)
        four, _ = self.chosen(budget=0.5, bits=4)
        four.apply(net)
        assert output_error(net) == pytest.approx(four.chosen, rel=1e-12)

    def test_from_a_file_to_another_model(self, tmp_path: Path) -> None:
        found, net = self.chosen(of="operations")
        path = tmp_path / "bits.json"
        found.save(path)
        read = BitChoice.load(path)
        assert read == found
        found.apply(net)
        other = prepared(get_default_qconfig(activation_observer="mse", weight_observer="mse"))
        torch_ext.save_observer_params(net, tmp_path / "ranges.safetensors")
        torch_ext.load_observer_params(tmp_path / "ranges.safetensors", other, verbose=False)
        set_fake_quantize(other, "validation")
        read.apply(other)
        assert torch.equal(other(images()), net(images()))
        third = prepared(get_default_qconfig(activation_observer="mse", weight_observer="mse"))
        with pytest.warns(QuantizationWarning, match="was saved in VALIDATION"):
            third.load_state_dict(net.state_dict())
        set_fake_quantize(third, "validation")
        read.apply(third)
        assert torch.equal(third(images()), net(images()))

    def test_quantizers_in_the_file_of_ranges(self, tmp_path: Path) -> None:
        found, net = self.chosen()
        found.apply(net)
        torch_ext.save_observer_params(net, tmp_path / "ranges.safetensors")
        saved = torch_ext.read_quantizers(tmp_path / "ranges.safetensors")
        for row in found.rows:
            assert str(row.bits) in str(named_quantizers(saved)[row.name].observer.dtype)

    def test_training_goes_on_from_it(self) -> None:
        found, net = self.chosen()
        found.apply(net)
        set_fake_quantize(net, "qat")
        net.train()
        net(images()).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())

    def test_onnx_has_the_types(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        onnxruntime = pytest.importorskip("onnxruntime")
        found, net = self.chosen(of="operations", budget=0.5)
        assert {row.bits for row in found.rows} == {4, 8, 16}
        found.apply(net)
        path = tmp_path / "net.onnx"
        torch_ext.export.onnx(net, images(), path, quantized_weights=True)
        file = onnx.load(path)
        kinds = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
        for row in found.rows:
            code = getattr(onnx.TensorProto, f"INT{row.bits}")
            assert kinds[f"{row.name}/zero_point"] == code
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        (made,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
        torch.testing.assert_close(
            torch.from_numpy(made), net(images()).detach(), rtol=1e-4, atol=1e-5
        )


def test_what_apply_refuses() -> None:
    found = choose_bits(net_of(), DATA, 0.75, of="operations")
    for net, kind, message in (
        (tiny_net(), ValueError, "BitChoice.apply: expected model to have quantizers, got none"),
        (nn.Sequential(net_of()), ValueError, "the quantizers of the choice, got none named conv1"),
        (learned(), ValueError, "it learns its range"),
        (prepared(get_default_qconfig()), ValueError, "percentile reads a histogram, but none was"),
        (
            prepared(get_default_qconfig(activation_observer="percentile")),
            RuntimeError,
            "BitChoice.apply: expected finite values",
        ),
    ):
        before = snapshot(net)
        with pytest.raises(kind, match=message):
            found.apply(net)
        assert same(snapshot(net), before)
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got 3"):
        found.apply(3)  # type: ignore[arg-type]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "kind": (lambda c: c.update(kind="x"), "kind: expected 'bit_choice', got 'x'"),
    "version": (lambda c: c.update(version=2), "version: expected 1, got 2"),
    "of": (lambda c: c.update(of="time"), "of: expected one of size, operations"),
    "no rows": (lambda c: c.pop("rows"), "KeyError: 'rows'"),
    "bits": (lambda c: c["rows"][0].update(bits=40), "between 2 and 16, got 40"),
    "rule": (lambda c: c["rows"][0].update(rule="x"), 'unknown observer "x"'),
    "options": (lambda c: c["rows"][0].update(options={"x": 1}), "unknown option"),
    "number": (lambda c: c["numbers"].update(cost=3), "expected text, got 3"),
    "loss": (lambda c: c["rows"][0]["losses"].update({"4": "low"}), "could not convert"),
    "a list": (lambda c: c.update(rows=[[]]), "TypeError"),
    "a name": (lambda c: c["rows"][0].update(name=["a"]), "expected text"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    choose_bits(net_of(), DATA, 0.75).save(path)
    content = json.loads(path.read_text())
    damage, message = DAMAGE[case]
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FileError) as caught:
        BitChoice.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
