"""torch_ext.pt2e.FloatMasks: attention masks in graphs that PT2E prepares with specs of ours."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_graphs import WEIGHT  # isort: skip

from torchao.quantization.pt2e import disable_observer
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer
from torchao.testing.pt2e._xnnpack_quantizer_utils import QuantizationConfig

from nets import masked
from torch_ext import QuantizationWarning, pt2e

X = torch.randn(4, masked.TOKENS, masked.DIM, generator=torch.Generator().manual_seed(2))
OTHER = X * torch.tensor([1.0] * 6 + [-1.5] * 2)[:, None]
FULL = torch.ones(4, masked.TOKENS, dtype=torch.bool)
PADDED = torch.arange(masked.TOKENS).expand(4, -1) < 6

aten = torch.ops.aten


def xnnpack(qat: bool = False) -> Quantizer:
    """Annotates linear layers and, which matters here, every sum."""
    make: Any = pt2e.fake_quant_spec if qat else pt2e.observer_spec
    keys = {"averaging_constant": 0.0} if qat else {}
    activation = make(dtype="int8", qscheme="per_tensor_affine", **keys)
    weight = make(quant_min=-127, **WEIGHT, **keys)
    return XNNPACKQuantizer().set_global(
        QuantizationConfig(activation, activation, weight, None, qat)
    )


def exported(net: nn.Module, *inputs: Tensor) -> GraphModule:
    return torch.export.export(net, inputs, strict=True).module()


def prepared(net: nn.Module, mask: Tensor, quantizer: Any = None, qat: bool = False) -> GraphModule:
    chosen = pt2e.FloatMasks(xnnpack(qat)) if quantizer is None else quantizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare = prepare_qat_pt2e if qat else prepare_pt2e
        return prepare(exported(net.train(qat), X, mask), chosen)


def quantized_adds(model: GraphModule) -> list[str]:
    """Sums that read or give what a quantizer made."""
    kinds = (torch.ops.quantized_decomposed.dequantize_per_tensor.default,)
    adds = [n for n in model.graph.nodes if n.target in (aten.add.Tensor, aten.add_.Tensor)]
    return [n.name for n in adds if any(m.target in kinds for m in n.all_input_nodes)]


def unmasked(y: Tensor) -> Tensor:
    return y[:, :6] if y.dim() == 3 else y


# Those whose mask is floating where it is added, and that torch.export and torchao take.
KINDS = [
    "-inf", "-1e4", "-100", "float 1 - m", "sdpa, float", "AddedInPlace", "AddedByAModule", "Cast",
    "Clamped", "Capped", "Scaled", "Sinks", "Alibi", "Windows", "OneMinus",
    "FilledAndAdded", "Triangle", "Sigmoid", "ByHand", "SdpaOfASum", "Einsum", "Baddbmm",
    "multihead, float",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_leak(kind: str, one_thread: None) -> None:
    net = masked.NETS[kind]().eval()
    full, mask = net.mask(FULL), net.mask(PADDED)
    model = prepared(net, mask)
    with torch.no_grad():
        model(X, full)
        model(X, mask)
        with warnings.catch_warnings():
            warnings.simplefilter("error", QuantizationWarning)
            done = convert_pt2e(model)
        want = unmasked(net(X, mask))
        assert torch.equal(unmasked(done(X, mask)), unmasked(done(OTHER, mask)))
        off = float((unmasked(done(X, mask)) - want).norm() / want.norm())
    assert off < 0.05
    # Gemma's scores are a product, which XNNPACK quantizes; the mask and its sum are float.
    assert len(quantized_adds(done)) == (kind == "Capped")


@pytest.mark.parametrize("kind", ["-inf", "-1e4", "Windows", "Sinks"])
def test_no_leak_in_training(kind: str, one_thread: None) -> None:
    net = masked.NETS[kind]()
    mask = net.mask(PADDED)
    model = prepared(net, mask, qat=True)
    model(X, mask).square().sum().backward()
    with torch.no_grad():
        assert torch.equal(unmasked(model(X, mask)), unmasked(model(OTHER, mask)))
    model.apply(disable_observer)
    done = convert_pt2e(model)
    with torch.no_grad():
        assert torch.equal(unmasked(done(X, mask)), unmasked(done(OTHER, mask)))


def test_without_it_the_mask_leaks_and_convert_says_so() -> None:
    net = masked.NETS["-inf"]().eval()
    mask = net.mask(PADDED)
    model = prepared(net, mask, xnnpack())
    with torch.no_grad():
        model(X, mask)
        with pytest.warns(QuantizationWarning, match=r"\b8 infinite values.*pt2e\.FloatMasks"):
            done = convert_pt2e(model)
        assert not torch.equal(unmasked(done(X, mask)), unmasked(done(OTHER, mask)))
    net = masked.NETS["-1e4"]().eval()
    model = prepared(net, net.mask(PADDED), xnnpack())
    model(X, net.mask(PADDED))
    with pytest.warns(QuantizationWarning, match=r"values that reach -1e4.*pt2e\.FloatMasks"):
        convert_pt2e(model)


class Net(nn.Module):
    """A residual, a head with a softmax, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(masked.DIM, masked.DIM), nn.Linear(masked.DIM, 4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x) + other)).softmax(-1)


def test_other_sums_and_heads_are_annotated_as_before() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    models = [prepared(net, X, q) for q in (xnnpack(), pt2e.FloatMasks(xnnpack()))]
    for model in models:
        model(X, OTHER)
    plain, wrapped = map(convert_pt2e, models)
    assert [n.target for n in plain.graph.nodes] == [n.target for n in wrapped.graph.nodes]
    assert torch.equal(plain(X, OTHER), wrapped(X, OTHER))
    assert len(quantized_adds(wrapped)) == 1


class Sharing(Quantizer):
    """A transposition of the scores, and its reader, share the quantizer of the sum."""

    def annotate(self, model: GraphModule) -> GraphModule:
        spec = pt2e.observer_spec()
        for node in model.graph.nodes:
            if node.target is aten.add.Tensor:
                made = QuantizationAnnotation({}, spec, _annotated=True)
                made.input_qspec_map = dict.fromkeys(node.all_input_nodes, spec)
                self.add = node
            elif node.target in (aten.neg.default, aten.mean.dim):
                shared = SharedQuantizationSpec(self.add)
                made = QuantizationAnnotation({self.add: shared}, shared, _annotated=True)
            else:
                continue
            node.meta["quantization_annotation"] = made
        return model

    def validate(self, model: GraphModule) -> None:
        self.validated = True


class Both(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        scores = x @ x.transpose(1, 2) + mask
        return scores.softmax(-1), -scores, scores.mean(-1)


def test_what_shared_a_masks_spec_keeps_it() -> None:
    inner = Sharing()
    mask = torch.zeros(4, 1, masked.TOKENS)
    model = prepared(Both().eval(), mask, pt2e.FloatMasks(inner))
    assert inner.validated
    model(X, mask)
    done = convert_pt2e(model)
    assert quantized_adds(done) == []
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    scales = {n.args[1] for n in done.graph.nodes if n.target is quantize}
    assert len(scales) == 1
    assert torch.equal(done(X, mask)[0], Both()(X, mask)[0])


def test_it_wraps_quantizers_only() -> None:
    with pytest.raises(TypeError, match="expected quantizer to be a PT2E Quantizer, got str"):
        pt2e.FloatMasks("x86")  # type: ignore[arg-type]
