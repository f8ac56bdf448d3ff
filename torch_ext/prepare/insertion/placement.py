"""Applies the table of placement to a captured forward: which values get which quantizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from torch_ext.prepare.attach import OUTPUT, SUFFIX
from torch_ext.prepare.insertion.operations import (
    Kind,
    inputs_of,
    kind_of,
    operation,
    weight_of,
    weight_source,
)
from torch_ext.prepare.insertion.tracer import Tracer
from torch_ext.prepare.qconfig import Factory
from torch_ext.prepare.qconfig_mapping import QConfigMapping
from torch_ext.prepare.quantizable_modules import TRANSPOSED, WEIGHTED, Target, target_of

# A value, and the nodes that are to read it quantized.
Readers = dict[fx.Node, set[fx.Node]]


class WeightSite(NamedTuple):
    """A parameter that is quantized as a weight."""

    owner: str
    parameter: str
    target: Target
    factory: Factory


class Site:
    """A quantizer of values: of one, or of those that share a scale."""

    def __init__(self, factory: Factory, weight: tuple[int, torch.Size] | None = None) -> None:
        self.factory = factory
        self.weight = weight  # output axis and shape, of a weight that the forward computes
        self.readers: Readers = {}
        self.named_after: fx.Node | None = None

    def add(self, value: fx.Node, readers: Iterable[fx.Node]) -> None:
        self.readers.setdefault(value, set()).update(readers)


class Placement:
    """``sites`` and ``weights`` of a captured forward, in the order of its operations."""

    def __init__(
        self, tracer: Tracer, configs: QConfigMapping, inputs: Factory | bool | None
    ) -> None:
        """``inputs``: of the model's arguments; True: as for other values; None: not quantized."""
        self.tracer = tracer
        self.configs = configs
        self.inputs = inputs
        self.weights: dict[tuple[str, str], WeightSite] = {}
        self._kinds = {node: kind_of(tracer, node) for node in tracer.graph.nodes}
        self._joined: set[fx.Node] = set()
        self._computed: set[fx.Node] = set()
        self._of: dict[fx.Node, Site] = {}
        for node in tracer.graph.nodes:
            if node.op == "placeholder" or not self._computed.isdisjoint(node.all_input_nodes):
                self._computed.add(node)
            if node.op != "output":
                self._place(node)

    @property
    def sites(self) -> list[Site]:
        return list(dict.fromkeys(self._of.values()))

    def _place(self, node: fx.Node) -> None:
        owner = self.tracer.owners[node]
        config = self.configs.of(owner)
        if config is None:
            return
        if config.weight is not None:
            self._place_weights(node, config.weight)
        if config.activation is None:
            return
        kind = self._kinds[node]
        asked = kind is Kind.STUB or (node.op == "call_module" and self._is_asked_for(owner))
        if asked and self._is_floating(node):
            self._join([(node, reader) for reader in node.users], config.activation)
        wanted = [list(self._roots(value, node)) for value in self._wanted(node, kind)]
        if kind is Kind.JOIN and any(wanted):
            self._joined.add(node)
            self._join([one for found in wanted for one in found], config.activation, node)
        else:
            for found in wanted:
                self._join(found, config.activation)

    def _is_asked_for(self, name: str) -> bool:
        """A module of an unlisted kind that the mapping names, by name or type."""
        module = self.tracer.model.get_submodule(name)
        return self.configs.chosen(name) and target_of(module) is None

    def _wanted(self, node: fx.Node, kind: Kind) -> list[fx.Node]:
        """What the table says a node reads quantized."""
        if kind not in (Kind.WEIGHTED, Kind.PRODUCT, Kind.PAIR, Kind.JOIN, Kind.RESAMPLE):
            return []
        values = [value for value in inputs_of(self.tracer, node) if self._is_floating(value)]
        if kind is Kind.PAIR and (len(values) < 2 or not self._computed.issuperset(values)):
            return []
        return values

    def _is_floating(self, node: fx.Node) -> bool:
        value = self.tracer.values[node]
        return isinstance(value, Tensor) and value.is_floating_point()

    def _roots(self, value: fx.Node, reader: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The values behind what carries their grid, each with the node that reads it."""
        kind = self._kinds[value]
        before = inputs_of(self.tracer, value) if self._carries(value, kind) else []
        for source in before:
            yield from self._roots(source, value)
        if not before and self._is_floating(value) and not self._stays_float(value):
            yield value, reader

    def _carries(self, value: fx.Node, kind: Kind) -> bool:
        if kind is Kind.JOIN:
            return value in self._joined
        if kind is not Kind.CARRY:
            return False
        # One of several results (of an LSTM, say) is a value of its own; a chunk is not.
        return all(
            isinstance(self.tracer.values[source], Tensor) or self._kinds[source] is Kind.CARRY
            for source in inputs_of(self.tracer, value)
        )

    def _stays_float(self, value: fx.Node) -> bool:
        return self.inputs is None and is_input(value)

    def _join(
        self,
        found: list[tuple[fx.Node, fx.Node]],
        factory: Factory,
        named_after: fx.Node | None = None,
    ) -> None:
        """Lets values share a site; the first configuration that asks for one of them decides."""
        known = list(dict.fromkeys(self._of[value] for value, _ in found if value in self._of))
        if not found:
            return
        if not known and callable(self.inputs) and is_input(found[0][0]):
            factory = self.inputs
        site = known[0] if known else Site(factory)
        for other in known[1:]:
            for value, readers in other.readers.items():
                site.add(value, readers)
            site.named_after = site.named_after or other.named_after
        for value, reader in found:
            site.add(value, [reader])
        site.named_after = site.named_after or named_after
        self._of.update(dict.fromkeys(site.readers, site))

    def _place_weights(self, node: fx.Node, factory: Factory) -> None:
        owner = self.tracer.owners[node]
        if node.op == "call_module":
            if (listed := target_of(self.tracer.model.get_submodule(owner))) is not None:
                for parameter in listed.weights:
                    self.weights[owner, parameter] = WeightSite(owner, parameter, listed, factory)
            return
        weight = weight_of(node) if self._kinds[node] is Kind.WEIGHTED else None
        if weight is None:
            return
        target = TRANSPOSED if "transpose" in operation(self.tracer, node) else WEIGHTED
        source = weight_source(self.tracer, weight)
        holder, _, parameter = str(source.target).rpartition(".")
        if source.op == "get_attr" and self._is_parameter(holder, parameter):
            config = self.configs.of(holder)
            if config is not None and config.weight is not None:
                key = (holder, parameter)
                self.weights.setdefault(key, WeightSite(*key, target, config.weight))
        elif weight not in self._of:
            shape = self.tracer.values[weight].shape
            site = self._of[weight] = Site(factory, (target.ch_axis, shape))
            site.add(weight, [node])

    def _is_parameter(self, holder: str, name: str) -> bool:
        module = self.tracer.model.get_submodule(holder)
        return name in module._parameters or hasattr(module, "parametrizations")


def is_input(value: fx.Node) -> bool:
    """An argument of the model, or an entry of one that is a list or a mapping."""
    while value.op == "call_function" and getattr(value.target, "__name__", "") == "getitem":
        source = value.args[0]
        assert isinstance(source, fx.Node)
        value = source
    return value.op == "placeholder"


class Names:
    """Where a quantizer hangs: a module's name, and the child's.

    A result of a leaf module: ``<module>.activation_quantizer``. A function's: on the module whose
    forward calls it, ``add_quantizer``. A parameter: ``<parameter>_quantizer``. From the second
    call of the same in the forward on, a number follows: ``add_quantizer_1``.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._of: dict[fx.Node, tuple[str, str]] = {}
        calls: dict[tuple[str, str], int] = {}
        for node in tracer.graph.nodes:
            host, stem = self._home(node)
            count = calls[host, stem] = calls.get((host, stem), -1) + 1
            self._of[node] = (host, f"{stem}_{count}" if count else stem)

    def of(self, node: fx.Node) -> tuple[str, str]:
        return self._of[node]

    def _home(self, node: fx.Node) -> tuple[str, str]:
        target = str(node.target)
        if node.op == "call_module":
            module = self._tracer.model.get_submodule(target)
            # One that has children may run each of them.
            steps = {name for name, _ in module.named_children()} - {"parametrizations"}
            return self._above(target, OUTPUT) if steps else (target, OUTPUT)
        if node.op == "get_attr":
            holder, _, name = target.rpartition(".")
            return self._host(holder, f"{name}{SUFFIX}")
        kind = operation(self._tracer, node) or getattr(node.target, "__name__", target)
        return self._host(self._tracer.owners[node], f"{kind}{SUFFIX}")

    def _host(self, name: str, stem: str) -> tuple[str, str]:
        """The module itself, or the next one above that is no container of steps."""
        module = self._tracer.model.get_submodule(name)
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        return self._above(name, stem) if name and isinstance(module, containers) else (name, stem)

    def _above(self, name: str, stem: str) -> tuple[str, str]:
        parent, _, own = name.rpartition(".")
        return self._host(parent, f"{own}_{stem}")
