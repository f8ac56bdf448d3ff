"""Attention and Transformer layers without an example: what they read quantized, and how."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counted_graphs import compile_counting
from prepare_steps import CONFIG, names, ready, run_calibration
from torch_ext import calibrate, named_quantizers, remove_quantizers, set_fake_quantize

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::torch_ext.QuantizationWarning"),
]
X = torch.linspace(-2, 3, 80).sin().view(2, 5, 8)
OTHER = torch.linspace(-1, 4, 96).cos().view(2, 6, 8)


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def attention(**keys: Any) -> nn.MultiheadAttention:
    torch.manual_seed(3)
    return nn.MultiheadAttention(8, 2, batch_first=True, **keys).eval()


def rounded(quantizer: Any, x: Tensor) -> Tensor:
    scale, zero_point = quantizer.calculate_qparams()
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), -128, 127)


def by_hand(net: nn.Module, query: Tensor, key: Tensor, value: Tensor, separate: bool) -> Tensor:
    """Attention with two heads of four channels, of reads and weights rounded by torch's own op."""
    found = named_quantizers(net)

    def read(x: Tensor, name: str) -> Tensor:
        return rounded(found[f"input_quantizers.{name if separate else 'query'}"], x)

    weights = net.in_proj_weight.chunk(3)  # type: ignore[operator, union-attr]
    biases = net.in_proj_bias.chunk(3)  # type: ignore[operator, union-attr]
    given = (read(query, "query"), read(key, "key"), read(value, "value"))
    q, k, v = (
        F.linear(x, weight, bias).unflatten(2, (2, 4)).transpose(1, 2)
        for x, weight, bias in zip(given, weights, biases, strict=True)
    )
    mixed = torch.softmax(q @ k.mT / 2, -1) @ v
    joined = mixed.transpose(1, 2).flatten(2)
    out = net.out_proj
    joined = rounded(found["out_proj.input_quantizers.input"], joined)
    return F.linear(joined, out.weight, out.bias)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_attention_is_that_of_rounded_reads(same: bool, need_weights: bool) -> None:
    net = ready(attention())
    key, value = (X, X) if same else (OTHER, OTHER * 2)
    set_fake_quantize(net, "calibration")
    with torch.no_grad():
        net(X, key, value, need_weights=need_weights)
    set_fake_quantize(net, "validation")
    with torch.no_grad():
        have = net(X, key, value, need_weights=need_weights)[0]
        want = by_hand(net, X, key, value, separate=not same)
        float_out = attention()(X, key, value)[0]
    # Apart by float rounding, where a value may fall on another level of out_proj's grid.
    assert float((have - want).abs().max()) < 0.01
    assert float((have - want).abs().mean()) < 1e-4
    assert float((have - float_out).abs().mean()) > 1e-3
    tally = {n: int(q.observer.tally[0, 0]) for n, q in named_quantizers(net).items()}
    assert tally["input_quantizers.query"] == X.numel()
    assert tally["input_quantizers.key"] == (0 if same else key.numel())
    assert tally["out_proj.input_quantizers.input"] == X.numel()


def test_in_float_the_fused_path_computes_as_before() -> None:
    for make, inputs in ((encoder, (X,)), (attention, (X, X, X))):
        plain, net = make(), ready(make())
        with torch.no_grad():
            have, want = net(*inputs), plain(*inputs)
        pairs = [(have, want)] if isinstance(have, Tensor) else zip(have, want, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_every_part_of_a_transformer_reads_quantized_in_eval_mode() -> None:
    net = ready(encoder())
    inside = ("self_attn.input_quantizers.query", "self_attn.out_proj.input_quantizers.input")
    inside += ("linear1.input_quantizers.input", "linear2.input_quantizers.input")
    assert {f"layers.{i}.{name}" for i in range(2) for name in inside} < names(net)
    run_calibration(net, X)
    found = named_quantizers(net)
    assert all(bool(found[f"layers.{i}.{name}"].solved) for i in range(2) for name in inside)
    with torch.no_grad():
        out, want = net(X), encoder()(X)
    assert 0 < float((out - want).abs().max()) < 0.5


@pytest.mark.parametrize("make", [encoder, attention])
def test_compiled_exported_and_copied_it_computes_the_same(make: Any) -> None:
    net = ready(make())
    inputs = (X,) if isinstance(net, nn.TransformerEncoder) else (X, X, X)
    run_calibration(net, *inputs)

    def first(out: Any) -> Tensor:
        return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]

    with torch.no_grad():
        want = first(net(*inputs))
        for strict in (True, False):
            program = torch.export.export(net, inputs, strict=strict)
            calls = [str(node.target) for node in program.graph.nodes]
            used = [name for name, q in named_quantizers(net).items() if bool(q.solved)]
            assert calls.count("torch_ext.fake_quant.default") == len(used)
            assert torch.equal(first(program.module()(*inputs)), want)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(first(twin(*inputs)), want)
    compiled, graphs = compile_counting(net)
    for _ in range(2):
        for state in ("float", "calibration", "validation", "qat"):
            set_fake_quantize(net, state)
            twin = copy.deepcopy(net)
            have, want = first(compiled(*inputs)), first(twin(*inputs))
            assert torch.equal(have, want), state
        assert len(graphs) == 4
    back = remove_quantizers(net)
    assert [type(m) for m in back.modules()] == [type(m) for m in make().modules()]
    assert back.state_dict().keys() == make().state_dict().keys()


class OwnForward(nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:  # type: ignore[override]
        return super().forward(query, key, value, need_weights=False)


def test_out_proj_stays_float_in_attention_of_another_forward() -> None:
    net = ready(OwnForward(8, 2, batch_first=True))
    assert "out_proj.input_quantizers.input" not in names(net)
    run_calibration(net, X, OTHER, OTHER)
    assert bool(named_quantizers(net)["input_quantizers.key"].solved)


def test_parts_of_attention_that_stay_float() -> None:
    net = ready(attention(), mapping={"out_proj": None})
    assert not any(name.startswith("out_proj") for name in names(net))
    run_calibration(net, X, X, X)
    net = ready(attention(), None, mapping={"out_proj": CONFIG})
    assert names(net) == {"out_proj.input_quantizers.input", "out_proj.parametrizations.weight.0"}
    run_calibration(net, X, X, X)
    assert bool(named_quantizers(net)["out_proj.input_quantizers.input"].solved)


def test_one_tensor_for_query_key_and_value_is_no_warning() -> None:
    net = ready(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(net, [torch.randn(2, 3, 8)])
