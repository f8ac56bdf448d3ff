"""The table of operations whose inputs are quantized; docs/guides/placement.md shows it.

Operations have torch's names. A module has the name of its function (``AvgPool2d`` is
``avg_pool2d``), an in-place variant or an operator that of the function (``+=`` is ``add``).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from torch_ext.prepare.insertion.run_graph import RunGraph
from torch_ext.prepare.module_classes import own_type
from torch_ext.prepare.quantizable_modules import is_quant_stub
from torch_ext.utils.operations import KEEP_VALUES


class Kind(enum.Enum):
    """What the operations of a row have quantized; the values are the table's texts."""

    WEIGHTED = "the input, and the weight per output channel; not the bias"
    PRODUCT = "every factor"
    AFFINE = "both factors; the second per output channel if it is a parameter; not the bias"
    PAIR = "both operands, if both are computed; beside a parameter, buffer or number: nothing"
    JOIN = "all operands, by one quantizer, so that they share a scale"
    RESAMPLE = "the input"
    CARRY = (
        "nothing: it only moves or picks values; what reads its result uses its input's quantizer"
    )
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
    Row(
        Kind.PRODUCT,
        "matmul mm bmm inner tensordot baddbmm addbmm grouped_mm einsum "
        "scaled_dot_product_attention",
        _NEW,
    ),
    Row(Kind.AFFINE, "addmm", _NEW),
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
ASKING = (Kind.WEIGHTED, Kind.PRODUCT, Kind.AFFINE, Kind.PAIR, Kind.JOIN, Kind.RESAMPLE)

# Operations that ask for quantized inputs, and those that scale what they keep while training.
PLANNED = tuple(name for name, kind in _KINDS.items() if kind in ASKING)
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d")
# What computes new values without a product: with scales of each call there is nothing to gain.
SUMS = (Kind.PAIR, Kind.JOIN, Kind.RESAMPLE)
PAIRS = frozenset(name for name, kind in _KINDS.items() if kind is Kind.PAIR)
JOINS = frozenset(name for name, kind in _KINDS.items() if kind is Kind.JOIN)

# The quantized arguments of an operation: position, and the names as keywords.
_FIRST = (0, ("input", "tensors", "self", "a"))
_OPERANDS: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {
    **dict.fromkeys(("baddbmm", "addbmm"), ((1, ("batch1",)), (2, ("batch2",)))),
    "addmm": ((1, ("mat1",)), (2, ("mat2",))),
    "grouped_mm": ((0, ("mat_a", "self")), (1, ("mat_b", "mat2"))),
    "scaled_dot_product_attention": ((0, ("query",)), (1, ("key",)), (2, ("value",))),
    **dict.fromkeys(
        ("matmul", "mm", "bmm", "inner", "tensordot", "add", "mul"),
        (_FIRST, (1, ("other", "mat2", "tensor", "b"))),
    ),
}
_WEIGHT = (1, ("weight",))
# The axis of each quantized argument that the operation sums over, from the end.
_SUMMED: dict[str, tuple[int, ...]] = {
    "conv1d": (-2,), "conv2d": (-3,), "conv3d": (-4,),
    "conv_transpose1d": (-2,), "conv_transpose2d": (-3,), "conv_transpose3d": (-4,),
    "linear": (-1,), "inner": (-1, -1), "scaled_dot_product_attention": (-1, -1, -2),
    **dict.fromkeys(("matmul", "mm", "bmm", "baddbmm", "addbmm", "addmm", "grouped_mm"), (-1, -2)),
}  # fmt: skip
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


def operation(run: RunGraph, node: fx.Node) -> str:
    """Torch's name of what a node does; empty for what is not torch's."""
    if node.op == "call_module":
        kind = own_type(run.model.get_submodule(str(node.target)))
        if kind.__module__.startswith("torch.nn."):
            return function_of(kind)
    return run.functions.get(node, "")


def function_of(kind: type[nn.Module]) -> str:
    """The name of the function that one of torch's modules stands for."""
    name = re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    return "pad" if re.fullmatch(r"[a-z]+_pad[123]d", name) else name


def kind_of(run: RunGraph, node: fx.Node) -> Kind:
    if node.op == "call_module" and is_quant_stub(run.model.get_submodule(str(node.target))):
        return Kind.STUB
    name = operation(run, node)
    kind = _KINDS.get(name, Kind.OTHER)
    if node in run.written:
        return kind if kind is Kind.PAIR else Kind.OTHER
    if kind is Kind.RESAMPLE and option(run, node, "mode", 3, "nearest").startswith("near"):
        return Kind.CARRY
    if name == "pad" and option(run, node, "value", 3, "0") not in ("0", "0.0", "None"):
        return Kind.OTHER  # the value need not be on the input's grid
    return kind


def option(run: RunGraph, node: fx.Node, name: str, position: int, default: str) -> str:
    """An option of a function, or of the module that stands for it, as text."""
    if operation(run, node).endswith(("pool1d", "pool2d", "pool3d")):
        return ""
    if node.op == "call_module":
        module = run.model.get_submodule(str(node.target))
        return str(getattr(module, name, default))
    given = node.args[position] if len(node.args) > position else default
    return str(node.kwargs.get(name, given))


def inputs_of(run: RunGraph, node: fx.Node) -> list[fx.Node]:
    """The nodes that a node's row speaks of: its quantized inputs, or what it carries."""
    name = operation(run, node)
    if name == "einsum":
        operands: list[Any] = [node.args[1:]]
    else:
        operands = [_operand(node, *place) for place in _OPERANDS.get(name, (_FIRST,))]
    if name == "addmm" and added_weight(run, node) is not None:
        operands = operands[:1]
    return [operand for operand in _flat(operands) if isinstance(operand, fx.Node)]


def summed_axis(run: RunGraph, node: fx.Node, place: int | str) -> int | None:
    """The axis, from the end, of an argument that a product sums over; None where not known.

    ``place``: position of the argument, or its name.
    """
    name = operation(run, node)
    if place in (_WEIGHT[0], *_WEIGHT[1]) and name not in _OPERANDS:
        return int("transpose" not in name) if name in _SUMMED else None  # a computed weight
    for (position, names), axis in zip(
        _OPERANDS.get(name, (_FIRST,)), _SUMMED.get(name, ()), strict=False
    ):
        if place == position or place in names:
            operand = _operand(node, position, names)
            one = isinstance(operand, fx.Node) and run.values[operand].dim() == 1
            return -1 if one else axis
    return None


def weight_of(node: fx.Node) -> fx.Node | None:
    """The weight argument of a convolution or linear function; None for other nodes."""
    weight = _operand(node, *_WEIGHT)
    return weight if node.op == "call_function" and isinstance(weight, fx.Node) else None


def added_weight(run: RunGraph, node: fx.Node) -> tuple[fx.Node, int] | None:
    """The parameter that an ``addmm`` multiplies by, and the axis of its output channels."""
    weight = _operand(node, *_OPERANDS["addmm"][1]) if operation(run, node) == "addmm" else None
    axis = 1
    while isinstance(weight, fx.Node) and operation(run, weight) in ("t", "transpose"):
        weight, axis = weight.args[0], 1 - axis
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return (weight, axis) if isinstance(run.values[weight], nn.Parameter) else None


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


def weight_source(run: RunGraph, node: fx.Node) -> tuple[fx.Node, int]:
    """The parameter that a weight is, or is a part of by output channels; else the node.

    And how many axes the parameter has before the weight's: one if it holds several weights, such
    as those of experts, of which an index picks one.
    """
    step, shift = node, 0
    while (name := operation(run, step)) in _CHUNKS and isinstance(step.args[0], fx.Node):
        before = step.args[0]
        if name == "getitem":
            of_tensor = isinstance(run.values[before], Tensor)
            picks = of_tensor and _is_number(run, step.args[1])
            shift += picks
            whole = picks or isinstance(step.args[1], slice) or not of_tensor
        else:
            whole = all(dim == 0 for dim in (*step.args[2:], *step.kwargs.values()))
        if not whole:
            return node, 0
        step = before
    return (step, shift) if step.op == "get_attr" else (node, 0)


def _is_number(run: RunGraph, index: Any) -> bool:
    if isinstance(index, fx.Node):
        value = run.values[index]
        return isinstance(value, Tensor) and value.dim() == 0 and value.dtype != torch.bool
    return type(index) is int
