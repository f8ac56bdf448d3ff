"""Runs programs of export.pt2e in the engines: Inductor by torchao, ExecuTorch's XNNPACK."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

Run = Callable[[Tensor], Tensor]


def inductor(program: ExportedProgram, x: Tensor) -> tuple[Run, Counter[str]]:
    """The program compiled, and how often its code calls which kernel of oneDNN for integers.

    Layers that are left in float count as ``"float"``.
    """
    pytest.importorskip("torchao.quantization.pt2e.lowering", reason="needs torchao")
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    with warnings.catch_warnings(), torch.no_grad(), config.patch(freezing=True):
        warnings.simplefilter("ignore")
        lowered = lower_pt2e_quantized_to_x86(program.module(), (x,))
        compiled = torch.compile(lowered)
        _, code = run_and_get_code(compiled, x)
    kernels = Counter(re.findall(r"onednn\.(q\w+)\.\w+\(", "".join(code)))
    kernels["float"] = len(re.findall(r"extern_kernels\.(?:addmm|mm|convolution)\(", "".join(code)))

    def run(x: Tensor) -> Tensor:
        with torch.no_grad(), config.patch(freezing=True):
            made: Tensor = compiled(x)
        return made.clone()

    return run, kernels


def executorch() -> Any:
    """ExecuTorch's runtime; skips the test where it is missing or does not go with this torch."""
    try:
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime
    except ImportError as error:
        pytest.skip(f"needs ExecuTorch that goes with torch {torch.__version__}: {error}")
    return Runtime.get()


def xnnpack(program: ExportedProgram) -> tuple[Run, Counter[str]]:
    """The program in ExecuTorch, and the operations of its graph: all are XNNPACK's if only
    ``executorch_call_delegate`` and ``getitem`` are left."""
    runtime = executorch()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        nodes = [node for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        buffer = edge.to_executorch().buffer
    loaded = runtime.load_program(buffer)
    method = loaded.load_method("forward")
    assert method is not None

    def run(x: Tensor) -> Tensor:
        made: Tensor = method.execute([x])[0]
        assert loaded  # it owns what the method uses
        return made.clone()

    return run, Counter(getattr(node.target, "__name__", str(node.target)) for node in nodes)
