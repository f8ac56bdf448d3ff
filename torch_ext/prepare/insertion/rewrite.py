"""Puts quantizers into a captured forward, and the forward into the model."""

from __future__ import annotations

import functools
import linecache
from itertools import count
from typing import Any

from torch import fx, nn

from torch_ext.prepare.insertion.placement import Readers
from torch_ext.prepare.insertion.tracer import Tracer
from torch_ext.prepare.module_classes import Forward, Undo, class_with_forward, swap_class

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


def replace_forward(model: nn.Module, forward: Forward) -> Undo:
    """Gives the model a class of its own with this forward; returns what undoes it.

    The modules stay as they are, so names, types, checkpoints and modules that the forward does
    not call stay too.
    """

    def make_class(base: type[nn.Module]) -> type[nn.Module]:
        def reduce_ex(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
            raise RuntimeError(
                f"pickle: expected a model without a captured forward, got a {base.__name__}; save "
                "state_dict() and load it into prepare_qat of a new float model"
            )

        return class_with_forward(base, forward, make_class, reduce_ex)

    return swap_class(model, make_class)
