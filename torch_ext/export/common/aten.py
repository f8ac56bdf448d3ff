"""ATen's names of the operations in an exported program."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.export import ExportedProgram

from torch_ext.utils.operations import KEEP_VALUES

# ATen's own names of operations in KEEP_VALUES: torch.export records getitem of a tensor as slice,
# index or select, dropout2d as feature_dropout, x.T as numpy_T, nearest interpolation by its kind.
_ATEN_NAMES = (
    "alias", "feature_dropout", "index", "mT", "numpy_T", "slice", "split_with_sizes",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
)  # fmt: skip
_MOVES_VALUES = frozenset((*KEEP_VALUES, *_ATEN_NAMES))
_JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")


def aten_name(node: object) -> str:
    """``conv2d`` for aten::conv2d in any overload or in place; empty for other operators."""
    if not isinstance(node, fx.Node):
        return ""
    if node.target is operator.getitem:  # an entry of what chunk or split returns
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, _, name = node.target._schema.name.partition("::")
    return name.removesuffix("_") if namespace == "aten" else ""


def moves_values(node: object) -> bool:
    """Whether values of the node's first argument that are on a grid are on it afterwards."""
    return aten_name(node) in _MOVES_VALUES and not _pads_with_a_number(node)


def moved_by(node: object) -> list[fx.Node]:
    """The nodes whose values, and no others, are those of a node; empty if it computes new ones."""
    if not isinstance(node, fx.Node):
        return []
    if aten_name(node) in _JOINS:
        joined = node.args[0]
        return list(joined) if isinstance(joined, (list, tuple)) else []  # type: ignore[arg-type]
    return [node.args[0]] if moves_values(node) and isinstance(node.args[0], fx.Node) else []


def _pads_with_a_number(node: object) -> bool:
    """Whether a node is ``pad`` with a constant other than 0, which may not be on the grid."""
    if not isinstance(node, fx.Node) or aten_name(node) != "pad":
        return False
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return value not in (None, 0)


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without operations that write to what they read.

    A prepared model sums in place by ``copy_``. What that wrote to, a layer's result, would have
    another reader than the quantizer; without the writing nothing has to be copied.
    """
    if not any(_writes(node) for node in program.graph.nodes):
        return program
    made: ExportedProgram = program.run_decompositions({})
    for node in list(made.graph.nodes):
        if node.target is torch.ops.aten.copy.default:
            source = node.args[1]
            if source.meta["val"].shape == node.meta["val"].shape and (
                source.meta["val"].dtype == node.meta["val"].dtype
            ):
                node.replace_all_uses_with(source)
                made.graph.erase_node(node)
    return made


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
