"""Puts quantizers into a captured forward, and the forward into the model."""

from __future__ import annotations

import copy
import functools
import linecache
from collections.abc import Callable
from itertools import count
from typing import Any

from torch import fx, nn

from torch_ext.prepare.attach import Undo
from torch_ext.prepare.insertion.placement import Readers
from torch_ext.prepare.insertion.tracer import Tracer

Forward = Callable[..., Any]
_numbers = count()


def insert(tracer: Tracer, readers: Readers, target: str) -> None:
    """Lets the readers of each value read what the quantizer makes of it."""
    order = {node: i for i, node in enumerate(tracer.graph.nodes)}
    for value, those in readers.items():
        states: dict[int | None, list[fx.Node]] = {}  # of a tensor that is written to in between
        for reader in sorted(those, key=order.__getitem__):
            states.setdefault(tracer.seen.get(reader, {}).get(value), []).append(reader)
        for some in states.values():
            with tracer.graph.inserting_before(some[0]):
                quantized = tracer.graph.call_module(target, (value,))
            for reader in some:
                reader.replace_input_with(value, quantized)


def compiled(tracer: Tracer) -> Forward:
    """The graph as a function of the model and its arguments, shown in tracebacks."""
    code = tracer.graph.python_code("self")
    scope = dict(code.globals)
    filename = f"<captured {type(tracer.model).__name__} {next(_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    exec(compile(code.src, filename, "exec"), scope)
    return functools.wraps(type(tracer.model).forward)(scope["forward"])


def turn(model: nn.Module, forward: Forward) -> Undo:
    """Gives the model a class of its own with this forward; returns what undoes it.

    The modules stay as they are, so names, types, checkpoints and modules that the forward does
    not call stay too.
    """
    before = type(model)
    model.__class__ = _turned(before, forward)

    def undo() -> None:
        model.__class__ = before

    return undo


def _turned(base: type[nn.Module], forward: Forward) -> type[nn.Module]:
    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            f"{base.__name__}: a model with a captured forward is saved through state_dict() only; "
            "prepare a new one to load it into"
        )

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        self.__class__ = base
        try:
            made = copy.deepcopy(self, memo)
        finally:
            self.__class__ = turned
        made.__class__ = _turned(type(made), forward)
        return made

    members = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__deepcopy__": deepcopy,
        "__module__": base.__module__,
    }
    turned = type(f"Quantized{base.__name__}", (base,), members)
    return turned
