"""The graph of one run of a model, with the values of the example."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


class RunGraph:
    """Nodes for the functions and modules that a run called, in order.

    By node: ``values`` (of the example), ``owners`` (the module whose forward it stands in),
    ``functions`` (torch's name of a function) and ``written`` (what an in-place operation writes
    to).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.owners: dict[fx.Node, str] = {}
        self.functions: dict[fx.Node, str] = {}
        self.written: dict[fx.Node, fx.Node] = {}
