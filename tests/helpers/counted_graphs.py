"""Compiles a model with a backend that runs the graphs as they are and keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compile_counting(model: nn.Module) -> tuple[Any, list[torch.fx.GraphModule]]:
    """The compiled model (``fullgraph=True``), and the list that each of its graphs is added to."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=count, fullgraph=True), graphs
