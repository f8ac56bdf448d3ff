"""Finds the batch norms that follow a layer without an example: only what is certain.

That is in a symbolic trace (``torch.fx``), which sees all readers of a tensor, between modules that
run torch's own forwards. Where the forward cannot be traced, it is a layer and a norm that are
consecutive in a Sequential.
"""

from __future__ import annotations

import itertools
from collections import Counter

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.prepare.batch_norms.look_alikes import look_alikes
from torch_ext.prepare.batch_norms.pair import (
    LAYERS,
    Norms,
    Pair,
    all_norms,
    has_own_forward,
    pair_of,
    problem,
)
from torch_ext.prepare.module_classes import copied
from torch_ext.utils.modes import undisturbed


class LayerTracer(fx.Tracer):
    """Traces layers and batch norms, of whatever class, as one node each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def traced_norms(model: nn.Module) -> Norms:
    """The pairs that are certain, and the reason for each other batch norm."""
    pairs: list[Pair] = []
    left: dict[str, str] = {}
    twin = copied("fuse", model).eval()  # tracing runs the forward, which may change the model
    try:
        with undisturbed(twin):
            graph = LayerTracer().trace(twin)
    except Exception as error:  # the user's forward: anything may come
        before = _before_in_sequentials(model)
        text = str(error).partition("\n")[0]
        reason = f"the forward cannot be traced: {type(error).__name__}: {text}"
        left = {name: reason for name in all_norms(model) if name not in before}
        candidates = [(layer, norm) for norm, layer in before.items()]
    else:
        candidates, left = _candidates(graph, model)
    for layer, norm in candidates:
        pair = pair_of(model, layer, norm)
        own = [n for n in (layer, norm) if has_own_forward(model.get_submodule(n))]
        if own:
            kind = type(model.get_submodule(own[0])).__name__
            left[norm] = f"{own[0]} is a {kind}, which has a forward of its own"
        elif reason := problem(model, pair):
            left[norm] = reason
        else:
            pairs.append(pair)
    for name in look_alikes(model):
        kind = type(model.get_submodule(name)).__name__
        left[name] = f"it has the buffers of a batch norm, and is a {kind}"
    return Norms(pairs, left)


def _candidates(graph: fx.Graph, model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Layer and norm that are called once each, one on the result of the other."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(modules[node.target], []).append(node)
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    candidates: list[tuple[str, str]] = []
    left: dict[str, str] = {}
    for name, norm in all_norms(model).items():
        nodes = calls.get(norm, [])
        before = nodes[0].all_input_nodes[0] if nodes else None
        if before is None:
            left[name] = "the forward does not call it in eval mode"
        elif before.op != "call_module" or not isinstance(modules[str(before.target)], LAYERS):
            left[name] = f"it reads {before.name}, not the output of a layer"
        elif len(calls[modules[str(before.target)]]) > 1 or len(nodes) > 1:
            left[name] = f"it or {before.target} is called more than once"
        elif len(before.users) > 1:
            left[name] = f"something else reads the output of {before.target}"
        elif read & {name, str(before.target)}:
            left[name] = f"something else reads a parameter of it or of {before.target}"
        else:
            candidates.append((str(before.target), name))
    return candidates, left


def _before_in_sequentials(model: nn.Module) -> dict[str, str]:
    """The layer before each norm that follows one in a Sequential."""
    names = {module: name for name, module in model.named_modules()}
    uses = Counter(m for parent in names for m in parent._modules.values())
    found = {}
    for parent in names:
        if not isinstance(parent, nn.Sequential) or has_own_forward(parent):
            continue
        for layer, norm in itertools.pairwise(parent):
            once = uses[layer] == uses[norm] == 1
            if isinstance(layer, LAYERS) and isinstance(norm, _BatchNorm) and once:
                found[names[norm]] = names[layer]
    return found
