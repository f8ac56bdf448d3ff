"""What the module of a batch norm applies behind the norm: an activation, a dropout."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from torch_ext.prepare.batch_norms.pair import Step
from torch_ext.prepare.insertion.operations import DROPOUTS
from torch_ext.prepare.insertion.plan import CallPlan
from torch_ext.prepare.insertion.recording import Recording


def steps_behind(recording: Recording, name: str, norm: fx.Node) -> tuple[Step, ...] | str:
    """The children and functions that follow the norm in its module's call, each on the result
    of the one before; or why the call is no such chain.

    Args:
        recording: of a run in eval mode in which the module is called once.
        name: of the module.
        norm: the node of its ``F.batch_norm``.
    """
    module = recording.model.get_submodule(name)
    call = next(call for call in recording.all_calls if call.module == name)
    groups = _groups(recording, name, norm)
    if problem := _problem(module, call, groups):
        return problem
    last = norm
    steps: list[Step] = []
    for child, nodes in groups:
        inputs = {
            source
            for node in nodes
            for source in node.all_input_nodes
            if source not in nodes and source.op != "get_attr"
        }
        if inputs != {last} or not set(last.users) <= set(nodes):
            return "behind the norm its forward applies no chain of modules and functions"
        step = Step(child) if child else _function_step(nodes[0], last)
        if step is None:
            return f"its forward gives {recording.functions[nodes[0]]} more than the norm's result"
        steps.append(step)
        last = nodes[-1]
    if all(child for child, _ in groups):
        # A child without a node of its own, such as a dropout in eval mode, keeps its place.
        return tuple(Step(child.removeprefix(f"{name}.")) for child in call.children)
    return tuple(steps)


def _groups(recording: Recording, name: str, norm: fx.Node) -> list[tuple[str, list[fx.Node]]]:
    """The nodes behind the norm in its module, those of one child together."""
    groups: list[tuple[str, list[fx.Node]]] = []
    nodes = list(recording.graph.nodes)
    for node in nodes[nodes.index(norm) + 1 :]:
        where = str(node.target) if node.op == "call_module" else recording.owners[node]
        if node.op == "get_attr" or not f"{where}.".startswith(f"{name}."):
            continue
        child = where.removeprefix(name).strip(".").partition(".")[0]
        if child and groups and groups[-1][0] == child:
            groups[-1][1].append(node)
        else:
            groups.append((child, [node]))
    return groups


def _problem(module: nn.Module, call: CallPlan, groups: list[tuple[str, list[fx.Node]]]) -> str:
    prefix = f"{call.module}."
    called = {child.removeprefix(prefix): len(calls) for child, calls in call.children.items()}
    for child, _ in module.named_children():
        if called.get(child) != 1:
            return f"its child {child} is called {called.get(child, 0)} times"
    if any(line.partition(" ")[0] in DROPOUTS for line in call.lines):
        return "its forward calls a dropout function"
    functions = any(not child for child, _ in groups)
    silent = called.keys() - {child for child, _ in groups}
    for child in sorted(silent):
        if functions and type(module.get_submodule(child)) is not nn.Identity:
            return f"its child {child} does nothing in eval mode, beside functions"
    return ""


def _function_step(node: fx.Node, given: fx.Node) -> Step | None:
    """A function of one tensor, which comes first; None for another."""
    if not node.args or node.args[0] is not given:
        return None
    rest: tuple[Any, ...] = node.args[1:]
    others = (*rest, *node.kwargs.values())
    plain = all(v is None or type(v) in (int, float, bool, str) for v in others)
    if not plain or any(str(v).startswith("<class ") for v in others):
        return None
    assert callable(node.target)
    name = getattr(node.target, "__name__", "function")
    return Step(name, node.target, rest, dict(node.kwargs))
