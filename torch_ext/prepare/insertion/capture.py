"""Captures a model's forward as one graph that holds in train and in eval mode.

It is traced in both. Where they differ in a constant (the probability of a dropout), the graph
reads the module's mode when it runs; a small module that runs other operations in each mode (a
stochastic depth) is called as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from torch_ext.prepare.insertion.proxies import unwrapped
from torch_ext.prepare.insertion.tracer import (
    TORCHS_OWN,
    IsWhole,
    Tracer,
    Uncapturable,
    failing_line,
)
from torch_ext.prepare.quantizable_modules import target_of
from torch_ext.utils.arguments import bound_arguments
from torch_ext.utils.modes import eval_mode, forked_rng

_OTHERWISE = (
    "call prepare_qat without example_inputs, with torch_ext.Add, Mul, MatMul and Cat modules or a "
    "QuantStub where the forward uses functions; or give the module that holds this line "
    "qconfig=None, which leaves it whole and float"
)


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    return in_training if training else in_evaluation


def bound(who: str, model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The example's values by argument of the forward."""
    if "forward" in vars(model):
        raise ValueError(
            f"{who}: expected the model's class to define its forward, got one that is an "
            f"attribute of the instance; {_OTHERWISE}"
        )
    return bound_arguments(who, model, example_inputs)


def capture(who: str, model: nn.Module, example: Mapping[str, Any], float_only: IsWhole) -> Tracer:
    """Traces the forward. Modules matched by ``float_only`` stay leaves.

    Functions marked by ``torch.fx.wrap`` are traced through; if that fails, they stay leaves.
    """
    try:
        with unwrapped():
            return _captured(who, model, example, float_only)
    except ValueError:
        return _captured(who, model, example, float_only)


def _captured(
    who: str, model: nn.Module, example: Mapping[str, Any], float_only: IsWhole
) -> Tracer:
    whole: set[str] = set()
    while True:
        made = [
            _trace(who, model, example, lambda name: float_only(name) or name in whole, mode)
            for mode in (False, True)
        ]
        evaluated, trained = made
        different = _different_owners(evaluated, trained)
        if not different:
            _unify(evaluated, trained)
            _follow_writes(evaluated)
            return evaluated
        layered = [name for name in different if not name or _has_weights(model, name)]
        if layered:
            name = max(layered, key=lambda name: different[name] != TORCHS_OWN)
            raise ValueError(
                f"{who}: cannot capture {different[name]}: what "
                f"{name or type(model).__name__}, which has quantized layers, runs here is not the "
                f"same in train() and eval(); {_OTHERWISE}"
            )
        whole.update(different)


def _trace(
    who: str, model: nn.Module, example: Mapping[str, Any], whole: IsWhole, training: bool
) -> Tracer:
    tracer = Tracer(model, example, whole)
    try:
        with forked_rng(model), _mode(model, training):
            tracer.run()
    except Exception as error:  # a trace runs the user's forward: anything may come
        reason = (
            str(error) if isinstance(error, Uncapturable) else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"{who}: cannot capture {failing_line(error)}: {reason}; {_OTHERWISE}"
        ) from error
    return tracer


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    with eval_mode(model):
        model.train(training)
        yield


def _has_weights(model: nn.Module, name: str) -> bool:
    targets = map(target_of, model.get_submodule(name).modules())
    return any(target is not None and target.weights for target in targets)


def _different_owners(evaluated: Tracer, trained: Tracer) -> dict[str, str]:
    """The modules whose own operations depend on the mode, with the first line of each that does.

    The root stands for operations that are the same in another order.
    """
    found: dict[str, str] = {}
    own = [_operations(tracer) for tracer in (evaluated, trained)]
    for name in dict.fromkeys((*own[1], *own[0])):
        first = _first_difference(own[0].get(name, []), own[1].get(name, []))
        if first is not None:
            found[name] = (evaluated.lines | trained.lines)[first]
    if not found:
        first = _first_difference(list(evaluated.graph.nodes), list(trained.graph.nodes))
        return {} if first is None else {"": (evaluated.lines | trained.lines)[first]}
    return found


def _operations(tracer: Tracer) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in tracer.graph.nodes:
        found.setdefault(tracer.owners[node], []).append(node)
    return found


def _first_difference(left: list[fx.Node], right: list[fx.Node]) -> fx.Node | None:
    for one, other in itertools.zip_longest(left, right):
        if one is None or other is None:
            return one or other
        if (one.op, one.target) != (other.op, other.target):
            return other
    return None


def _unify(evaluated: Tracer, trained: Tracer) -> None:
    """Puts both modes' constants into the graph of the eval mode, where they differ."""
    pairs = list(zip(evaluated.graph.nodes, trained.graph.nodes, strict=True))
    twin = dict(pairs)
    flags: dict[str, fx.Node] = {}

    def unified(left: Any, right: Any, node: fx.Node) -> Any:
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and twin[left] is right:
            return left
        if (
            isinstance(left, (tuple, list))
            and type(left) is type(right)
            and len(left) == len(right)
        ):
            return type(left)(unified(a, b, node) for a, b in zip(left, right, strict=True))
        if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
            return {key: unified(left[key], right[key], node) for key in left}
        if (
            isinstance(left, (fx.Node, slice))
            or isinstance(right, (fx.Node, slice))
            or left == right
        ):
            return left
        owner = evaluated.owners[node]
        with evaluated.graph.inserting_before(node):
            if owner not in flags:
                flags[owner] = evaluated.graph.get_attr(f"{owner}.training".strip("."))
            chosen = evaluated.graph.call_function(by_mode, (flags[owner], right, left))
        for made in (flags[owner], chosen):
            evaluated.owners[made] = owner
            evaluated.lines[made] = evaluated.lines[node]
        evaluated.values[flags[owner]] = False
        evaluated.values[chosen] = left
        return chosen

    for left, right in pairs:
        if left.op != "placeholder":
            left.args = unified(left.args, right.args, left)
            left.kwargs = unified(left.kwargs, right.kwargs, left)


def _follow_writes(tracer: Tracer) -> None:
    """Lets what reads a tensor after an in-place operation read that operation's result.

    A quantizer behind the tensor would not see the new values otherwise.
    """
    order = {node: i for i, node in enumerate(tracer.graph.nodes)}
    for node, before in tracer.written.items():
        if tracer.values[node] is tracer.values[before]:
            for user in [user for user in before.users if order[user] > order[node]]:
                user.replace_input_with(before, node)
                if user in tracer.seen:
                    tracer.seen[user][node] = tracer.seen[user][before]
