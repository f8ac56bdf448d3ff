"""Applies the table of placement to a recorded run: which operands are read quantized, by what."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from torch_ext.prepare.blocks.dynamic_axes import DynamicAxes
from torch_ext.prepare.insertion.operations import (
    ASKING,
    DROPOUTS,
    SUMS,
    Kind,
    added_weight,
    inputs_of,
    kind_of,
    operation,
    summed_axis,
    weight_of,
    weight_source,
)
from torch_ext.prepare.insertion.recording import Recording, is_wrapped
from torch_ext.prepare.qconfig import Factory, QConfig, QConfigMapping
from torch_ext.prepare.quantizable_modules import TRANSPOSED, WEIGHTED, Target, target_of
from torch_ext.utils.attention_scores import AttentionScores


class WeightSite(NamedTuple):
    """A parameter that is quantized as a weight."""

    owner: str
    parameter: str
    target: Target
    factory: Factory


class Ask(NamedTuple):
    """An operand that is read quantized."""

    reader: fx.Node
    operand: fx.Node
    value: fx.Node  # what a quantizer is of: the operand, or behind it what operations carry


class Site:
    """A quantizer of values: of one, or of those that share a scale."""

    def __init__(self, factory: Factory, weight: tuple[Target, torch.Size] | None = None) -> None:
        self.factory = factory
        self.weight = weight  # its axes and shape, of a weight that the forward computes
        self.values: dict[fx.Node, None] = {}
        self.named_after: fx.Node | None = None

    @property
    def name_giver(self) -> fx.Node:
        return self.named_after or next(iter(self.values))


class Placement:
    """``sites``, ``weights`` and ``asks`` of a run, in the order of its operations.

    ``outputs``: values that are quantized where they are made, whoever reads them.
    """

    def __init__(
        self,
        recording: Recording,
        configs: QConfigMapping,
        inputs: Factory | bool | None,
        dynamic: DynamicAxes,
    ) -> None:
        """``inputs``: of the model's arguments; True: as for other values; None: not quantized."""
        self.recording = recording
        self.dynamic = dynamic
        self.configs = configs
        self.inputs = inputs
        self.weights: dict[tuple[str, str], WeightSite] = {}
        self.asks: dict[tuple[fx.Node, fx.Node], Ask] = {}
        self.outputs: dict[fx.Node, None] = {}
        self.site_of: dict[fx.Node, Site] = {}
        self._kinds = {node: kind_of(recording, node) for node in recording.graph.nodes}
        self._scores = AttentionScores(
            recording.graph,
            functools.partial(operation, recording),
            recording.values.__getitem__,
            masks={node for node, value in recording.values.items() if _is_two_valued(node, value)},
            kept=recording.kept,
        )
        self._joined: set[fx.Node] = set()
        self._repeated: dict[tuple[object, ...], list[fx.Node]] = {}
        self._computed: set[fx.Node] = set()
        self._data: set[fx.Node] = set()
        for node in recording.graph.nodes:
            if node.op == "placeholder" or not self._computed.isdisjoint(node.all_input_nodes):
                self._computed.add(node)
            if self._is_data(node):
                self._data.add(node)
            self._place(node)

    @property
    def sites(self) -> list[Site]:
        return list(dict.fromkeys(self.site_of.values()))

    def layers(self) -> Iterator[tuple[fx.Node, QConfig]]:
        """The layers that read quantized, with their configuration."""
        for node, kind in self._kinds.items():
            if kind is not Kind.WEIGHTED or not self._may_read(node):
                continue
            module = node.op == "call_module"
            config = self.configs.of(str(node.target) if module else self.recording.owners[node])
            operands = inputs_of(self.recording, node)
            if config and all(self._is_on_grid(operand) for operand in operands):
                yield node, config

    def _is_on_grid(self, operand: fx.Node) -> bool:
        while before := self.carried(operand):
            operand = before[0]
        return operand in self.site_of

    def reads_quantized(self, reader: fx.Node, value: fx.Node) -> bool:
        """Whether a node reads a value through a quantizer, or is one itself."""
        is_stub = self._kinds[reader] is Kind.STUB and reader in self.outputs
        return is_stub or (reader, value) in self.asks

    def quantize_result(self, node: fx.Node, factory: Factory) -> None:
        """Quantizes a value where it is made, so that whoever reads it reads it quantized."""
        if not self._may_read(node):
            return
        self.outputs[node] = None
        self._join(self._with_repeated(node, -1, [node]), factory)
        self.asks = {key: ask for key, ask in self.asks.items() if ask.value is not node}

    def _is_data(self, node: fx.Node) -> bool:
        """Whether an argument or a parameter is behind it, not only buffers and constants."""
        if node in self._computed or not self._data.isdisjoint(node.all_input_nodes):
            return True
        return node.op == "get_attr" and isinstance(self.recording.values[node], nn.Parameter)

    def _place(self, node: fx.Node) -> None:
        config = self.configs.of(self.recording.owners[node])
        if node.op == "call_module":
            config = self.configs.of(str(node.target))
        if config is None or not self._may_read(node):
            return
        if config.weight is not None:
            self._place_weights(node, config.weight)
        if config.activation is None:
            return
        kind = self._kinds[node]
        if kind in SUMS and self.dynamic.quantizer(config.activation) is not None:
            return
        asked = kind is Kind.STUB or (node.op == "call_module" and self._is_asked_for(node))
        if asked and self._is_floating(node):
            if not self.dynamic.follows_readers(config.activation):
                self.outputs[node] = None
            self._join([node], config.activation)
        operands = self._wanted(node, kind)
        if kind is Kind.PRODUCT:
            operands = self._divided(node, operands, config.activation)
        wanted = [(operand, list(self._values(operand))) for operand in operands]
        wanted = [(operand, values) for operand, values in wanted if values]
        if kind is Kind.JOIN and wanted:
            self._joined.add(node)
            every = [v for _, values in wanted for v in values]
            self._join(self._with_repeated(node, 0, every), config.activation, node)
        for i, (operand, values) in enumerate(wanted):
            if kind is not Kind.JOIN:
                self._join(self._with_repeated(node, i, values), config.activation)
            self._ask(node, operand)

    def _with_repeated(self, node: fx.Node, place: int, values: list[fx.Node]) -> list[fx.Node]:
        """What the same operation read at the same line, if data decides how often it comes by."""
        key: tuple[object, ...]
        if node in self.recording.calls:
            call = self.recording.calls[node]
            if not call.repeats:
                return values
            key = (call.module, place)
        else:
            call, line, _ = self.recording.function_calls[node]
            if line not in call.repeating:
                return values
            key = (call, line, place)
        return [*dict.fromkeys([*self._repeated.setdefault(key, values), *values])]

    def _may_read(self, node: fx.Node) -> bool:
        """Not what hooks do, nor what has no floating operands; the same for quantized results."""
        return node in self.recording.calls or node in self.recording.function_calls

    def _is_asked_for(self, node: fx.Node) -> bool:
        """A module of an unlisted kind that the mapping names, by name or type."""
        name = str(node.target)
        module = self.recording.model.get_submodule(name)
        return self.configs.chosen(name) and target_of(module) is None

    def _wanted(self, node: fx.Node, kind: Kind) -> list[fx.Node]:
        """What the table says a node reads quantized."""
        if kind not in ASKING:
            return []
        recording, masks = self.recording, self._scores.masks
        operands = [
            operand
            for operand in inputs_of(recording, node)
            if self._is_floating(operand) and operand not in recording.masks
        ]
        if kind in (Kind.PAIR, Kind.JOIN) and self._scores.stays_float(node):
            return []
        if kind in (Kind.PAIR, Kind.RESAMPLE):
            operands = [operand for operand in operands if operand not in masks]
        if kind is Kind.PAIR and (len(operands) < 2 or not self._computed.issuperset(operands)):
            return []
        if kind in (Kind.PRODUCT, Kind.JOIN) and self._scores.is_of_masks(operands):
            return []
        if not self._data.isdisjoint(operands):
            return operands
        # A layer also reads tables quantized, such as those of relative positions.
        layer = kind is Kind.WEIGHTED
        return [op for op in operands if layer and bool(recording.values[op].any())]

    def _divided(self, node: fx.Node, factors: list[fx.Node], factory: Factory) -> list[fx.Node]:
        """Without the factors that groups do not divide, if all are computed.

        Such as probabilities and values, whose sum is over tokens, of which there are any number.
        """
        if not self._computed.issuperset(factors):
            return factors
        run = self.recording
        arguments: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]

        def fits(factor: fx.Node) -> bool:
            axes = [summed_axis(run, node, place) for place, given in arguments if given is factor]
            shape = run.values[factor].shape
            return all(self.dynamic.divides(factory, shape, axis) for axis in axes)

        return [factor for factor in factors if fits(factor)]

    def _is_floating(self, node: fx.Node) -> bool:
        value = self.recording.values[node]
        return isinstance(value, Tensor) and value.is_floating_point() and not is_wrapped(value)

    def _values(self, operand: fx.Node) -> Iterator[fx.Node]:
        """The values behind what carries their grid."""
        before = self.carried(operand)
        for source in before:
            yield from self._values(source)
        if not before and self._is_floating(operand) and not self._stays_float(operand):
            yield operand

    def carried(self, node: fx.Node) -> list[fx.Node]:
        """What a node carries; nothing where it makes a new value."""
        kind = self._kinds[node]
        if node in self.outputs or not (kind is Kind.CARRY or node in self._joined):
            return []
        sources = inputs_of(self.recording, node)
        if node in self._joined:
            return sources
        # One of several results (of an LSTM, say) is a value of its own; a chunk is not.
        carries = all(
            isinstance(self.recording.values[source], Tensor) or self._kinds[source] is Kind.CARRY
            for source in sources
        )
        return sources if carries else []

    def _stays_float(self, value: fx.Node) -> bool:
        return self.inputs is None and is_input(value)

    def _ask(self, reader: fx.Node, operand: fx.Node) -> None:
        step, site = operand, self.site_of.get(self._source(operand))
        fixed = site is not None and self.dynamic.quantizer(site.factory) is None
        while step not in self._joined and (before := self.carried(step)):
            if fixed and self._is_active_dropout(step, before[0]) and self._may_read(step):
                self._ask(step, before[0])  # which scales: its input is what is on the grid
                return
            step = before[0]
        # What was joined is on its grid already.
        if step in self.site_of and step not in self._joined and step not in self.outputs:
            self.asks.setdefault((reader, operand), Ask(reader, operand, step))

    def _source(self, operand: fx.Node) -> fx.Node:
        while operand not in self._joined and (before := self.carried(operand)):
            operand = before[0]
        return operand

    def _is_active_dropout(self, node: fx.Node, before: fx.Node) -> bool:
        values = self.recording.values
        return operation(self.recording, node) in DROPOUTS and values[node] is not values[before]

    def _join(
        self, values: list[fx.Node], factory: Factory, named_after: fx.Node | None = None
    ) -> None:
        """Lets values share a site; the first configuration that asks for one of them decides."""
        known = list(dict.fromkeys(self.site_of[v] for v in values if v in self.site_of))
        if not values:
            return
        if not known and callable(self.inputs) and is_input(values[0]):
            factory = self.inputs
        site = known[0] if known else Site(factory)
        for other in known[1:]:
            site.values.update(other.values)
            site.named_after = site.named_after or other.named_after
        site.values.update(dict.fromkeys(values))
        site.named_after = site.named_after or named_after
        self.site_of.update(dict.fromkeys(site.values, site))

    def _place_weights(self, node: fx.Node, factory: Factory) -> None:
        if node.op == "call_module":
            owner = str(node.target)
            if (listed := target_of(self.recording.model.get_submodule(owner))) is not None:
                for parameter in listed.weights:
                    self.weights[owner, parameter] = WeightSite(owner, parameter, listed, factory)
            return
        if (added := added_weight(self.recording, node)) is not None:
            source, axis = added
            self._place_parameter(source, TRANSPOSED if axis else WEIGHTED)
            return
        weight = weight_of(node) if self._kinds[node] is Kind.WEIGHTED else None
        if weight is None:
            return
        transposed = "transpose" in operation(self.recording, node)
        target = TRANSPOSED if transposed else WEIGHTED
        source, shift = weight_source(self.recording, weight)
        if shift:
            axes = (target.ch_axis + shift, target.in_axis + shift)
            target = target._replace(ch_axis=axes[0], in_axis=axes[1])
        if self._place_parameter(source, target):
            return
        if weight not in self.site_of:
            shape = self.recording.values[weight].shape
            site = self.site_of[weight] = Site(factory, (target, shape))
            site.values[weight] = None
        self.asks[node, weight] = Ask(node, weight, weight)

    def _place_parameter(self, source: fx.Node, target: Target) -> bool:
        """Plans the weight that a node stands for; returns whether it is a parameter."""
        holder, _, parameter = str(source.target).rpartition(".")
        if source.op != "get_attr" or not self._is_parameter(holder, parameter):
            return False
        config = self.configs.of(holder)
        if config is not None and config.weight is not None:
            key = (holder, parameter)
            self.weights.setdefault(key, WeightSite(*key, target, config.weight))
        return True

    def _is_parameter(self, holder: str, name: str) -> bool:
        module = self.recording.model.get_submodule(holder)
        return name in module._parameters or hasattr(module, "parametrizations")


def is_input(value: fx.Node) -> bool:
    """An argument of the model, or an entry of one that is a list or a mapping."""
    while value.op == "call_function" and getattr(value.target, "__name__", "") == "_part":
        source = value.args[0]
        assert isinstance(source, fx.Node)
        value = source
    return value.op == "placeholder"


def _is_two_valued(node: fx.Node, value: Any) -> bool:
    """A floating argument of the model that holds 0 and one other value: flags, or a mask."""
    if not is_input(node) or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.is_meta or is_wrapped(value):
        return False
    others = value[value != 0]
    return 0 < len(others) < value.numel() and bool((others == others[0]).all())
