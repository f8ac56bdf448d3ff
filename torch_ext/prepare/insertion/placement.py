"""Applies the table of operations to a captured forward: which values get which quantizer."""

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

# By value: the nodes that read it quantized.
Readers = dict[fx.Node, set[fx.Node]]


class WeightSite(NamedTuple):
    """A parameter that is quantized as a weight."""

    owner: str  # the module's name
    parameter: str
    target: Target
    factory: Factory


class Site:
    """A quantizer in the graph: the values that it quantizes, and which nodes read the results.

    Args:
        factory: makes the quantizer.
        weight: output axis and shape, if the value is a weight that the forward computes.
    """

    def __init__(self, factory: Factory, weight: tuple[int, torch.Size] | None = None) -> None:
        self.factory = factory
        self.weight = weight
        self.readers: Readers = {}
        self.named_after: fx.Node | None = None

    def add(self, value: fx.Node, readers: Iterable[fx.Node]) -> None:
        """Lets ``readers`` read ``value`` quantized."""
        self.readers.setdefault(value, set()).update(readers)


class Placement:
    """The quantizers of a captured forward: ``sites`` and ``weights``, in the graph's order.

    Args:
        tracer: the captured forward.
        configs: the QConfig of each module.
        inputs: the factory for the model's arguments. True: as for other values; None: they stay
            float.
    """

    def __init__(
        self, tracer: Tracer, configs: QConfigMapping, inputs: Factory | bool | None
    ) -> None:
        self.tracer = tracer
        self.configs = configs
        self.inputs = inputs
        self.weights: dict[tuple[str, str], WeightSite] = {}
        self._kinds = {node: kind_of(tracer, node) for node in tracer.graph.nodes}
        self._joined: set[fx.Node] = set()  # JOIN nodes whose operands share a quantizer
        self._computed: set[fx.Node] = set()  # nodes that depend on the model's arguments
        self._site_of: dict[fx.Node, Site] = {}
        for node in tracer.graph.nodes:
            if node.op == "placeholder" or not self._computed.isdisjoint(node.all_input_nodes):
                self._computed.add(node)
            if node.op != "output":
                self._place(node)

    @property
    def sites(self) -> list[Site]:
        """Every quantizer of values once."""
        return list(dict.fromkeys(self._site_of.values()))

    def _place(self, node: fx.Node) -> None:
        """Adds the quantizers that the QConfig of the node's module gives its weight and inputs."""
        owner = self.tracer.owners[node]
        config = self.configs.of(owner)
        if config is None:
            return
        if config.weight is not None:
            self._place_weights(node, config.weight)
        if config.activation is None:
            return
        kind = self._kinds[node]
        output = kind is Kind.STUB or (node.op == "call_module" and self._is_chosen(owner))
        if output and self._is_floating(node):
            self._share([(node, reader) for reader in node.users], config.activation)
        operands = [list(self._roots(value, node)) for value in self._quantized(node, kind)]
        if kind is Kind.JOIN and any(operands):
            self._joined.add(node)
            self._share([read for reads in operands for read in reads], config.activation, node)
        else:
            for reads in operands:
                self._share(reads, config.activation)

    def _is_chosen(self, name: str) -> bool:
        """Whether it is a module of an unlisted type that the mapping names, by name or type."""
        module = self.tracer.model.get_submodule(name)
        return self.configs.chosen(name) and target_of(module) is None

    def _quantized(self, node: fx.Node, kind: Kind) -> list[fx.Node]:
        """The inputs of a node that are quantized according to the table."""
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
        """The values to quantize so that ``value`` is on a grid, each with the node that reads it.

        That is ``value``, read by ``reader``, or, if its operation keeps the grid of its inputs
        (CARRY, or JOIN with a shared quantizer), the roots of these.
        """
        kind = self._kinds[value]
        sources = inputs_of(self.tracer, value) if self._keeps_grid(value, kind) else []
        for source in sources:
            yield from self._roots(source, value)
        if not sources and self._is_floating(value) and not self._stays_float(value):
            yield value, reader

    def _keeps_grid(self, value: fx.Node, kind: Kind) -> bool:
        """Whether a result is on the grid of its operation's inputs."""
        if kind is Kind.JOIN:
            return value in self._joined
        if kind is not Kind.CARRY:
            return False
        # getitem of a tuple: an LSTM's output is a new value, but a chunk of a tensor is not.
        return all(
            isinstance(self.tracer.values[source], Tensor) or self._kinds[source] is Kind.CARRY
            for source in inputs_of(self.tracer, value)
        )

    def _stays_float(self, value: fx.Node) -> bool:
        return self.inputs is None and is_input(value)

    def _share(
        self,
        reads: list[tuple[fx.Node, fx.Node]],
        factory: Factory,
        named_after: fx.Node | None = None,
    ) -> None:
        """Quantizes values, each for its reader, by one site. Merges sites that they have already.

        The first of these keeps its factory. A new site uses ``factory``, or, if the first value is
        an argument of the model, ``inputs``.
        """
        if not reads:
            return
        sites = [self._site_of[value] for value, _ in reads if value in self._site_of]
        sites = list(dict.fromkeys(sites))
        if not sites and callable(self.inputs) and is_input(reads[0][0]):
            factory = self.inputs
        site = sites[0] if sites else Site(factory)
        for other in sites[1:]:
            for value, readers in other.readers.items():
                site.add(value, readers)
            site.named_after = site.named_after or other.named_after
        for value, reader in reads:
            site.add(value, [reader])
        site.named_after = site.named_after or named_after
        self._site_of.update(dict.fromkeys(site.readers, site))

    def _place_weights(self, node: fx.Node, factory: Factory) -> None:
        """Adds the weights of a module, or the weight that a function reads."""
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
        elif weight not in self._site_of:
            shape = self.tracer.values[weight].shape
            site = self._site_of[weight] = Site(factory, (target.ch_axis, shape))
            site.add(weight, [node])

    def _is_parameter(self, holder: str, name: str) -> bool:
        module = self.tracer.model.get_submodule(holder)
        return name in module._parameters or hasattr(module, "parametrizations")


def is_input(value: fx.Node) -> bool:
    """Whether a value is an argument of the model, or an entry of one."""
    while value.op == "call_function" and getattr(value.target, "__name__", "") == "getitem":
        source = value.args[0]
        assert isinstance(source, fx.Node)
        value = source
    return value.op == "placeholder"


class Names:
    """The module that each quantizer is attached to, and the name of the child.

    The quantizer of a leaf module's result is that module's ``activation_quantizer``. That of a
    function's result is a child of the module whose forward calls it, such as ``add_quantizer``;
    that of a parameter is ``<parameter>_quantizer``. The second call of the same function in a
    forward has the name ``add_quantizer_1``.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._names: dict[fx.Node, tuple[str, str]] = {}
        calls: dict[tuple[str, str], int] = {}
        for node in tracer.graph.nodes:
            host, stem = self._home(node)
            count = calls[host, stem] = calls.get((host, stem), -1) + 1
            self._names[node] = (host, f"{stem}_{count}" if count else stem)

    def of(self, node: fx.Node) -> tuple[str, str]:
        """The name of the module, and the child's name in it."""
        return self._names[node]

    def _home(self, node: fx.Node) -> tuple[str, str]:
        """The module's name, and the child's without a number."""
        target = str(node.target)
        if node.op == "call_module":
            module = self._tracer.model.get_submodule(target)
            # A module that has children may call each of them.
            steps = {name for name, _ in module.named_children()} - {"parametrizations"}
            return self._above(target, OUTPUT) if steps else (target, OUTPUT)
        if node.op == "get_attr":
            holder, _, name = target.rpartition(".")
            return self._host(holder, f"{name}{SUFFIX}")
        kind = operation(self._tracer, node) or getattr(node.target, "__name__", target)
        return self._host(self._tracer.owners[node], f"{kind}{SUFFIX}")

    def _host(self, name: str, stem: str) -> tuple[str, str]:
        """The module, or the nearest one above it that is no container, with the child's name."""
        module = self._tracer.model.get_submodule(name)
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        return self._above(name, stem) if name and isinstance(module, containers) else (name, stem)

    def _above(self, name: str, stem: str) -> tuple[str, str]:
        parent, _, child = name.rpartition(".")
        return self._host(parent, f"{child}_{stem}")
