"""export.pt2e: programs of integers that compute what VALIDATION does, as engines match them."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_ext
from pt2e_programs import (
    DTYPES,
    Residual,
    calls,
    config,
    images,
    name_of,
    read_by,
    ready,
    residual,
    run,
    steps_apart,
    trained,
)
from snapshots import same, same_bits, snapshot
from torch_ext import QuantizationWarning, export, get_default_qconfig, named_quantizers
from torch_ext.quantizers.find import PreparedModel

BACKENDS = ("x86", "xnnpack")


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        yield


MODELS: dict[str, Callable[[str], Any]] = {
    "calibrated": residual,
    "lsq": lambda backend: residual(backend, "lsq", "lsq"),
    "pact": lambda backend: residual(backend, "pact", "pact"),
    "trained": lambda backend: trained(backend, "fake_quant"),
    "lsq trained": lambda backend: trained(backend, "lsq"),
    "pact trained": lambda backend: trained(backend, "pact"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", MODELS)
def test_computes_what_validation_does(made: str, backend: str) -> None:
    model = MODELS[made](backend)
    before = snapshot(model)
    program = export.pt2e(model, images(4), backend=backend)
    assert same(snapshot(model), before)
    with torch.no_grad():
        want = model(images(4))
    apart = steps_apart(
        run(program, images(4)), want, named_quantizers(model)["output_quantizers.0"].scale
    )
    # torch multiplies by 1 / scale where VALIDATION divides: a value next to a tie may differ.
    assert apart.max() < 1.001
    assert (apart > 0.001).float().mean() < 0.05
    assert want.std() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_grids_of_a_backend_are_those_that_it_takes(backend: Any) -> None:
    model = ready(Residual(), get_default_qconfig(backend=backend), images())
    program = export.pt2e(model, images(4), backend=backend)  # without a warning
    assert all(node.args[5] == DTYPES[backend] for node in calls(program, "quantize_per_tensor"))
    other = "x86" if backend == "xnnpack" else "xnnpack"
    with pytest.raises(ValueError, match=rf'take get_default_qconfig\(backend="{other}"\)'):
        export.pt2e(model, images(4), backend=other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", MODELS)
def test_weights_are_the_integers_of_their_quantizers(made: str, backend: str) -> None:
    model = MODELS[made](backend)
    program = export.pt2e(model, images(4), backend=backend)
    sources = PreparedModel("test", model).weights
    assert len(sources) == 5
    low = -127 if backend == "xnnpack" else -128
    for quantizer, source in sources.items():
        name = f"{source.owner}.{source.parameter}"
        levels, scale = program.state_dict[name], program.state_dict[f"{name}_scale"]
        assert levels.dtype == torch.int8
        w = source.read().numpy()
        shape = (-1,) + (1,) * (w.ndim - 1)
        used = quantizer.calculate_qparams()[0].detach().expand(len(w)).clone()
        steps = used.numpy().reshape(shape)
        want = np.clip(np.rint(w / steps), low, 127)
        np.testing.assert_array_equal(levels.numpy(), want)
        assert same_bits(scale, used)
        assert np.abs(want).max() > 50
    zero = [tensor for key, tensor in program.state_dict.items() if key.endswith("zero_point")]
    assert not any(bool(tensor.any()) for tensor in zero)
    # Biases are all that stays in float, and no statistic is left.
    rest = {key for key, tensor in program.state_dict.items() if tensor.dtype == torch.float32}
    assert {key for key in rest if not key.endswith("_scale")} == {
        f"{owner}.bias" for owner in ("stem", "depthwise", "pointwise", "hidden", "head")
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_nodes_have_the_grids_of_the_quantizers(backend: str) -> None:
    model = residual(backend)
    program = export.pt2e(model, images(4), backend=backend)
    known = {
        (float(q.scale), int(q.zero_point), q.observer.quant_min, q.observer.quant_max)
        for q in named_quantizers(model).values()
        if not q.transient
    }
    pairs = calls(program, "quantize_per_tensor") + calls(program, "dequantize_per_tensor")
    assert {tuple(node.args[1:5]) for node in pairs} == known
    assert {node.args[5] for node in pairs} == {DTYPES[backend]}
    for node in calls(program, "dequantize_per_tensor"):
        assert name_of(node.args[0]) == "quantize_per_tensor"
        assert node.args[0].args[1:] == node.args[1:]
        assert len(node.users) == 1  # an engine matches it with what reads it


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_and_operations_that_move_values_stand_between_pairs(backend: str) -> None:
    program = export.pt2e(residual(backend), images(4), backend=backend)
    found = []
    for node in program.graph.nodes:
        kind = name_of(node)
        if kind not in ("conv2d", "linear", "max_pool2d", "flatten", "add"):
            continue
        found.append(kind)
        read = read_by(node)
        assert name_of(read) == "dequantize_per_tensor", node
        if kind in ("conv2d", "linear"):
            assert name_of(node.args[1]) == "dequantize_per_channel"
        (reader,) = node.users
        if name_of(reader) == "relu":
            (reader,) = reader.users
        assert name_of(reader) == "quantize_per_tensor", node
        if kind in ("max_pool2d", "flatten"):
            assert reader.args[1:] == read.args[1:]
    assert sorted(found) == ["add", "conv2d", "conv2d", "conv2d", "flatten", "linear", "linear",
                             "max_pool2d", "max_pool2d"]  # fmt: skip


class Moves(nn.Module):
    """Operations that move values, in all ways that need pairs: a chain, parts, several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1)
        self.left = nn.Conv2d(4, 4, 3)
        self.right = nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        left = self.left(nn.functional.pad(left, (1, 1, 1, 1)))
        right = self.right(nn.functional.pad(right, (1, 1, 1, 1), value=0.0))
        both = torch.cat([left, right], 1).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 16)
        return self.last(nn.functional.max_pool1d(both.transpose(1, 2), 2).transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chains_and_parts_of_values(backend: str) -> None:
    x = torch.randn(4, 4, 8, 8)
    model = ready(Moves(), config(backend), x)
    program = export.pt2e(model, x, backend=backend)
    with torch.no_grad():
        assert steps_apart(run(program, x), model(x), torch.tensor(1e-6)).max() < 1
    for node in calls(program, "conv2d") + calls(program, "linear") + calls(program, "cat"):
        for read in node.all_input_nodes[:2]:
            assert name_of(read).startswith("dequantize_per_"), node
    for kind in ("chunk", "pad", "permute", "reshape", "transpose"):
        assert calls(program, kind)
        for node in calls(program, kind):
            assert name_of(read_by(node)) == "dequantize_per_tensor"


def test_inductor_gets_linear_layers_of_matrices() -> None:
    """torchao's lowering leaves some of those with more axes in float."""
    x = torch.randn(4, 6, 16)
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = ready(net, config("x86"), x)
    for dynamic in (False, True):
        program = export.pt2e(model, x, dynamic_batch=dynamic)
        layers = calls(program, "linear")
        assert [node.meta["val"].dim() for node in layers] == [2, 2, 2, 2]
        for node in layers:
            assert name_of(node.args[0]) == "dequantize_per_tensor"
        with torch.no_grad():
            torch.testing.assert_close(run(program, x), model(x), rtol=0, atol=1e-5)


def test_values_off_the_grid_get_no_pair() -> None:
    """Padding with 1 is not on the grid, and a value that is read in float stays in float."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(nn.functional.pad(x, (1, 1, 1, 1), value=1.0))
            return torch.sin(nn.functional.max_pool2d(y, 2))

    x = torch.randn(2, 3, 8, 8)
    model = ready(Net(), config("x86"), x, output_qconfig=None)
    program = export.pt2e(model, x)
    (pad,) = calls(program, "pad")
    assert pad.args[0].op == "placeholder"
    (pool,) = calls(program, "max_pool2d")
    assert name_of(pool.args[0]) == "conv2d"


class Written(nn.Module):
    """Writes into a quantized value, or into a view of it, and reads both afterwards."""

    def __init__(self, by_view: bool) -> None:
        super().__init__()
        self.stub = torch_ext.QuantStub()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 4, 3)
        self.by_view = by_view

    def forward(self, x: Tensor) -> Tensor:
        x = self.stub(x)
        left = self.left(x)
        part = x[:, :1]
        (part if self.by_view else x).clamp_(min=0.25)
        return left + self.right(x) + torch.sin(part).mean()


@pytest.mark.parametrize("by_view", [False, True])
def test_what_is_written_to_a_quantized_value_is_seen(by_view: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = ready(Written(by_view), config("x86"), x)
    with torch.no_grad():
        torch.testing.assert_close(run(export.pt2e(model, x), x), model(x), rtol=0, atol=1e-6)


class InPlace(nn.Module):
    """Sums into what a convolution computed, as torchvision's ResNets do."""

    def __init__(self, read_later: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.read_later = read_later

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.first(x))
        y = self.second(x)
        part = y[:, :1] if self.read_later else None
        y += x
        y = torch.relu_(y)
        return y if part is None else torch.sin(part) + torch.cos(y)


def test_sums_in_place() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = ready(InPlace(read_later=False), config("xnnpack"), x)
    program = export.pt2e(model, x, backend="xnnpack")  # without a warning of a float output
    assert not calls(program, "copy_") + calls(program, "copy")
    with torch.no_grad():
        torch.testing.assert_close(run(program, x), model(x), rtol=0, atol=1e-6)


def test_a_view_of_a_sum_in_place_sees_it() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = ready(InPlace(read_later=True), config("x86"), x)
    with torch.no_grad():
        torch.testing.assert_close(run(export.pt2e(model, x), x), model(x), rtol=0, atol=1e-6)


def test_the_batch_can_stay_open() -> None:
    model = residual("x86")
    program = export.pt2e(model, images(4), dynamic_batch=True)
    with torch.no_grad():
        for count in (2, 7):
            apart = steps_apart(
                run(program, images(count)), model(images(count)), torch.tensor(1e-3)
            )
            assert apart.max() < 4
    fixed = export.pt2e(model, images(4))
    with pytest.raises((RuntimeError, AssertionError)):
        run(fixed, images(7))


def test_the_program_stays_when_the_model_changes() -> None:
    model = residual("x86")
    program = export.pt2e(model, images(4))
    before = run(program, images(4))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert same_bits(run(program, images(4)), before)
    assert not any(parameter.requires_grad for parameter in program.parameters())


def test_the_program_can_be_saved() -> None:
    program = export.pt2e(residual("xnnpack"), images(4), backend="xnnpack")
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert same_bits(run(torch.export.load(file), images(4)), run(program, images(4)))


def test_keyword_arguments_and_several_outputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
            y = self.fc(x if scale is None else x * scale)
            return {"y": y, "parts": [y.relu(), x]}

    net, given = Net(), {"x": torch.randn(5, 6), "scale": torch.rand(5, 6)}
    net.eval().qconfig = config("x86")  # type: ignore[assignment]
    model = torch_ext.prepare_qat(net, example_inputs=given)
    torch_ext.calibrate(model, [given])
    made = export.pt2e(model, given).module()(**given)
    want = model(**given)
    assert made.keys() == want.keys()
    for left, right in zip((made["y"], *made["parts"]), (want["y"], *want["parts"]), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_importing_needs_neither_torchao_nor_torch_ao() -> None:
    program = (
        "import sys; import torch_ext; torch_ext.export.pt2e\n"
        "assert not {'torchao', 'executorch'} & sys.modules.keys()\n"
        "assert 'torch.ao.quantization.fx._decomposed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
