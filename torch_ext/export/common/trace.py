"""Traces a model's forward by torch.export, with its quantizers as operators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import unwrap
from torch_ext.utils.arguments import bound_arguments
from torch_ext.utils.modes import eval_mode

SYMBOL = ("torch_ext", "FakeQuant")  # domain and name of the ONNX operator for a quantizer
BATCH = "batch"  # name of the dynamic first axis


@dataclass
class TracedInput:
    """The dtypes, and the rank, of the inputs that a quantizer was traced with."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    rank: int = 0


@contextmanager
def symbols(quantizers: Mapping[str, FakeQuantize]) -> Iterator[dict[str, TracedInput]]:
    """Context manager in which each quantizer traces as one node of the ONNX operator `SYMBOL`.

    The node's only attribute is the quantizer's name. Yields by name what each was traced with,
    filled in by the tracing.
    """
    seen = {name: TracedInput() for name in quantizers}

    def symbol(name: str, x: Tensor) -> Tensor:
        seen[name].dtypes.add(x.dtype)
        seen[name].rank = x.dim()
        return torch.onnx.ops.symbolic(
            "::".join(SYMBOL), (x,), {"quantizer": name}, dtype=x.dtype, shape=x.shape, version=1
        )

    with ExitStack() as stack:
        for name, quantizer in quantizers.items():
            stack.enter_context(quantizer.replaced(functools.partial(symbol, name)))
        yield seen


def trace(
    who: str,
    model: nn.Module,
    example_inputs: Any,
    dynamic_batch: bool,
    keywords: bool = False,
) -> ExportedProgram:
    """Traces the forward by torch.export in eval mode, without gradients.

    The model stays as it was. With `dynamic_batch` the size of the inputs' first axis is left open.
    With `keywords` the program takes what a mapping has as keyword arguments.
    Raises ValueError with torch.export's reason if it cannot trace the model.
    """
    root = unwrap(model)
    given = bound_arguments(who, unwrap(root), example_inputs)
    shapes = _dynamic_shapes(who, given) if dynamic_batch else None
    bound = inspect.signature(root.forward).bind_partial()
    bound.arguments.update(given)
    args, kwargs = bound.args, bound.kwargs
    if keywords and isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    try:
        with eval_mode(root), torch.no_grad():
            return torch.export.export(root, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export runs the user's forward, which may raise anything
        advice = "; dynamic_batch=False keeps the example's batch" if dynamic_batch else ""
        raise ValueError(
            f"{who}: torch.export cannot trace the model{advice}: "
            f"{type(error).__name__}: {str(error).strip()[:2000]}"
        ) from error


def _dynamic_shapes(who: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the first axis dynamic, of all tensors with the batch size of the first tensor."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(dict(given)) if _has_axes(leaf)]
    size = leaves[0].shape[0] if leaves else 0
    if size < 2:
        raise ValueError(
            f"{who}: expected example_inputs to have a batch of 2 or more on axis 0, got {size}; "
            "or pass dynamic_batch=False"
        )
    batch = Dim(BATCH)

    def shape(leaf: Any) -> dict[int, Any] | None:
        return {0: batch} if _has_axes(leaf) and leaf.shape[0] == size else None

    return {name: torch.utils._pytree.tree_map(shape, value) for name, value in given.items()}


def _has_axes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
