"""Weights of LSTM, GRU, RNN and their cells: quantized, and what torch's functions compute with."""

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
    calibrate,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    remove_quantizers,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NETS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm, all options": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "proj_size": 3},
    ),
    "gru, no bias": (nn.GRU, {"bias": False, "num_layers": 2}),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}
CELLS: dict[str, type[nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
}


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        out = self.inner(x)
        return out[0] if isinstance(out, tuple) else out


def net(name: str) -> Net:
    torch.manual_seed(0)
    kind, keys = NETS[name]
    model = Net(kind(4, 6, **keys))  # type: ignore[call-arg]
    model.qconfig = qconfig()  # type: ignore[assignment]
    return model


def qconfig() -> torch_ext.QConfig:
    """Weights alone, on a coarse grid."""
    weight = get_default_qconfig(weight_qkwargs={"dtype": "int4"}).weight
    return torch_ext.QConfig(activation=None, weight=weight)


def data() -> Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def quantized(weight: Tensor) -> Tensor:
    """int4, symmetric per row, in plain torch."""
    scale = (weight.double().abs().amax(1, keepdim=True) * 2 / 15).float()
    return (weight / scale).round().clamp(-8, 7) * scale


def with_quantized_weights(model: Net) -> Net:
    """A float copy of a float net, with weights that were quantized by hand."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.inner.named_parameters():
            if name.startswith("weight"):
                parameter.copy_(quantized(parameter))
    return model


@pytest.mark.parametrize("captured", [False, True], ids=["modules", "captured"])
@pytest.mark.parametrize("name", NETS)
def test_the_kernel_uses_the_quantized_weights(name: str, captured: bool) -> None:
    plain = net(name)
    more = {"example_inputs": data()} if captured else {}
    model = prepare_qat(plain, **more)  # type: ignore[arg-type]
    weights = {n for n, _ in plain.inner.named_parameters() if n.startswith("weight")}
    assert set(named_quantizers(model)) == {f"inner.parametrizations.{n}.0" for n in weights}
    assert same_bits(model(data()).detach(), plain(data()).detach())  # in FLOAT
    set_fake_quantize(model, "validation")
    want = with_quantized_weights(plain)(data()).detach()
    assert same_bits(model(data()).detach(), want)
    assert not torch.equal(want, plain(data()))


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    torch.manual_seed(0)
    plain = Net(CELLS[name](4, 6))  # type: ignore[call-arg]
    plain.qconfig = qconfig()  # type: ignore[assignment]
    model = prepare_qat(plain)
    set_fake_quantize(model, "validation")
    x = data()[0]
    assert same_bits(model(x).detach(), with_quantized_weights(plain)(x).detach())
    assert not torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name", NETS)
def test_each_weight_is_computed_once_in_a_forward(name: str) -> None:
    model = prepare_qat(net(name))
    set_fake_quantize(model, "qat")
    calls: dict[str, int] = {}
    for key, quantizer in named_quantizers(model).items():
        calls[key] = 0

        def count(*_: Any, key: str = key) -> None:
            calls[key] += 1

        quantizer.register_forward_hook(count)
    model(data())
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("name", NETS)
def test_training_changes_what_the_kernel_uses(name: str) -> None:
    model = prepare_qat(net(name))
    set_fake_quantize(model, "qat")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(data()) - 0.3).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    set_fake_quantize(model, "validation")
    want = with_quantized_weights(remove_quantizers(model))(data()).detach()
    assert same_bits(model(data()).detach(), want)


@pytest.mark.parametrize("name", NETS)
def test_copies_pickles_moves_and_removal(name: str) -> None:
    plain = net(name)
    model = prepare_qat(plain)
    set_fake_quantize(model, "validation")
    want = model(data()).detach()  # with a graph, whose tensors cannot be copied

    def check(other: nn.Module, result: Tensor = want) -> None:
        assert same_bits(other(data()).detach(), result)

    check(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    check(loaded)
    with torch.no_grad():  # its kernel reads its own weights
        for parameter in loaded.parameters():
            parameter.zero_()
    assert not loaded(data()).any()
    check(model.double().float())
    model.inner.flatten_parameters()
    check(model)
    removed = remove_quantizers(model)
    assert type(removed.inner) is type(plain.inner)
    check(removed, plain(data()).detach())
    check(copy.deepcopy(removed), plain(data()).detach())
    check(model)
    for parameter in [n for n, _ in plain.inner.named_parameters() if n.startswith("weight")]:
        torch.nn.utils.parametrize.remove_parametrizations(model.inner, parameter)
    check(model)


@pytest.mark.parametrize("name", NETS)
def test_functional_call_reads_the_given_weights(name: str) -> None:
    plain = net(name)
    model = prepare_qat(plain)
    set_fake_quantize(model, "validation")
    zeros = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
    assert not torch.func.functional_call(model, zeros, (data(),)).any()
    assert model(data()).any()


@pytest.mark.parametrize("state", ["qat", "validation", "float"])
def test_compiled(state: Any) -> None:
    model = prepare_qat(net("lstm, all options"))
    set_fake_quantize(model, "validation")
    set_fake_quantize(model, state)
    want = model(data()).detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert same_bits(compiled(data()).detach(), want)
    with torch._dynamo.config.patch(allow_rnn=True):  # type: ignore[attr-defined]
        torch._dynamo.reset()
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert same_bits(whole(data()).detach(), want)


def test_exported_to_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    plain = Net(nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True))
    plain.qconfig = get_default_qconfig()  # type: ignore[assignment]
    model = prepare_qat(plain.eval())
    calibrate(model, [data()])
    path = tmp_path / "model.onnx"
    torch_ext.export.onnx(model, data(), path, dynamic_batch=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out, *_) = session.run(None, {session.get_inputs()[0].name: data().numpy()})
    assert torch.allclose(torch.from_numpy(out), model(data()).detach(), atol=1e-6)
