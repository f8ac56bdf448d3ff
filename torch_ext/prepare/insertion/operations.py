"""The table of operations whose inputs are quantized; docs/guides/placement.md shows it.

Operations have torch's names. A module has the name of its function (``AvgPool2d`` is
``avg_pool2d``), an in-place variant or an operator that of the function (``+=`` is ``add``).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

from torch_ext.prepare.insertion.tracer import Tracer
from torch_ext.prepare.module_classes import own_type
from torch_ext.prepare.quantizable_modules import is_quant_stub
from torch_ext.utils.operations import KEEP_VALUES


class Kind(enum.Enum):
    """What the operations of a row have quantized; the values are the table's texts."""

    WEIGHTED = "the input, and the weight per output channel; not the bias"
    PRODUCT = "every factor"
    PAIR = "both operands, if both are computed; beside a parameter, buffer or number: nothing"
    JOIN = "all operands, by one quantizer, so that they share a scale"
    RESAMPLE = "the input"
    CARRY = "nothing: it only moves or picks values, so a quantizer for its result goes before it"
    STUB = "its output, always"
    OTHER = "nothing"


class Row(NamedTuple):
    """A row of the table."""

    kind: Kind
    operations: str  # names, separated by spaces; a description for STUB and OTHER
    output: str  # how the result's grid relates to the input's


_NEW = "a new value"
_SAME = "on the grid of the input"

PLACEMENT_TABLE = (
    Row(
        Kind.WEIGHTED,
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear",
        _NEW,
    ),
    Row(Kind.PRODUCT, "matmul mm bmm baddbmm einsum scaled_dot_product_attention", _NEW),
    Row(Kind.PAIR, "add mul", _NEW),
    Row(Kind.JOIN, "cat concat concatenate stack hstack vstack", _SAME),
    Row(
        Kind.RESAMPLE,
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d interpolate upsample",
        _NEW,
    ),
    Row(Kind.CARRY, " ".join(KEEP_VALUES), _SAME),
    Row(Kind.STUB, "`torch_ext.QuantStub`", _NEW),
    Row(Kind.OTHER, "everything else: activations, norms, softmax, mean, ...", _NEW),
)

_KINDS = {name: row.kind for row in PLACEMENT_TABLE for name in row.operations.split()}

# The quantized arguments of an operation: position, and the names as keywords.
_FIRST = (0, ("input", "tensors", "self"))
_OPERANDS: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {
    "baddbmm": ((1, ("batch1",)), (2, ("batch2",))),
    "scaled_dot_product_attention": ((0, ("query",)), (1, ("key",)), (2, ("value",))),
    **dict.fromkeys(("matmul", "mm", "bmm", "add", "mul"), (_FIRST, (1, ("other", "mat2")))),
}
_WEIGHT = (1, ("weight",))
_CHUNKS = ("chunk", "split", "getitem")


def placement_table() -> str:
    """The table in Markdown."""
    lines = ["| operation | quantized | its result |", "|---|---|---|"]
    for row in PLACEMENT_TABLE:
        names = row.operations.split()
        known = row.kind not in (Kind.STUB, Kind.OTHER)
        shown = " ".join(f"`{name}`" for name in names) if known else row.operations
        lines.append(f"| {shown} | {row.kind.value} | {row.output} |")
    return "\n".join(lines)


def operation(tracer: Tracer, node: fx.Node) -> str:
    """The name of a node's operation as in the table; empty if it is not torch's."""
    if node.op == "call_method":
        return _plain(str(node.target))
    if node.op == "call_function":
        if node.target is getattr:
            return {"T": "t", "mT": "transpose"}.get(str(node.args[1]), "")
        home = getattr(node.target, "__module__", None) or "torch"
        name = getattr(node.target, "__name__", "")
        if home == "_operator":
            return _plain(name.removeprefix("i") if name in _IN_PLACE else name)
        return _plain(name) if home.partition(".")[0] == "torch" else ""
    if node.op == "call_module":
        kind = own_type(tracer.model.get_submodule(str(node.target)))
        if kind.__module__.startswith("torch.nn."):
            return re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    return ""


_IN_PLACE = ("iadd", "imul", "imatmul")


def _plain(name: str) -> str:
    return name.rstrip("_") if not name.startswith("_") else name


def kind_of(tracer: Tracer, node: fx.Node) -> Kind:
    """The row of the table that a node belongs to."""
    if node.op == "call_module" and is_quant_stub(tracer.model.get_submodule(str(node.target))):
        return Kind.STUB
    kind = _KINDS.get(operation(tracer, node), Kind.OTHER)
    if node in tracer.written or node.op in ("placeholder", "get_attr", "output"):
        return kind if kind is Kind.PAIR else Kind.OTHER
    if kind is Kind.RESAMPLE and _is_nearest(tracer, node):
        return Kind.CARRY
    if kind is Kind.OTHER and _returns_its_input(tracer, node):
        return Kind.CARRY
    return kind


def _is_nearest(tracer: Tracer, node: fx.Node) -> bool:
    name = operation(tracer, node)
    if name not in ("interpolate", "upsample"):
        return False
    if node.op == "call_module":
        mode = getattr(tracer.model.get_submodule(str(node.target)), "mode", "nearest")
    else:
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
    return str(mode).startswith("nearest")


def _returns_its_input(tracer: Tracer, node: fx.Node) -> bool:
    """Whether an operation returns its input in eval mode, as stochastic depth does."""
    value = tracer.values.get(node)
    first = node.args[0] if node.args else None
    return (
        isinstance(value, Tensor)
        and isinstance(first, fx.Node)
        and tracer.values.get(first) is value
    )


def inputs_of(tracer: Tracer, node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that its row concerns: those quantized, or passed through by CARRY."""
    name = operation(tracer, node)
    if name == "einsum":
        operands: list[Any] = [node.args[1:]]
    else:
        operands = [_operand(node, *place) for place in _OPERANDS.get(name, (_FIRST,))]
    return [operand for operand in _flat(operands) if isinstance(operand, fx.Node)]


def weight_of(node: fx.Node) -> fx.Node | None:
    """The weight argument of a convolution or linear function; None for other nodes."""
    weight = _operand(node, *_WEIGHT)
    return weight if node.op == "call_function" and isinstance(weight, fx.Node) else None


def _operand(node: fx.Node, position: int, names: tuple[str, ...]) -> Any:
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def weight_source(tracer: Tracer, node: fx.Node) -> fx.Node:
    """The node of the parameter that ``node`` is, or is a slice of output channels of.

    ``node`` itself if it is neither.
    """
    step = node
    while (name := operation(tracer, step)) in _CHUNKS and isinstance(step.args[0], fx.Node):
        before = step.args[0]
        if name == "getitem":
            whole = isinstance(step.args[1], slice) or not isinstance(tracer.values[before], Tensor)
        else:
            whole = all(dim == 0 for dim in (*step.args[2:], *step.kwargs.values()))
        if not whole:
            return node
        step = before
    return step if step.op == "get_attr" else node
