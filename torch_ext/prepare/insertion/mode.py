"""The function mode by which functions read what the quantizers make of their operands."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from torch_ext.prepare.insertion.call import CURRENT, Call
from torch_ext.prepare.insertion.functions import (
    MAKERS,
    OPENED,
    PYTHON_FUNCTIONS,
    PYTHON_METHODS,
    SITE_NAMES,
)
from torch_ext.prepare.insertion.plan import FunctionPlan, counted

_OUT_OF_PLACE: dict[str, Any] = {"add": torch.add, "mul": torch.mul}


class InsertionMode(TorchFunctionMode):
    """Gives functions what quantizers make of their operands, and quantizes results."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs is None:
            kwargs = {}
        call = self.call
        if func in OPENED and CURRENT.call is call and not call.current.free:
            with self:
                return OPENED[func](*args, **kwargs)
        name = SITE_NAMES.get(func)
        if name is None:
            if torch.compiler.is_dynamo_compiling():
                return _traced(func, args, kwargs)
            made = func(*args, **kwargs)
            if func in MAKERS or call.constants:
                call.note_constants(func in MAKERS, args, made)
            return made
        # A prepared model inside this one has calls of its own.
        looked_at = CURRENT.call is call and not call.current.free
        plan = None
        if looked_at and name in call.link.plan.functions and counted(name, args, kwargs):
            plan = call.function(name, args)
        if plan is None:
            made = func(*args, **kwargs)
            if call.constants:
                call.note_constants(False, args, made)
            return made
        call.done += plan.required
        made = _with_reads(call, plan, func, name, args, kwargs)
        return made if plan.output is None else call.read(plan.output, made)


def pause(call: Call) -> bool:
    """Leaves the call's mode, where nothing is looked at, if it is the innermost one.

    A mode costs some microseconds for each function of torch. While compiling it costs nothing
    that stays. The caller enters ``call.mode`` again if this returns True.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    mode = call.mode
    innermost = _get_current_function_mode()  # type: ignore[no-untyped-call]
    if mode is None or innermost is not mode:
        return False
    mode.__exit__(None, None, None)
    return True


def _traced(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function as ``torch.compile`` can trace it from a mode."""
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
        place: Any = read.place
        by_name = type(place) is str
        value = kwargs[place] if by_name else new[place]
        if read.item >= 0:
            several = list(value)
            several[read.item] = call.read(read, several[read.item])
            value = several
        else:
            written = plan.in_place and place == 0 and torch.is_grad_enabled()
            if written and call.quantizer(read.quantizer).method != "fake_quant":
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
        made: Any = _OUT_OF_PLACE[name](*new, **kwargs)
    else:
        new[0] = new[0].clone()
        made = func(*new, **kwargs)
    return args[0].copy_(made)
