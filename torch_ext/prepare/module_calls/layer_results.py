"""Layers whose result has to be quantized where it is made, as their engine asks.

Such an engine computes a layer in integers only if nothing but quantizers reads its result, be it
behind an activation that it computes together with the layer (``torch_ext.utils.backends``).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import fx, nn

from torch_ext.prepare.insertion.functions import plain_name
from torch_ext.prepare.insertion.operations import (
    Kind,
    function_of,
    inputs_of,
    kind_of,
    operation,
    option,
)
from torch_ext.prepare.insertion.placement import Placement
from torch_ext.prepare.insertion.run_graph import RunGraph
from torch_ext.prepare.module_classes import copied
from torch_ext.prepare.qconfig import Factory, QConfigMapping
from torch_ext.prepare.quantizable_modules import is_quant_stub, target_of
from torch_ext.utils.backends import QuantizedResults
from torch_ext.utils.modes import undisturbed

# Whether a reader reads a value through a quantizer.
IsQuantized = Callable[[fx.Node, fx.Node], bool]
# What a node carries on without changing its values.
Carried = Callable[[fx.Node], list[fx.Node]]

_NORMS = ("batch_norm", "batch_norm1d", "batch_norm2d", "batch_norm3d", "sync_batch_norm")
# What a trace has as reading a value, and takes only its shape or the like.
_ASK_NO_VALUE = ("size", "dim", "numel", "stride", "getattr", "new_zeros", "new_ones", "new_full")


def quantize_results(placement: Placement, folded: frozenset[str]) -> None:
    """Adds to a placement the quantizers of results; ``folded``: norms that are to be folded."""
    run = placement.recording
    readers = _Readers(run, placement.reads_quantized, placement.carried, folded)
    found = []
    for layer, config in placement.layers():
        if config.results is not None and config.activation is not None:
            value = readers.to_quantize(layer, operation(run, layer), config.results)
            if value is not None:
                found.append((value, config.activation))
    for value, factory in found:
        placement.quantize_result(value, factory)


def traced_results(
    who: str, model: nn.Module, configs: QConfigMapping, reading: Container[str]
) -> Iterator[tuple[str, Factory]]:
    """Names of layers whose results are to be quantized, by symbolic traces of the forwards.

    Where that of the model cannot be traced, those of its parts are; what reads the result of a
    part is not known then. Nothing is known of a model that cannot be copied.

    Args:
        who: the function that errors name.
        model: what runs, without quantizers.
        configs: of its modules.
        reading: names of modules that read quantized.
    """
    names = [name for name, _ in model.named_modules()]
    asking = [name for name in names if (config := configs.of(name)) and config.results]
    if not any(target_of(model.get_submodule(name)) for name in asking):
        return
    try:
        twin = copied(who, model).eval()  # tracing runs the forward, which may change the model
    except Exception:  # of the user's objects: anything may come
        return
    found: set[nn.Module] = set()
    with undisturbed(twin):
        for prefix, run in _traces("", twin):
            _find_traced(prefix, run, configs, reading, found)
    for name in names:
        config = configs.of(name)
        if config and config.activation is not None and twin.get_submodule(name) in found:
            yield name, config.activation


def _find_traced(
    prefix: str,
    run: RunGraph,
    configs: QConfigMapping,
    reading: Container[str],
    found: set[nn.Module],
) -> None:
    """Adds the layers in a trace whose results are to be quantized."""

    def is_quantized(reader: fx.Node, value: fx.Node) -> bool:
        if reader.op != "call_module":
            return False
        name = f"{prefix}{reader.target}"
        stub = is_quant_stub(run.model.get_submodule(str(reader.target)))
        config = configs.of(name)
        return name in reading or bool(stub and config and config.activation)

    def carried(node: fx.Node) -> list[fx.Node]:
        return inputs_of(run, node) if kind_of(run, node) is Kind.CARRY else []

    readers = _Readers(run, is_quantized, carried)
    for node in run.graph.nodes:
        name = f"{prefix}{node.target}"
        if node.op != "call_module" or name not in reading:
            continue
        config = configs.of(name)
        module = run.model.get_submodule(str(node.target))
        kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
        function = function_of(next(kinds, nn.Module))
        if config and config.results and readers.to_quantize(node, function, config.results):
            found.add(module)


class _PartTracer(fx.Tracer):
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except NameError:  # what is no module of the model, such as one that its class holds
            return forward(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return target_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _traces(prefix: str, module: nn.Module) -> Iterator[tuple[str, RunGraph]]:
    """Traces of a module, or, where its forward cannot be traced, of those in it.

    And of those in torch's modules, which are not looked into. Each with what its names lack.
    """
    run = RunGraph(module)
    try:
        run.graph = _PartTracer().trace(module)
    except Exception:  # the user's forward: anything may come
        parts = list(module.named_children())
    else:
        for node in run.graph.nodes:
            if node.op == "call_function":
                run.functions[node] = plain_name(node.target)
            elif node.op == "call_method":
                run.functions[node] = str(node.target).rstrip("_")
        yield prefix, run
        called = {str(node.target) for node in run.graph.nodes if node.op == "call_module"}
        parts = [(name, module.get_submodule(name)) for name in sorted(called)]
    for name, part in parts:
        if any(part.children()) and target_of(part) is None:
            yield from _traces(f"{prefix}{name}.", part)


class _Readers:
    """Tells for a run which results of layers something reads in float.

    A norm that is not folded stays in float, and nothing is quantized between a layer and its norm.
    """

    def __init__(
        self,
        run: RunGraph,
        is_quantized: IsQuantized,
        carried: Carried,
        folded: frozenset[str] = frozenset(),
    ) -> None:
        """``folded``: names of norms that are folded into the layer before them."""
        self.run, self.is_quantized, self.carried = run, is_quantized, carried
        self.folded = folded

    def to_quantize(
        self, layer: fx.Node, function: str, results: QuantizedResults
    ) -> fx.Node | None:
        """The layer's result, or what a norm folded into it makes of it, if it is to be quantized.

        None: the engine needs no quantizer there, or has no use for one. ``function``: torch's
        name of what the layer does.
        """
        if function not in results.layers:
            return None
        value = self._behind_norm(layer)
        if any(operation(self.run, reader) in _NORMS for reader in value.users):
            return None
        float_read = self._in_float(value, results.activations, results.branches)
        return value if float_read else None

    def _behind_norm(self, layer: fx.Node) -> fx.Node:
        value = step = layer
        while len(step.users) == 1:
            step = next(iter(step.users))
            owner = str(step.target) if step.op == "call_module" else self.run.owners.get(step, "")
            if owner in self.folded:
                value = step
            elif not self.carried(step):
                break
        return value

    def _in_float(self, value: fx.Node, activations: tuple[str, ...], branches: bool) -> bool:
        """Whether a reader other than a quantizer reads a value.

        What the model returns is none: ``output_qconfig`` says whether that is quantized.
        """
        readers = [r for r in value.users if self.run.functions.get(r) not in _ASK_NO_VALUE]
        if len(readers) > 1 and not branches and any(self._moves(r, value) for r in readers):
            return True
        return any(self._reads_float(r, value, activations, branches) for r in readers)

    def _moves(self, reader: fx.Node, value: fx.Node) -> bool:
        return not self.is_quantized(reader, value) and value in self.carried(reader)

    def _reads_float(
        self, reader: fx.Node, value: fx.Node, activations: tuple[str, ...], branches: bool
    ) -> bool:
        if reader.op == "output" or self.is_quantized(reader, value):
            return False
        if self._moves(reader, value):
            return self._in_float(reader, activations, branches)
        if _activation(self.run, reader) in activations:
            return self._in_float(reader, (), branches)
        return True


def _activation(run: RunGraph, node: fx.Node) -> str:
    """Torch's name of an activation; one that limits values has one for limits from 0 on."""
    name = operation(run, node).replace("_", "")  # a ReLU is a `re_lu`
    if name == "hardtanh":
        return "relu6" if _is_zero(option(run, node, "min_val", 1, "-1.0")) else name
    if name in ("clamp", "clip"):
        return "clamp" if _is_zero(option(run, node, "min", 1, "None")) else ""
    return name


def _is_zero(text: str) -> bool:
    return text in ("0", "0.0")
