"""Finds the batch norms that follow a layer in a recorded run of the model.

Tensors decide, not classes: a layer is what calls a convolution or linear function with a parameter
for its weight, whatever its forward does before that; a norm is a module whose buffers
``F.batch_norm`` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.prepare.batch_norms.look_alikes import look_alikes, whole_call
from torch_ext.prepare.batch_norms.pair import (
    Norms,
    Pair,
    Step,
    all_norms,
    has_own_forward,
    problem,
)
from torch_ext.prepare.batch_norms.steps import steps_behind
from torch_ext.prepare.insertion.operations import operation, weight_of
from torch_ext.prepare.insertion.recording import Recording
from torch_ext.prepare.insertion.run_graph import run_node
from torch_ext.utils.operations import KEEP_VALUES

# The axis of a layer's output that holds its channels.
_CHANNELS = {
    "linear": -1,
    **{f"conv{n}d": -1 - n for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": -1 - n for n in (1, 2, 3)},
}
_CHANGES_VALUES = ("max_pool", "dropout", "pad")  # of KEEP_VALUES, for gains of both signs
_NOT_CALLED = "the example does not call it in eval mode"
_TENSORS = ("running_mean", "running_var", "weight", "bias")


class _LeftError(Exception):
    """Why a norm cannot be folded."""


def observed_norms(recordings: list[Recording]) -> Norms:
    """The pairs of runs in eval mode, and the reason for each other norm.

    A pair is the same in all runs in which its norm is called. Functions that read the buffers of a
    module that is no batch norm are named by that module.
    """
    first, *others = [_norms(recording) for recording in recordings]
    pairs, left = dict(first.pairs_by_norm), dict(first.left)
    for other in others:
        for norm, pair in other.pairs_by_norm.items():
            if left.get(norm) == _NOT_CALLED:
                pairs[norm] = pair
                del left[norm]
            elif norm in pairs and pairs[norm] != pair:
                left[norm] = f"it follows {pairs[norm].layer} or {pair.layer}"
        for norm, why in other.left.items():
            if why != _NOT_CALLED:
                left[norm] = why
    return Norms([pair for norm, pair in pairs.items() if norm not in left], left)


def _norms(recording: Recording) -> Norms:
    model = recording.model
    calls: dict[str, list[fx.Node]] = {name: [] for name in all_norms(model)}
    others = look_alikes(model)
    for node in recording.graph.nodes:
        name = _norm_of(recording, node)
        if name is not None and name not in others:
            calls.setdefault(name, []).append(node)
    calls.update((name, []) for name in others)
    pairs, left = [], {}
    for name, nodes in calls.items():
        try:
            find = _look_alike if name in others else _pair
            pairs.append(find(recording, name, nodes))
        except _LeftError as reason:
            left[name] = str(reason)
    layers = Counter(pair.weight for pair in pairs)
    for pair in pairs:
        if layers[pair.weight] > 1:
            left[pair.norm] = f"several norms follow {pair.layer}"
        elif why := problem(model, pair):
            left[pair.norm] = why
    return Norms([pair for pair in pairs if pair.norm not in left], left)


def _norm_of(recording: Recording, node: fx.Node) -> str | None:
    """The module whose norm a node is; None for other nodes."""
    if node.op == "call_module":
        module = recording.model.get_submodule(str(node.target))
        return str(node.target) if isinstance(module, _BatchNorm) else None
    if operation(recording, node) != "batch_norm":
        return None
    for tensor in node.all_input_nodes[1:]:
        holder, _, own = str(tensor.target).rpartition(".")
        if tensor.op == "get_attr" and own == "running_mean":
            return holder
    owner = recording.owners[node]  # without running statistics
    return owner if isinstance(recording.model.get_submodule(owner), _BatchNorm) else None


def _pair(recording: Recording, name: str, nodes: list[fx.Node]) -> Pair:
    """The pair of a norm; raises _LeftError where there is none."""
    norm = recording.model.get_submodule(name)
    if not nodes:
        if any(call.module == name for call in recording.all_calls):
            raise _LeftError("its forward does not call F.batch_norm")
        raise _LeftError(_NOT_CALLED)
    if len(nodes) > 1:
        raise _LeftError(f"it is called {len(nodes)} times")
    node = nodes[0]
    steps: tuple[Step, ...] = ()
    if node.op == "call_function":
        steps = _steps(recording, name, node)
    elif _computes_own(recording, norm, name):
        raise _LeftError(f"its own forward ({type(norm).__name__}) is not looked into")
    operand = node.args[0] if node.args else node.kwargs.get("input")
    assert isinstance(operand, fx.Node)
    return _pair_before(recording, name, operand, {node}, steps)


def _look_alike(recording: Recording, name: str, _: list[fx.Node]) -> Pair:
    call = whole_call(recording, name)
    if isinstance(call, str):
        raise _LeftError(f"it has the buffers of a batch norm, and {call}")
    return _pair_before(recording, name, *call, ())


def _pair_before(
    recording: Recording,
    name: str,
    operand: fx.Node,
    nodes: set[fx.Node],
    steps: tuple[Step, ...],
) -> Pair:
    """The pair of a norm; raises _LeftError where no layer makes its operand for it alone.

    ``nodes``: those of the norm.
    """
    for tensor in _reads_of(recording, [f"{name}.{own}" for own in _TENSORS]):
        if not set(tensor.users) <= nodes:
            raise _LeftError(f"something else reads {tensor.target}")
    layer, moves = _layer_before(recording, operand)
    for step in (layer, *moves):
        alone = set(step.users) <= nodes if step is operand else len(step.users) == 1
        if not alone or step in recording.kept:
            raise _LeftError(f"something else reads the output of {_shown(recording, layer)}")
    pair = _layer_pair(recording, layer, name, steps)
    if not _keeps_channels(recording, layer, moves, operand):
        raise _LeftError(f"it normalizes over another axis than the channels of {pair.layer}")
    return pair


def _computes_own(recording: Recording, norm: torch.nn.Module, name: str) -> bool:
    vars(norm).pop("forward", None)  # the recording's
    return has_own_forward(norm)


def _steps(recording: Recording, name: str, node: fx.Node) -> tuple[Step, ...]:
    if recording.owners[node] != name:
        raise _LeftError("F.batch_norm reads its buffers without a call of the module")
    steps = steps_behind(recording, name, node)
    if isinstance(steps, str):
        raise _LeftError(steps)
    return steps


def _layer_before(recording: Recording, operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The layer's node, and what moves its output's values, from the norm backwards."""
    step, moves = operand, []
    while (name := operation(recording, step)) not in _CHANNELS:
        before = step.args[0] if step.args else None
        moves_values = name in KEEP_VALUES and not any(part in name for part in _CHANGES_VALUES)
        if not moves_values or not isinstance(before, fx.Node):
            raise _LeftError(f"it reads {_shown(recording, step)}, not the output of a layer")
        moves.append(step)
        step = before
    return step, moves


def _layer_pair(recording: Recording, layer: fx.Node, norm: str, steps: tuple[Step, ...]) -> Pair:
    """The pair of a layer's node; raises _LeftError where its parameters have other readers."""
    kind = operation(recording, layer)
    transposed = "transpose" in kind
    groups: object = 1
    if layer.op == "call_module":
        name = str(layer.target)
        module = recording.model.get_submodule(name)
        weight, bias = f"{name}.weight", f"{name}.bias"
        groups = getattr(module, "groups", 1)
        calls = [n for n in recording.graph.nodes if n.op == "call_module" and n.target == name]
        if len(calls) > 1:
            raise _LeftError(f"{name} is called {len(calls)} times")
    else:
        source = weight_of(layer)
        if source is None or source.op != "get_attr":
            raise _LeftError(f"the forward of {recording.owners[layer]} computes its weight")
        weight = str(source.target)
        name = weight.rpartition(".")[0]
        given = _argument(layer, 2, "bias")
        if isinstance(given, fx.Node) and given.op != "get_attr":
            raise _LeftError(f"the forward of {recording.owners[layer]} computes its bias")
        bias = str(given.target) if isinstance(given, fx.Node) else f"{name}.bias"
        groups = _argument(layer, 6, "groups")
        if len(source.users) > 1:
            raise _LeftError(f"{name} is called several times, or something else reads its weight")
    for reader in _reads_of(recording, [weight, bias]):
        if set(reader.users) - {layer}:
            raise _LeftError(f"something else reads {reader.target}")
    groups = groups if transposed and isinstance(groups, int) else 1
    return Pair(name, norm, weight, bias, transposed, groups, steps)


def _reads_of(recording: Recording, names: list[str]) -> Iterator[fx.Node]:
    for node in recording.graph.nodes:
        if node.op == "get_attr" and node.target in names:
            yield node


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


@torch.no_grad()
def _keeps_channels(
    recording: Recording, layer: fx.Node, moves: list[fx.Node], operand: fx.Node
) -> bool:
    """Whether channel c of the layer is what the norm takes for channel c.

    What moves values is run once more, on the numbers of the channels.
    """
    value = recording.values[layer]
    axis = _CHANNELS[operation(recording, layer)] % value.dim()
    count = value.shape[axis]
    numbers = torch.arange(1, count + 1, device=value.device)
    shape = [-1 if i == axis else 1 for i in range(value.dim())]
    moved: object = numbers.view(shape).expand(value.shape).contiguous()
    for step in reversed(moves):
        if len(step.all_input_nodes) != 1:
            return False
        moved = run_node(recording, step, dict.fromkeys(step.all_input_nodes, moved))
    if not isinstance(moved, Tensor) or moved.dim() < 2 or moved.shape[1] != count:
        return False
    wanted = numbers.view([-1 if i == 1 else 1 for i in range(moved.dim())])
    return bool((moved == wanted).all())


def _shown(recording: Recording, node: fx.Node) -> str:
    """What made a value, for messages."""
    if node.op == "placeholder":
        return f"the argument {node.target}"
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    owner = recording.owners[node]
    name = operation(recording, node) or str(node.target)
    if name in _CHANNELS:
        return owner or name
    return f"the result of {name} in {owner or 'the model'}"
