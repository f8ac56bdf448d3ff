"""Graphs that torchao's PT2E prepared with specs of ours, and what converted ones quantize with."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

pytest.importorskip("torchao.quantization.pt2e", reason="needs torchao: run `make test`")

from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    QuantizationConfig,
    X86InductorQuantizer,
)

WEIGHT: dict[str, Any] = {"qscheme": "per_channel_symmetric", "ch_axis": 0}


def prepared(
    model: nn.Module, images: Tensor, activation: Any, weight: Any, qat: bool = False
) -> GraphModule:
    """Exported and prepared, values and weights annotated as torchao's x86 backend asks."""
    config = QuantizationConfig(activation, activation if qat else None, weight, None, qat)
    graph = torch.export.export(model.train(qat), (images,), strict=True).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare = prepare_qat_pt2e if qat else prepare_pt2e
        return prepare(graph, X86InductorQuantizer().set_global(config))


def quantizations(model: GraphModule, per_channel: bool = False) -> list[tuple[Any, ...]]:
    """Scale, zero point, least and greatest integer and dtype (per channel: the axis before them)
    of what is dequantized, in the graph's order."""
    kind = "per_channel" if per_channel else "per_tensor"
    target = getattr(torch.ops.quantized_decomposed, f"dequantize_{kind}").default
    found = []
    for node in model.graph.nodes:
        if node.target is target:
            values = node.args[1:]
            found.append(tuple(getattr(model, v.target) if hasattr(v, "op") else v for v in values))
    return found


def of_input(model: GraphModule) -> tuple[Any, ...]:
    """The same of the graph's only input."""
    (placeholder,) = (node for node in model.graph.nodes if node.op == "placeholder")
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    (found,) = (node.args[1:] for node in placeholder.users if node.target is quantize)
    return tuple(found)
