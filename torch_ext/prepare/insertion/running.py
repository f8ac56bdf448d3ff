"""A prepared model's forward: the user's own, its reads going through quantizers by the plan."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torch_ext.prepare.insertion.call import CURRENT, UNCHECKED, Call, Scope, find_quantizer
from torch_ext.prepare.insertion.functions import LAYER_BY_LAYER
from torch_ext.prepare.insertion.mode import InsertionMode, pause
from torch_ext.prepare.insertion.plan import CallPlan, Place, Plan
from torch_ext.prepare.insertion.user_lines import begins_call
from torch_ext.prepare.module_classes import Undo, class_with_forward, swap_class
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.utils.modes import uncompiled

_PLACE = "_insertion_place"  # in the ``__dict__`` of a tracked module


def _read_arguments(call: Call, plan: CallPlan, args: Any, kwargs: Any) -> Any:
    new = list(args)
    for read in plan.reads:
        place: Any = read.place
        if read.name in kwargs:
            kwargs = {**kwargs, read.name: call.read(read, kwargs[read.name])}
        else:
            new[place] = call.read(read, new[place])
    return new, kwargs


def _is_float(plan: Plan, root: nn.Module) -> bool:
    return all(find_quantizer(root, path).idle for path in plan.quantizers.values())


def _as_written(plan: Plan) -> Any:
    """Lets functions that the forward has compiled run as they are written."""
    if plan.runs_compiled and not torch.compiler.is_compiling():
        return uncompiled()
    return contextlib.nullcontext()


def _run_alone(
    module: nn.Module, place: Place, own: Any, layered: Any, args: Any, kwargs: Any
) -> Any:
    """A call of the model, or of a module of it that the model did not make."""
    link = place.link
    outer = CURRENT.call
    root = module if place.name == "" else link.root
    if root is None:
        _check_without_root(module, place)
    if root is None or _is_float(link.plan, root):
        CURRENT.call = Call(link, None, UNCHECKED)
        try:
            return own(module, *args, **kwargs)
        finally:
            CURRENT.call = outer
    plan = link.plan.alone.get(place.name, UNCHECKED)
    if plan is None:
        raise RuntimeError(
            f'prepare_qat: expected "{place.name}" to be called by the model, which calls it '
            "several times with different quantizers, got a call by itself; call the model, or the "
            'part after set_fake_quantize(model, "float"); if activation checkpointing recomputes '
            "it, checkpoint the module that calls it"
        )
    if plan.training != module.training and plan.twin is not None:
        plan = plan.twin
    scope = Scope("", 0, root, None)
    if place.name:
        scope = Scope(place.prefix, place.depth, module, scope)
    call = Call(link, scope, plan, ((), None) if place.name else (args, kwargs))
    CURRENT.call = call
    try:
        if plan.reads:
            args, kwargs = _read_arguments(call, plan, args, kwargs)
        if link.plan.functions:
            with _as_written(link.plan), InsertionMode(call) as mode:
                if not torch.compiler.is_dynamo_compiling():
                    call.mode = mode
                made = layered(module, *args, **kwargs)
        else:
            made = layered(module, *args, **kwargs)
        call.check_done(plan)
        return made if plan.output is None else call.read(plan.output, made)
    finally:
        CURRENT.call = outer


def _check_without_root(module: nn.Module, place: Place) -> None:
    """Raises for a part that is not in FLOAT: its quantizers may hang on other modules."""
    for part in module.modules():
        if isinstance(part, FakeQuantize) and not part.idle:
            raise RuntimeError(
                f'prepare_qat: expected "{place.name}" to belong to a prepared model, got one '
                "copied without it, or whose model is gone; copy and keep the whole model"
            )


def _tracked_forward(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    layered = LAYER_BY_LAYER.get(base_forward, base_forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        place: Any = self._insertion_place
        call = CURRENT.call
        if call is None or call.link is not place.link:
            return _run_alone(self, place, base_forward, layered, args, kwargs)
        if call.scope is None:
            return base_forward(self, *args, **kwargs)
        outer, counts, done, scope = call.current, call.counts, call.done, call.scope
        plan = call.enter(self, place)
        if plan.free:  # one of torch's layers, or a module that is left float
            call.current = plan
            paused = pause(call)
            try:
                if plan.reads:
                    args, kwargs = _read_arguments(call, plan, args, kwargs)
                made = layered(self, *args, **kwargs)
                return made if plan.output is None else call.read(plan.output, made)
            finally:
                if paused:
                    call.mode.__enter__()
                call.current = outer
        if plan.reads:
            args, kwargs = _read_arguments(call, plan, args, kwargs)
        call.current, call.counts, call.done = plan, {}, 0
        call.scope = Scope(place.prefix, place.depth, self, scope)
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


def is_tracked(module: nn.Module) -> bool:
    """Whether the module's calls follow a plan."""
    return _PLACE in module.__dict__


def untrack(module: nn.Module) -> None:
    """Forgets the module's place; its class is ``remove_quantizers``' or undoing's to restore."""
    module.__dict__.pop(_PLACE, None)
