"""Traces a model's forward by torch.export, with its quantizers as operators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import unwrap
from torch_ext.utils.arguments import bound_arguments
from torch_ext.utils.modes import eval_mode

SYMBOL = ("torch_ext", "FakeQuant")  # domain and name of the ONNX operator for a quantizer

# The operator that a quantizer traces as. torch.onnx.ops.symbolic would do, but encodes its
# attributes and shapes in Python each time that the graph is traced again.
_LIBRARY: Any = torch.library.Library("torch_ext_export", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("quantizer(Tensor x, str name) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("quantizer", lambda x, name: torch.empty_like(x), "CompositeExplicitAutograd")
QUANTIZER = torch.ops.torch_ext_export.quantizer.default
_HARDTANH = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)

BATCH = "batch"  # name of the dynamic first axis


@dataclass
class TracedInput:
    """The dtypes, and the rank, of the inputs that a quantizer was traced with."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    rank: int = 0


@contextmanager
def symbols(quantizers: Mapping[str, FakeQuantize]) -> Iterator[dict[str, TracedInput]]:
    """Context manager in which each call of a quantizer traces as one node that has its name.

    Yields by name what each was traced with, filled in by the tracing. `quantizer_calls` finds the
    nodes; torch.onnx makes the ONNX operator `SYMBOL` of each.
    """
    seen = {name: TracedInput() for name in quantizers}

    def symbol(name: str, x: Tensor) -> Tensor:
        seen[name].dtypes.add(x.dtype)
        seen[name].rank = x.dim()
        traced: Tensor = QUANTIZER(x, name)
        return traced

    with ExitStack() as stack:
        for name, quantizer in quantizers.items():
            stack.enter_context(quantizer.replaced(functools.partial(symbol, name)))
            stack.enter_context(_without_tensors(quantizer))
        yield seen


@contextmanager
def _without_tensors(quantizer: FakeQuantize) -> Iterator[None]:
    """Hides the tensors of a quantizer, and of its observer, which nothing reads meanwhile.

    torch.export would make each an input of the program, and a net has ten times as many of them
    as weights; some of its passes take the square of their number.
    """
    own = {key: vars(quantizer)[key] for key in ("_parameters", "_buffers", "_modules")}
    vars(quantizer).update({key: {} for key in own})
    try:
        yield
    finally:
        vars(quantizer).update(own)


def quantizer_calls(graph: fx.Graph) -> list[tuple[str, fx.Node]]:
    """The nodes of quantizers in a graph, with their names."""
    return [(str(node.args[1]), node) for node in graph.nodes if node.target is QUANTIZER]


def translations(packages: Any) -> dict[Any, Any]:
    """How torch.onnx translates the operator that is defined here; `packages` is onnx."""
    import onnxscript

    defs = packages.defs
    formal, types = defs.OpSchema.FormalParameter, ("float", "float16", "bfloat16", "double")
    domain, kind = SYMBOL
    schema = defs.OpSchema(
        kind,
        domain,
        1,
        inputs=[formal("x", "T")],
        outputs=[formal("y", "T")],
        type_constraints=[("T", [f"tensor({name})" for name in types], "")],
        attributes=[defs.OpSchema.Attribute("quantizer", defs.OpSchema.AttrType.STRING, "")],
    )
    symbol = onnxscript.values.Op(onnxscript.values.Opset(domain, 1), kind, schema)

    def quantizer(x: Any, name: str) -> Any:
        return symbol(x, quantizer=name)

    return {QUANTIZER: quantizer}


def _may_replace(node: Any) -> bool:
    """Whether a hardtanh, if it writes to its input, writes to what nothing else can read."""
    if node.target is _HARDTANH[0]:
        return True
    x = node.args[0]
    fresh = str(x.target).startswith(("aten.conv", "aten.linear", "aten.batch_norm", "aten.add."))
    return len(x.users) == 1 and fresh


def simplify(program: ExportedProgram) -> None:
    """Replaces hardtanh, which is ReLU6, by clamp, in place.

    torch.onnx would take hardtanh apart in Python, with symbolic sizes: that is a third of the
    time of an export of mobilenet_v2.
    """
    for node in program.graph.nodes:
        if node.target not in _HARDTANH or node.kwargs or not _may_replace(node):
            continue
        given: list[Any] = list(node.args)
        node.target = torch.ops.aten.clamp.default
        node.args = tuple(given + [-1.0, 1.0][len(given) - 1 :])
    program.graph_module.recompile()


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
