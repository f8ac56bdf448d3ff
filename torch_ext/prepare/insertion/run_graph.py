"""The graph of one run of a model, and what in it depends on data or on random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

# The size of what these return depends on values.
_SIZED = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nms", "bincount")
# These return a tensor of the first argument's size, whatever they put into it.
_OF_FIRST = (
    "index_add",
    "index_copy",
    "index_put",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "masked_fill",
    "masked_scatter",
    "written",
)
_RANDOM = (
    "rand",
    "randn",
    "randint",
    "randperm",
    "rand_like",
    "randn_like",
    "randint_like",
    "normal",
    "uniform",
    "random",
    "bernoulli",
    "multinomial",
)


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


def run_node(run: RunGraph, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a node makes of other values; None if that is not known.

    ``values``: of the nodes that it reads. What it changes of its module is not restored.
    """
    args, kwargs = tree_map(
        lambda v: values[v] if isinstance(v, fx.Node) else v, (node.args, node.kwargs)
    )
    try:
        if node.op == "call_module":
            module = run.model.get_submodule(str(node.target))
            return type(module).forward(module, *args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None  # an argument that a graph does not hold


def sized_by_data(run: RunGraph) -> set[fx.Node]:
    """Nodes whose shape depends on the values of others: what a mask picks, and what follows."""
    found: set[fx.Node] = set()
    for node in run.graph.nodes:
        name = run.functions.get(node, getattr(node.target, "__name__", ""))
        sources = node.all_input_nodes
        if node in run.written or name in _OF_FIRST:
            sources = sources[:1]
        begins = name in _SIZED or (name == "where" and len(node.args) == 1)
        if begins or _is_picked_by_mask(run, node, name) or not found.isdisjoint(sources):
            found.add(node)
    return found


def _is_picked_by_mask(run: RunGraph, node: fx.Node, name: str) -> bool:
    if name == "repeat_interleave":
        return len(node.args) > 1 and isinstance(node.args[1], fx.Node)
    if name != "getitem":
        return False
    picks = [run.values[i] for i in tree_leaves(node.args[1:]) if isinstance(i, fx.Node)]
    return any(isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8) for p in picks)


def made_of_random_numbers(run: RunGraph) -> set[fx.Node]:
    """Nodes that random numbers alone decide, such as a number drawn to skip a layer."""
    found: set[fx.Node] = set()
    for node in run.graph.nodes:
        sources = node.all_input_nodes
        drawn = run.functions.get(node, "") in _RANDOM
        if drawn or (sources and found.issuperset(sources)):
            found.add(node)
    return found
