"""The state of one call of a prepared model: where in the plan it is, and what was quantized."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.prepare.insertion.operations import DROPOUTS
from torch_ext.prepare.insertion.plan import CallPlan, FunctionPlan, Link, Place, Read
from torch_ext.prepare.insertion.user_lines import (
    calling_lines,
    nearest_line,
    traced_lines,
    traced_nearest_line,
)
from torch_ext.utils.text import label_of

_OTHERWISE = (
    "pass prepare_qat an example that comes by here too (example_inputs=[(first,), (second,)]), or "
    "give the module that holds this line qconfig=None"
)
# What is not in the plan. In FLOAT, and inside of modules that are left float, nothing is checked.
_UNKNOWN = CallPlan("", False)
UNCHECKED = CallPlan("", False)
UNCHECKED.free = True


class Scope:
    """A module that is being called, and those that call it.

    ``prefix``: what the names in the module start with; ``depth``: of how many parts.
    """

    def __init__(self, prefix: str, depth: int, module: nn.Module, around: Scope | None) -> None:
        self.prefix, self.depth, self.module, self.around = prefix, depth, module, around


class Call:
    """One call of a prepared model, or of one of its modules by itself.

    ``scope`` has the modules that are being called, innermost first; it is None in FLOAT, where
    nothing is looked at. A quantizer is looked up in the innermost module that has it, so that a
    part can be compiled by itself.
    """

    def __init__(
        self, link: Link, scope: Scope | None, plan: CallPlan, given: Any = ((), None)
    ) -> None:
        """``given``: the positional and keyword arguments of a call of the model, for messages."""
        self.link, self.scope, self.given = link, scope, given
        self.current = plan
        self.counts: dict[str, int] = {}  # calls of children and lines by what was current
        self.done = 0  # functions with reads
        self.mode: Any = None  # the InsertionMode of this call, where it may be paused
        self.values: dict[str, tuple[Tensor, Tensor, bool]] = {}
        # Tensors, by address, that are made of numbers alone; not known while compiling.
        self.constants: Any = None
        self.versions: dict[int, int] = {}

    def enter(self, module: nn.Module, place: Place) -> CallPlan:
        """The plan of the call that begins."""
        name = place.name
        calls = self.current.children.get(name)
        if calls is None:
            if self.current.free:
                return UNCHECKED
            if name in self.link.plan.layers:
                raise RuntimeError(
                    f'prepare_qat: expected "{name}" to be called where the example_inputs had it '
                    f"called, got a call in {label_of(self.current.module)} at {_line()}; "
                    f"{self._advice()}"
                )
            return _UNKNOWN
        index = self.counts.get(place.key, 0)
        self.counts[place.key] = index + 1
        if index >= len(calls):
            if calls[-1].reads_inside and not calls[-1].repeats:
                raise RuntimeError(
                    f'prepare_qat: expected "{name}" to be called {len(calls)} times, as with the '
                    f"example_inputs, got another call at {_line()}; {self._advice()}"
                )
            index = len(calls) - 1
        found = calls[index]
        if found.training != module.training and found.twin is not None:
            return found.twin
        return found

    def note_constants(self, is_maker: bool, args: Any, made: Any) -> None:
        """Notes the result of a function that makes a tensor, or reads only such tensors."""
        if torch.compiler.is_compiling() or not (is_maker or self._are_constants(args)):
            return
        if self.constants is None:
            self.constants = weakref.WeakValueDictionary()
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.constants[id(tensor)] = tensor
                self.versions[id(tensor)] = _version(tensor)

    def _are_constants(self, args: Any) -> bool:
        """Whether the tensors among arguments, of which there are some, are made of numbers."""
        found = False
        for value in args:
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    if self.constants is None or self.constants.get(id(tensor)) is not tensor:
                        return False
                    if self.versions[id(tensor)] != _version(tensor):  # data was written to it
                        return False
                    found = True
        return found

    def function(self, name: str, args: Any) -> FunctionPlan | None:
        """The plan of the call of a function that begins."""
        if torch.compiler.is_dynamo_compiling():
            text, apart = traced_lines()
        else:
            text, apart = calling_lines()
        line = name + text
        calls = self.current.lines.get(line)
        if calls is None:
            if apart or name in DROPOUTS:  # a dropout scales a value, it makes none
                return None
            # Such as a table for another size, kept by an earlier forward for the example's.
            if self.constants and self._are_constants(args):
                return None
            raise RuntimeError(
                f"prepare_qat: expected the functions that the example_inputs came by, got {name} "
                f"at {_shown(text)}; {self._advice()}"
            )
        if line in self.current.repeating:
            return calls[0]
        index = self.counts.get(line, 0)
        self.counts[line] = index + 1
        if index >= len(calls):
            if _have_reads(calls):
                raise RuntimeError(
                    f"prepare_qat: expected {len(calls)} calls of {name} at {_shown(text)}, as "
                    f"with the example_inputs, got another; {self._advice()}"
                )
            return None
        return calls[index]

    def quantizer(self, name: str) -> Any:
        scope: Any = self.scope
        while not name.startswith(scope.prefix):
            scope = scope.around
        return find_quantizer(scope.module, self.link.plan.quantizers[name][scope.depth :])

    def read(self, read: Read, x: Tensor) -> Tensor:
        quantizer = self.quantizer(read.quantizer)
        if read.memo == "":
            return _quantized(quantizer, x, read)
        grad = torch.is_grad_enabled()
        known = self.values.get(read.memo)
        if known is not None and known[0] is x and (known[2] or not grad):
            return known[1]
        made = _quantized(quantizer, x, read)
        self.values[read.memo] = (x, made, grad)
        return made

    def check_done(self, plan: CallPlan) -> None:
        """Raises if a function that has reads did not come by."""
        if plan.free or plan.loose or self.done in plan.expected:
            return
        missing = []
        for line, calls in plan.lines.items():
            left = calls[self.counts.get(line, 0) :]
            if any(call is not None and call.required for call in left):
                name, _, text = line.partition(" ")
                missing.append(f"{name} at {_shown(text)}")
        raise RuntimeError(
            f"prepare_qat: expected {label_of(plan.module)} to come by the functions that it came "
            f"by with the example_inputs, got none of {', '.join(missing)}; {self._advice()}"
        )

    def _advice(self) -> str:
        """The end of a message: which arguments differ from the examples', and what to do."""
        args, kwargs = self.given
        if kwargs is None:  # a call of a module by itself
            return _OTHERWISE
        other = self.link.plan.given.differences(args, kwargs)
        return f"{other}; {_OTHERWISE}" if other else _OTHERWISE


class _Current(threading.local):
    def __init__(self) -> None:
        # In every thread's own dict: torch.compile cannot guard a default that the class has.
        self.call: Call | None = None


# What is being called in this thread.
CURRENT = _Current()


def _shown(lines: str) -> str:
    """Lines of a plan for a message: the one of the call, and those that lead to it in brackets."""
    own, *outer = lines.strip().split(" /")  # each begins with a path
    if not own:
        return "torch.nn"
    return f"{own} (called at {', '.join(f'/{line}' for line in outer)})" if outer else own


def _line() -> str:
    """The line of the user's code that makes the call."""
    if torch.compiler.is_dynamo_compiling():
        return str(traced_nearest_line())
    return nearest_line()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _have_reads(calls: list[FunctionPlan | None]) -> bool:
    return any(call is not None for call in calls)


def find_quantizer(root: nn.Module, path: tuple[str, ...]) -> Any:
    """The quantizer of that name; also through wrappers that pass attributes on."""
    module: Any = root
    for part in path:
        child = module._modules.get(part)
        module = getattr(module, part) if child is None else child
    return module


def _quantized(quantizer: Any, x: Tensor, read: Read) -> Tensor:
    quantize = quantizer if read.observes else quantizer.quantize_only
    made: Tensor = quantize(x) if read.axis is None else quantize(x, read.axis)
    return made
