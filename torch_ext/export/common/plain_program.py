"""Spares torch.onnx its second tracing of programs that have only common operations."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from torch_ext.export.common.trace import QUANTIZER

_aten = torch.ops.aten

# Operations that torch.onnx translates as they are and whose result shares no memory with anything.
_FRESH = frozenset((
    QUANTIZER, _aten.conv2d.default, _aten.linear.default, _aten.relu.default,
    _aten.sigmoid.default, _aten.silu.default, _aten.hardswish.default, _aten.hardsigmoid.default,
    _aten.clamp.default, _aten.add.Tensor, _aten.mul.Tensor, _aten.cat.default,
    _aten.max_pool2d.default, _aten.avg_pool2d.default, _aten.mean.dim,
))  # fmt: skip
# What writes to its first argument -> the operation that returns the same.
_IN_PLACE = {
    _aten.relu_.default: _aten.relu.default,
    _aten.silu_.default: _aten.silu.default,
    _aten.sigmoid_.default: _aten.sigmoid.default,
    _aten.hardswish_.default: _aten.hardswish.default,
    _aten.hardsigmoid_.default: _aten.hardsigmoid.default,
    _aten.hardtanh_.default: _aten.hardtanh.default,
    _aten.clamp_.default: _aten.clamp.default,
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.copy_.default: _aten.copy.default,
}
_TWO_TENSORS = (_aten.add.Tensor, _aten.mul.Tensor, _aten.copy.default)


class _NotPlain(Exception):
    """An operation that is left to torch.onnx."""


def spare_tracing(program: ExportedProgram) -> None:
    """Has the program decompose itself, where each of its operations is one of a table.

    torch.onnx asks a program for its decomposition, which traces it again with symbolic sizes, and
    then runs it once more to find numbers whose types have to be promoted: half of the time of an
    export. Of common operations on float32 the outcome is known. Other programs go their way.
    """
    traced_again: Callable[..., ExportedProgram] = program.run_decompositions

    def run_decompositions(table: Any = None, *args: Any, **keys: Any) -> ExportedProgram:
        try:
            graph = _Decomposition(program, table or {}).graph()
        except _NotPlain:
            return traced_again(table, *args, **keys)
        module = program.graph_module
        module.graph = graph
        # Nothing is to be promoted, and no assertion to be removed, in any of its modules.
        vars(module)["modules"] = lambda: iter(())
        return program

    vars(program)["run_decompositions"] = run_decompositions


class _Decomposition:
    """The graph of a program in the operations that torch.onnx translates, as it names them.

    Args:
        table: the operations that torch.onnx has decomposed.
    """

    def __init__(self, program: ExportedProgram, table: Container[Any]) -> None:
        self.program = program
        self.table = table
        self.made = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}  # of the program's graph -> of the one made
        self.order = {node: place for place, node in enumerate(program.graph.nodes)}
        self.sizes: dict[Any, fx.Node] = {}

    def graph(self) -> fx.Graph:
        """The graph, with the signature's outputs named after it; raises _NotPlain if none."""
        signature = self.program.graph_signature
        if any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs):
            raise _NotPlain
        nodes = list(self.program.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        for node in inputs:
            self.nodes[node] = self._copied_input(node)
        self._read_sizes(inputs, nodes[len(inputs)].meta)
        for node in nodes[len(inputs) : -1]:
            self.nodes[node] = self._call(node)
        output = nodes[-1]
        results = output.args[0]
        if not isinstance(results, (list, tuple)) or any(
            not isinstance(result, fx.Node) or result.op == "placeholder" for result in results
        ):
            raise _NotPlain
        self.made.node_copy(output, self.nodes.__getitem__)
        self.made.eliminate_dead_code()
        # All at once: a name of the one graph may stand for something else in the other.
        names = {node.name: self.nodes[node].name for node in nodes if node in results}
        for spec in signature.output_specs:
            spec.arg.name = names.get(spec.arg.name, spec.arg.name)
        return self.made

    def _copied_input(self, node: fx.Node) -> fx.Node:
        made = self.made.node_copy(node)
        made.name = node.name  # which the signature has; fx would call "input" otherwise
        return made

    def _read_sizes(self, inputs: list[fx.Node], meta: dict[str, Any]) -> None:
        """Adds a node that reads the batch size, if it is open; it goes again if nothing needs it.

        It has the name that tracing again would give it. `meta` says where in the model it is.
        """
        for node in inputs:
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr not in self.sizes:
                    if self.sizes:
                        raise _NotPlain
                    read = self.made.create_node(
                        "call_function", _aten.sym_size.int, (self.nodes[node], axis), {},
                        "sym_size_int_1",
                    )  # fmt: skip
                    read.meta = {**meta, "val": size}
                    self.sizes[size.node.expr] = read

    def _call(self, node: fx.Node) -> fx.Node:
        """Adds what a node computes."""
        target: Any = node.target
        args: list[Any] = list(node.args)
        if node.op != "call_function" or node.kwargs or not _is_float32(node):
            raise _NotPlain
        if target in _IN_PLACE:
            self._check_may_write(node)
            target = _IN_PLACE[target]
        if target in (_aten.hardtanh.default, _aten.clamp.default):
            bounds = args[1:]
            if target is _aten.hardtanh.default:
                bounds += [-1.0, 1.0][len(bounds) :]
            if len(bounds) != 2 or not all(isinstance(bound, float) for bound in bounds):
                raise _NotPlain
            target, args = _aten.clamp.default, [args[0], *bounds]
        elif target is _aten.dropout.default:
            if args[2] is not False:
                raise _NotPlain
            target, args = _aten.clone.default, args[:1]
        elif target is _aten.adaptive_avg_pool2d.default:
            if list(args[1]) != [1, 1] or args[0].meta["val"].dim() != 4:
                raise _NotPlain
            target, args = _aten.mean.dim, [args[0], [-1, -2], True]
        elif target is _aten.flatten.using_ints:
            target, args = _aten.view.default, [args[0], self._sizes_of_flat(node)]
        elif target in _TWO_TENSORS:
            if len(args) != 2 or not all(isinstance(value, fx.Node) for value in args):
                raise _NotPlain
            if target is _aten.copy.default and _shape(args[0]) != _shape(args[1]):
                raise _NotPlain
        elif target not in _FRESH:
            raise _NotPlain
        if target in self.table:
            raise _NotPlain
        made = self.made.create_node(
            "call_function", target, fx.map_arg(tuple(args), self._made_of), {},
            target._schema.name.partition("::")[2],
        )  # fmt: skip
        made.meta = dict(node.meta)
        return made

    def _made_of(self, node: fx.Node) -> fx.Node:
        """The node in place of one of the program's, or one of those that read sizes."""
        return self.nodes.get(node, node)

    def _sizes_of_flat(self, node: fx.Node) -> list[Any]:
        """The sizes of what flatten makes, if it only gives others to the same memory."""
        x: Any = node.args[0]
        value, made = x.meta["val"], node.meta["val"]
        if not value.is_contiguous() or made.dim() >= value.dim() or made.dim() == 0:
            raise _NotPlain
        sizes: list[Any] = []
        for size in made.shape:
            if isinstance(size, int):
                sizes.append(size)
            elif size.node.expr in self.sizes:
                sizes.append(self.sizes[size.node.expr])
            else:
                raise _NotPlain
        return sizes

    def _check_may_write(self, node: fx.Node) -> None:
        """Raises _NotPlain unless nothing else than the node's readers sees what it writes.

        What it writes to has to be new memory, read before by what keeps none of it.
        """
        x = node.args[0]
        if not isinstance(x, fx.Node) or not (x.target in _FRESH or x.target in _IN_PLACE):
            raise _NotPlain
        for user in x.users:
            before = self.order[user] < self.order[node] and user.target in _FRESH
            if user is not node and not before:
                raise _NotPlain


def _shape(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _is_float32(node: fx.Node) -> bool:
    """Whether a node computes a tensor of float32 from such tensors."""
    values = [node.meta.get("val"), *(read.meta.get("val") for read in node.all_input_nodes)]
    return all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values)
