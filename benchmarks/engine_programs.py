"""Runs programs of export.pt2e in Inductor and in ExecuTorch's XNNPACK, beside float."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_ext.export.engines.timing import side_by_side


class Lowered(NamedTuple):
    """A program in its engine."""

    integer: int  # layers that it computes in integers
    int8_ms: float
    float_ms: float
    call: Callable[[Tensor], Tensor]


def inductor(net: nn.Module, program: Any, example: Tensor, seconds: float) -> Lowered:
    """torchao's lowering for x86, then ``torch.compile`` with weights as constants."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    def call(x: Tensor) -> Tensor:
        with torch.no_grad(), config.patch(freezing=True):
            result: Tensor = compiled(x)
        return result.clone()

    def plain() -> Any:
        with torch.no_grad(), config.patch(freezing=True):
            return floating(example)

    with torch.no_grad(), config.patch(freezing=True):
        lowered = lower_pt2e_quantized_to_x86(program.module(), (example,))
        compiled, floating = torch.compile(lowered), torch.compile(net)
        _, codes = run_and_get_code(compiled, example)
    kernels = re.findall(r"onednn\.q(?:conv|linear)\w*\.\w+\(", "".join(codes))
    times = side_by_side(lambda: call(example), plain, seconds)
    return Lowered(len(kernels), *times, call)


def xnnpack(net: nn.Module, program: Any, example: Tensor, seconds: float) -> Lowered:
    """ExecuTorch with XNNPACK as the only delegate, on one thread."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)  # before programs are loaded, which keep the pool of that time
    runtime = Runtime.get()
    kept: list[Any] = []

    def load(exported: Any) -> tuple[Any, Any]:
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        outside = edge.exported_program().graph
        buffer = edge.to_executorch().buffer
        kept.append(buffer)  # the runtime reads it without a copy
        loaded = runtime.load_program(buffer)
        kept.append(loaded)
        return loaded.load_method("forward"), outside

    with torch.no_grad():
        plain, _ = load(torch.export.export(net, (example,)))
    layers = re.compile(r"aten\.(conv\w*|linear|addmm|mm)\b")
    total = sum(bool(layers.search(str(n.target))) for n in program.graph.nodes)
    quantized, outside = load(program)
    left = sum(bool(layers.search(str(n.target))) for n in outside.nodes)

    def call(x: Tensor) -> Tensor:
        assert kept
        result: Tensor = quantized.execute([x])[0]
        return result.clone()

    times = side_by_side(lambda: call(example), lambda: plain.execute([example]), seconds)
    return Lowered(total - left, *times, call)
