"""The same model by torchao's PT2E, with its quantizer for x86."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from zoo.entry import Inputs


def converted(model: nn.Module, batches: list[Inputs]) -> nn.Module:
    """Exported, calibrated and converted: matmuls quantized too, as the quantizer can."""
    args, kwargs = batches[0]
    graph = torch.export.export(model, args, kwargs, strict=False).module()
    quantizer = X86InductorQuantizer()
    config = get_default_x86_inductor_quantization_config()
    quantizer.set_global(config).set_function_type_qconfig(torch.matmul, config)
    prepared = prepare_pt2e(graph, quantizer)
    move_exported_model_to_eval(prepared)
    for args, kwargs in batches:
        prepared(*args, **kwargs)
    made: nn.Module = convert_pt2e(prepared, fold_quantize=False)
    return made


def scales(graph: nn.Module) -> list[Tensor]:
    """Of the graph's quantize and dequantize operations."""
    found: list[Tensor] = []
    assert isinstance(graph, torch.fx.GraphModule)
    for node in graph.graph.nodes:
        if node.op == "call_function" and "quantize_per" in str(node.target):
            scale: Any = node.args[1]
            if isinstance(scale, torch.fx.Node):
                scale = _attribute(graph, str(scale.target))
            found.append(torch.as_tensor(scale, dtype=torch.float32))
    return found


def _attribute(graph: nn.Module, name: str) -> Any:
    holder, _, last = name.rpartition(".")
    return getattr(graph.get_submodule(holder), last)
