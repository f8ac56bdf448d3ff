"""Replaces the quantizers of an exported program by quantize and dequantize nodes of PT2E."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from torch_ext.export.common.aten import aten_name, moved_by
from torch_ext.export.common.entries import Entry
from torch_ext.export.common.trace import QUANTIZER, quantizer_calls
from torch_ext.export.programs.engine_layers import ProgramEngine, float_reason
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import AnyWeightSource

_RESHAPES = ("flatten", "reshape", "unflatten", "view")


def decomposed() -> Any:
    """The operators ``quantized_decomposed``, which torch defines in a module of its own."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


class QuantizedProgram:
    """Rewrites one program in place; call `place`, `float_layers` and `finish`, in that order.

    The program writes to no value. `chosen` has the quantizers by name, `sources` what weight
    quantizers read.
    """

    def __init__(
        self,
        program: ExportedProgram,
        chosen: Mapping[str, Entry],
        sources: Mapping[FakeQuantize, AnyWeightSource],
        engine: ProgramEngine,
    ) -> None:
        self.program = program
        self.graph = program.graph
        self.chosen = chosen
        self.sources = sources
        self.engine = engine
        self.ops = decomposed()
        self.quantizers: dict[fx.Node, Entry] = {}
        self.weights: dict[fx.Node, Entry] = {}
        for name, node in quantizer_calls(self.graph):
            entry = chosen[name]
            (self.weights if entry.quantizer in sources else self.quantizers)[node] = entry
        self.in_float: dict[tuple[fx.Node, fx.Node], str] = {}  # weight and reader -> why
        self.stored: dict[str, tuple[fx.Node, Tensor]] = {}  # new buffers: placeholder and value
        parameters = program.graph_signature.inputs_to_parameters
        # New buffers go before it, behind the parameters and those before them.
        self.behind_parameters = next(n for n in self.graph.nodes if n.name not in parameters)
        values = [node.meta["val"] for node in self.graph.nodes if "val" in node.meta]
        self.fake_mode: Any = torch._guards.detect_fake_mode(values)

    def place(self) -> None:
        """Quantizes before and behind operations that only move values, so that these are in
        integers too, and what reads them reads quantized values directly."""
        if self.engine.torchao:
            self._flatten_linears()
        for node in list(self.graph.nodes):
            for before in moved_by(node):
                if before in self.quantizers or not self._is_float(before):
                    continue
                if entry := self._read_as(node):
                    node.replace_input_with(before, self._add(entry, before, node))
        for node in list(self.graph.nodes):
            if not self._is_float(node) or (entry := self._on_grid(node)) is None:
                continue
            readers = list(node.users)
            if all(reader.op == "output" or self._same(reader, entry) for reader in readers):
                continue
            made = self._add(entry, node, node.next)
            for reader in readers:
                reader.replace_input_with(node, made)
        self._merge()

    def _flatten_linears(self) -> None:
        """Gives linear layers matrices: of what has more axes, torchao finds only some."""
        reshape = torch.ops.aten.reshape.default
        for node in list(self.graph.nodes):
            if aten_name(node) != "linear" or node.args[1] not in self.weights:
                continue
            x, made = node.args[0], node.meta["val"]
            sizes = [size if isinstance(size, int) else -1 for size in made.shape]
            if made.dim() < 3 or sizes.count(-1) > 1:
                continue
            with self.graph.inserting_before(node):
                matrix = self._call(reshape, (x, [-1, x.meta["val"].shape[-1]]), x)
            node.replace_input_with(x, matrix)
            with self.graph.inserting_after(node):
                back = self.graph.call_function(reshape, (node, sizes))
            back.meta = dict(node.meta)
            node.replace_all_uses_with(back, delete_user_cb=lambda user, own=back: user is not own)
            with self.fake_mode:
                node.meta["val"] = made.flatten(0, -2)

    def _is_float(self, node: object) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return isinstance(value, Tensor) and value.dtype == torch.float32

    def _same(self, node: fx.Node, entry: Entry) -> bool:
        """Whether a node quantizes on the entry's grid."""
        other = self.quantizers.get(node)
        return other is not None and _grid(other) == _grid(entry)

    def _read_as(self, node: fx.Node) -> Entry | None:
        """The grid on which everything that reads a node quantizes it; None if there is none."""
        return _common(
            self.quantizers.get(reader) or (self._read_as(reader) if moved_by(reader) else None)
            for reader in node.users
        )

    def _on_grid(self, node: fx.Node) -> Entry | None:
        """The grid that all values of a node are on, as those that it moves are."""
        return _common(
            # What chunk and split return is no tensor; what is moved out of it is.
            self.quantizers.get(before)
            or (None if self._is_float(before) else self._on_grid(before))
            for before in moved_by(node)
        )

    def _add(self, entry: Entry, x: fx.Node, before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            node: fx.Node = self.graph.call_function(QUANTIZER, (x, entry.name))
        node.meta = dict(x.meta)
        self.quantizers[node] = entry
        return node

    def _merge(self) -> None:
        """Keeps one of the quantizers of a value on a grid."""
        kept: dict[tuple[fx.Node, Any], fx.Node] = {}
        for node in [node for node in self.graph.nodes if node in self.quantizers]:
            entry, x = self.quantizers[node], node.args[0]
            # What quantizes a value that is on that grid already gives the same value.
            earlier = x if self._same(x, entry) else kept.setdefault((x, _grid(entry)), node)
            if earlier is not node:
                node.replace_all_uses_with(earlier)
                self.graph.erase_node(node)
                del self.quantizers[node]

    def float_layers(self) -> dict[str, str]:
        """Names of the modules with a quantized weight that the engine computes in float, with the
        reason."""
        found = {}
        for weight, entry in self.weights.items():
            for reader in weight.users:
                if why := float_reason(reader, self.engine, self.quantizers, weight):
                    self.in_float[weight, reader] = why
                    found[self.sources[entry.quantizer].owner] = why
        return found

    def finish(self) -> ExportedProgram:
        """The program with quantize and dequantize nodes, and integers in place of weights."""
        for node, entry in self.weights.items():
            for reader in list(node.users):
                reader.replace_input_with(node, self._weight(node, entry, reader))
            self.graph.erase_node(node)
        for node, entry in self.quantizers.items():
            self._activation(node, entry)
        if self.engine.torchao:
            self._lay_out()
        self.graph.eliminate_dead_code()
        return self._program()

    def _activation(self, node: fx.Node, entry: Entry) -> None:
        """Quantizes once, and dequantizes for each reader, as engines match the two together."""
        params = entry.params
        grid = (float(entry.scale), int(entry.zero_point), params.quant_min, params.quant_max)
        arguments = (*grid, self.engine.dtype)
        with self.graph.inserting_before(node):
            q = self._call(self.ops.quantize_per_tensor.default, (node.args[0], *arguments), node)
        for reader in list(node.users):
            with self.graph.inserting_before(reader):
                x = self._call(self.ops.dequantize_per_tensor.default, (q, *arguments), node)
            reader.replace_input_with(node, x)
        self.graph.erase_node(node)

    def _lay_out(self) -> None:
        """Copies what convolutions compute before its axes are joined.

        In Inductor it is in the memory format channels_last, and torchao's lowering makes a view
        of it, for which the axes would have to lie as they were traced.
        """
        clone, keys = torch.ops.aten.clone.default, {"memory_format": torch.contiguous_format}
        for node in list(self.graph.nodes):
            if aten_name(node) not in _RESHAPES or not _of_convolution(x := node.args[0]):
                continue
            with self.graph.inserting_before(node):
                made = self.graph.call_function(clone, (x,), keys)
            made.meta = dict(x.meta)
            node.replace_input_with(x, made)

    def _weight(self, node: fx.Node, entry: Entry, reader: fx.Node) -> fx.Node:
        """What a reader of a weight's quantizer reads in its place."""
        source, params = self.sources[entry.quantizer], entry.params
        label = f"{source.owner}.{source.parameter}".strip(".")
        if self.engine.results and (node, reader) in self.in_float:
            # XNNPACK refuses a program with a dequantized weight that no layer of integers reads.
            return self._store(f"{label}_dequantized", lambda: self._values(entry, source))
        w = self._store(label, lambda: self._levels(entry, source))
        kind, rank = aten_name(reader), node.meta["val"].dim()
        axis = params.ch_axis
        if axis < 0 and (node, reader) not in self.in_float:
            axis = (
                1 if kind.startswith("conv_transpose") else 0
            )  # they look for weights per channel
        arguments: tuple[Any, ...]
        limits = (params.quant_min, params.quant_max, torch.int8)
        if axis < 0:
            call, arguments = self.ops.dequantize_per_tensor.default, (float(entry.scale), 0)
        else:
            channels = node.meta["val"].shape[axis]
            device = source.read().device
            scale = self._store(
                f"{label}_scale", lambda: entry.scale.expand(channels).clone().to(device)
            )
            zero = self._store(
                f"{label}_zero_point",
                lambda: torch.zeros(channels, dtype=torch.int64, device=device),
            )
            call, arguments = self.ops.dequantize_per_channel.default, (scale, zero, axis % rank)
        with self.graph.inserting_before(reader):
            return self._call(call, (w, *arguments, *limits), node)

    def _values(self, entry: Entry, source: AnyWeightSource) -> Tensor:
        with torch.no_grad():
            values: Tensor = entry.quantizer(source.read())
        return values.detach().clone()

    def _levels(self, entry: Entry, source: AnyWeightSource) -> Tensor:
        """A weight's levels, from its fake-quantized values, level times scale."""
        values = self._values(entry, source)
        shape = [1] * values.dim()
        if entry.params.ch_axis >= 0:
            shape[entry.params.ch_axis] = -1
        levels = (values.double() / entry.scale.double().to(values.device).view(shape)).round()
        return levels.to(torch.int8)

    def _store(self, name: str, make: Callable[[], Tensor]) -> fx.Node:
        """The placeholder of a new buffer; `make` is called at the first request of the name."""
        while name in self.program.state_dict:
            name += "_quantized"
        if name not in self.stored:
            value = make()
            with self.graph.inserting_before(self.behind_parameters):
                node = self.graph.placeholder(f"b_{name.replace('.', '_')}")
            node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
            self.stored[name] = node, value
        return self.stored[name][0]

    def _call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        node: fx.Node = self.graph.call_function(target, args)
        node.meta = {key: value for key, value in like.meta.items() if key != "val"}
        with self.fake_mode:
            node.meta["val"] = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
        return node

    def _program(self) -> ExportedProgram:
        """The program of the rewritten graph, without the parameters that nothing reads now."""
        before, signature = self.program, self.program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        for name, (node, _) in self.stored.items():
            specs[node.name] = InputSpec(
                InputKind.BUFFER, TensorArgument(node.name), name, persistent=True
            )
        kept, state = [], {}
        for node in [node for node in self.graph.nodes if node.op == "placeholder"]:
            spec = specs[node.name]
            is_state = spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
            if is_state and not node.users:
                self.graph.erase_node(node)
                continue
            kept.append(spec)
            if is_state and spec.target in self.stored:
                state[spec.target] = self.stored[spec.target][1]
            elif is_state and spec.target in before.state_dict:
                state[spec.target] = _copied(before.state_dict[spec.target])
        outputs = [
            dataclasses.replace(spec, arg=TensorArgument(value.name))
            if isinstance(spec.arg, TensorArgument) and isinstance(value, fx.Node)
            else spec
            for spec, value in zip(
                signature.output_specs, self.graph.output_node().args[0], strict=True
            )
        ]
        return ExportedProgram(
            root=before.graph_module,
            graph=self.graph,
            graph_signature=dataclasses.replace(signature, input_specs=kept, output_specs=outputs),
            state_dict=state,
            range_constraints=before.range_constraints,
            module_call_graph=before.module_call_graph,
            example_inputs=before.example_inputs,
            constants=before.constants,
            verifiers=before.verifiers,
        )


def _common(entries: Iterable[Entry | None]) -> Entry | None:
    """The first entry if all have its grid; None otherwise."""
    found = list(entries)
    first = found[0] if found else None
    same = first and all(entry is not None and _grid(entry) == _grid(first) for entry in found)
    return first if same else None


def _of_convolution(node: Any) -> bool:
    """Whether a value of more than one position has its memory format from a convolution."""
    rank, waiting, seen = _rank(node), [node], set()
    if rank < 3 or all(size == 1 for size in node.meta["val"].shape[2:]):
        return False
    while waiting:
        node = waiting.pop()
        if node in seen or _rank(node) != rank or aten_name(node) == "linear":
            continue
        if aten_name(node).startswith("conv"):
            return True
        seen.add(node)
        waiting += node.all_input_nodes
    return False


def _rank(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else 0


def _grid(entry: Entry) -> tuple[float, int]:
    """What tells the grids of activations apart, where all are of the engine's type."""
    return float(entry.scale), int(entry.zero_point)


def _copied(value: Tensor) -> Tensor:
    """A copy of a parameter or buffer, so that the program stays when the model changes."""
    made = value.detach().clone()
    is_parameter = isinstance(value, torch.nn.Parameter)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made
