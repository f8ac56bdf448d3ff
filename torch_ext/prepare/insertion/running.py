"""A prepared model's forward: the user's own, its reads going through quantizers by the plan."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from torch_ext.prepare.insertion.functions import (
    LAYER_BY_LAYER,
    OPENED,
    PYTHON_FUNCTIONS,
    PYTHON_METHODS,
    SITE_NAMES,
)
from torch_ext.prepare.insertion.plan import CallPlan, FunctionPlan, Link, Place, Plan, Read, counted
from torch_ext.prepare.insertion.user_lines import begins_call, calling_lines, traced_lines
from torch_ext.prepare.module_classes import Undo, class_with_forward, swap_class
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.state_table import FakeQuantState

_PLACE = "_insertion_place"
_FLOAT = FakeQuantState.FLOAT.value
_OUT_OF_PLACE = {"add": torch.add, "mul": torch.mul}
_OTHERWISE = (
    "pass prepare_qat an example that comes by here too (example_inputs=[(first,), (second,)]), or give "
    "the module that holds this line qconfig=None"
)
_EMPTY = CallPlan("", False)
_EMPTY.free = True


Scope = tuple[str, nn.Module, Any]


class Call:
    """One call of a prepared model, or of one of its modules by itself.

    ``scope`` has the modules that are being called, innermost first: the start of the names in
    each, the module, and the rest. It is None in FLOAT, where nothing is looked at. A quantizer is
    looked up in the innermost that has it, so that a part can be compiled by itself.
    """

    def __init__(self, link: Link, scope: Scope | None, plan: CallPlan) -> None:
        self.link, self.scope = link, scope
        self.current = plan
        self.counts: dict[str, int] = {}  # calls of children and lines by what was current
        self.done = 0  # functions with reads
        self.values: dict[str, tuple[Tensor, Tensor, bool]] = {}

    def enter(self, module: nn.Module, name: str) -> CallPlan:
        """The plan of the call that begins."""
        calls = self.current.children.get(name)
        if calls is None:
            if self.current.free:
                return _EMPTY
            if name in self.link.plan.layers:
                raise RuntimeError(
                    f'prepare_qat: expected "{name}" to be called where the example_inputs had it '
                    f'called, got a call in "{self.current.module}"; {_OTHERWISE}'
                )
            return _EMPTY
        key = "." + name
        index = self.counts.get(key, 0)
        self.counts[key] = index + 1
        if index >= len(calls):
            if calls[-1].reads_inside:
                raise RuntimeError(
                    f'prepare_qat: expected "{name}" to be called {len(calls)} times, as with the '
                    f"example_inputs, got another call; {_OTHERWISE}"
                )
            index = len(calls) - 1
        found = calls[index]
        if found.training != module.training and found.twin is not None:
            return found.twin
        return found

    def function(self, name: str) -> FunctionPlan | None:
        """The plan of the call of a function that begins."""
        if torch.compiler.is_dynamo_compiling():
            text, apart = traced_lines()
        else:
            text, apart = calling_lines()
        line = name + text
        calls = self.current.lines.get(line)
        if calls is None:
            if apart:
                return None
            raise RuntimeError(
                f"prepare_qat: expected the functions that the example_inputs came by, got {name} "
                f"at{text or ' torch.nn'}; {_OTHERWISE}"
            )
        index = self.counts.get(line, 0)
        self.counts[line] = index + 1
        if index >= len(calls):
            if _have_reads(calls):
                raise RuntimeError(
                    f"prepare_qat: expected {len(calls)} calls of {name} at{text}, as with the "
                    f"example_inputs, got another; {_OTHERWISE}"
                )
            return None
        return calls[index]

    def quantizer(self, name: str) -> Any:
        scope: Any = self.scope
        while not name.startswith(scope[0]):
            scope = scope[2]
        return _quantizer(scope[1], name[len(scope[0]) :])

    def read(self, read: Read, x: Tensor) -> Tensor:
        quantizer = self.quantizer(read.quantizer)
        if read.memo == "":
            return _quantized(quantizer, x, read.observes)
        grad = torch.is_grad_enabled()
        known = self.values.get(read.memo)
        if known is not None and known[0] is x and (known[2] or not grad):
            return known[1]
        made = _quantized(quantizer, x, read.observes)
        self.values[read.memo] = (x, made, grad)
        return made

    def check_done(self, plan: CallPlan) -> None:
        """Raises if a function that has reads did not come by."""
        if plan.free or self.done in plan.expected:
            return
        missing = []
        for line, calls in plan.lines.items():
            if _have_reads(calls[self.counts.get(line, 0) :]):
                missing.append(line)
        raise RuntimeError(
            f'prepare_qat: expected "{plan.module}" to come by the functions that it came by with '
            f"the example_inputs, got none of {', '.join(missing)}; {_OTHERWISE}"
        )


class _Current(threading.local):
    call: Call | None = None


_CURRENT = _Current()


def _have_reads(calls: list[FunctionPlan | None]) -> bool:
    for call in calls:
        if call is not None:
            return True
    return False


def _quantizer(root: nn.Module, name: str) -> Any:
    module: Any = root
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _quantized(quantizer: FakeQuantize, x: Tensor, observes: bool) -> Tensor:
    if observes:
        return quantizer(x)  # type: ignore[no-any-return]
    return quantizer.quantize_only(x)


class _InsertionMode(TorchFunctionMode):
    """Gives functions that have reads what the quantizers make of their operands."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs is None:
            kwargs = {}
        call = self.call
        if _CURRENT.call is not call or call.current.free:  # of another prepared model inside
            return _plain(func, args, kwargs)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        name = SITE_NAMES.get(func)
        if name is None or name not in call.link.plan.functions:
            return _plain(func, args, kwargs)
        if not counted(name, args, kwargs):
            return func(*args, **kwargs)
        plan = call.function(name)
        if plan is None:
            return func(*args, **kwargs)
        call.done += 1
        return _with_reads(call, plan, func, name, args, kwargs)


def _plain(func: Any, args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        if isinstance(func, types.FunctionType) and func not in PYTHON_FUNCTIONS:
            method = PYTHON_METHODS.get(func.__name__)
            if method is not None:
                return getattr(args[0], method)(*args[1:], **kwargs)
    return func(*args, **kwargs)


def _with_reads(
    call: Call, plan: FunctionPlan, func: Any, name: str, args: Any, kwargs: Any
) -> Any:
    new = list(args)
    target = args[0] if plan.in_place else None
    for read in plan.reads:
        place = read.place
        by_name = type(place) is str
        value = kwargs[place] if by_name else new[place]
        if read.item >= 0:
            several = list(value)
            several[read.item] = call.read(read, several[read.item])
            value = several
        else:
            if plan.in_place and place == 0 and torch.is_grad_enabled():
                if call.quantizer(read.quantizer).method != "fake_quant":
                    value = value.clone()  # which these keep for the backward pass
            value = call.read(read, value)
        if by_name:
            kwargs = {**kwargs, place: value}
        else:
            new[place] = value
    if not plan.in_place or new[0] is target:
        return func(*new, **kwargs)
    # Written into the caller's tensor, so that its views see it.
    if name in _OUT_OF_PLACE:
        made = _OUT_OF_PLACE[name](*new, **kwargs)
    else:
        new[0] = new[0].clone()
        made = func(*new, **kwargs)
    return target.copy_(made)


# Forwards of tracked modules


def _read_arguments(call: Call, plan: CallPlan, args: Any, kwargs: Any) -> Any:
    new = list(args)
    for read in plan.reads:
        if read.name in kwargs:
            kwargs = {**kwargs, read.name: call.read(read, kwargs[read.name])}
        else:
            new[read.place] = call.read(read, new[read.place])
    return new, kwargs


def _is_float(plan: Plan, root: nn.Module) -> bool:
    for name in plan.quantizers:
        if _quantizer(root, name)._action != _FLOAT:
            return False
    return True


def _run_alone(
    module: nn.Module, place: Place, own: Any, layered: Any, args: Any, kwargs: Any
) -> Any:
    """A call of the model, or of a module of it that the model did not make."""
    link = place.link
    outer = _CURRENT.call
    root = module if place.name == "" else link.root
    if root is None:
        _check_without_root(module, place)
    if root is None or _is_float(link.plan, root):
        _CURRENT.call = Call(link, None, _EMPTY)
        try:
            return own(module, *args, **kwargs)
        finally:
            _CURRENT.call = outer
    plan = link.plan.alone.get(place.name, _EMPTY)
    if plan is None:
        raise RuntimeError(
            f'prepare_qat: expected "{place.name}" to be called by the model, which calls it '
            "several times with different quantizers, got a call by itself (or its recomputation; "
            "checkpoint the module that calls it)"
        )
    if plan.training != module.training and plan.twin is not None:
        plan = plan.twin
    scope: Scope = ("", root, None)
    call = Call(link, scope if place.name == "" else (place.name + ".", module, scope), plan)
    _CURRENT.call = call
    try:
        if plan.reads:
            args, kwargs = _read_arguments(call, plan, args, kwargs)
        if link.plan.functions:
            with _InsertionMode(call):
                made = layered(module, *args, **kwargs)
        else:
            made = layered(module, *args, **kwargs)
        call.check_done(plan)
        return made if plan.output is None else call.read(plan.output, made)
    finally:
        _CURRENT.call = outer


def _check_without_root(module: nn.Module, place: Place) -> None:
    """Raises for a part that is not in FLOAT: its quantizers may hang on other modules."""
    for part in module.modules():
        if isinstance(part, FakeQuantize) and part._action != _FLOAT:
            raise RuntimeError(
                f'prepare_qat: expected "{place.name}" to belong to a prepared model, got one '
                "copied without it, or whose model is gone; copy and keep the whole model"
            )


def _tracked_forward(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    layered = LAYER_BY_LAYER.get(base_forward, base_forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        place = self._insertion_place
        call = _CURRENT.call
        if call is None or call.link is not place.link:
            return _run_alone(self, place, base_forward, layered, args, kwargs)
        if call.scope is None:
            return base_forward(self, *args, **kwargs)
        outer, counts, done, scope = call.current, call.counts, call.done, call.scope
        plan = call.enter(self, place.name)
        if plan.reads:
            args, kwargs = _read_arguments(call, plan, args, kwargs)
        call.current, call.counts, call.done = plan, {}, 0
        call.scope = (place.name + ".", self, scope)
        try:
            made = layered(self, *args, **kwargs)
            call.check_done(plan)
        finally:
            call.current, call.counts, call.done, call.scope = outer, counts, done, scope
        return made if plan.output is None else call.read(plan.output, made)

    return forward


begins_call(_tracked_forward(nn.Module.forward).__code__)
begins_call(_run_alone.__code__)


def _tracked_class(base: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name whose calls follow the plan."""
    if base.__module__ == parametrize.__name__:  # one module's own
        return _make_tracked_class(base)
    return _cached_tracked_class(base)  # type: ignore[arg-type]


def _make_tracked_class(base: type[nn.Module]) -> type[nn.Module]:
    forward = functools.wraps(base.forward)(_tracked_forward(base.forward))
    return class_with_forward(base, forward, _tracked_class, prefix="")


_cached_tracked_class = functools.cache(_make_tracked_class)


def _root_class(base: type[nn.Module]) -> type[nn.Module]:
    return _cached_root_class(base)  # type: ignore[arg-type]


@functools.cache
def _cached_root_class(base: type[nn.Module]) -> type[nn.Module]:
    forward = functools.wraps(base.forward)(_tracked_forward(base.forward))
    return class_with_forward(base, forward, _root_class)


def track(module: nn.Module, place: Place) -> Undo:
    """Lets a module's calls follow the plan; returns what undoes it."""
    swap_back = swap_class(module, _tracked_class if place.name else _root_class)
    module.__dict__[_PLACE] = place
    if place.name == "":
        place.link.set_root(module)

    def undo() -> None:
        untrack(module)
        swap_back()

    return undo


def untrack(module: nn.Module) -> None:
    """Forgets the module's place; its class is ``remove_quantizers``' or undoing's to restore."""
    module.__dict__.pop(_PLACE, None)
