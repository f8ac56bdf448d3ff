"""Plans which quantizers a model gets and where, then attaches them all or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from torch_ext.prepare import attach
from torch_ext.prepare.batch_norms.fuse import find_norms
from torch_ext.prepare.batch_norms.pair import Norms, Pair
from torch_ext.prepare.blocks.dynamic_axes import DynamicAxes
from torch_ext.prepare.blocks.weight_axes import WeightAxes
from torch_ext.prepare.insertion.assign import Assignment, Names, make_plan, tracked_modules
from torch_ext.prepare.insertion.placement import Placement, Site
from torch_ext.prepare.insertion.plan import Link, Place
from torch_ext.prepare.insertion.record_runs import record_modes
from torch_ext.prepare.insertion.running import track
from torch_ext.prepare.module_calls.arguments import (
    add_inputs,
    class_with_inputs,
    input_arguments,
    input_host,
    key_for,
    read_arguments,
)
from torch_ext.prepare.module_calls.attention import class_layer_by_layer, has_fused_path
from torch_ext.prepare.module_calls.layer_results import quantize_results, traced_results
from torch_ext.prepare.module_calls.results import (
    Path,
    add_output_keys,
    attach_outputs,
    output_host,
)
from torch_ext.prepare.module_classes import Undo, swap_class
from torch_ext.prepare.qconfig import Factory, QConfigMapping
from torch_ext.prepare.quantizable_modules import (
    OUTPUT_ONLY,
    Reads,
    Target,
    grouped_shape,
    is_float_functional,
    is_out_proj,
    is_sum,
    target_of,
)
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.folded_weight import FoldedWeight, OutputChannels
from torch_ext.quantizers.transition import INPUTS, OUTPUTS
from torch_ext.utils.arguments import bounded

_WHO = "prepare_qat"


class Attachments:
    """Plans what to attach to a model; :meth:`carry_out` then attaches it.

    All quantizers are built while planning, so most errors come before the model is changed.
    """

    def __init__(self, root: nn.Module, configs: QConfigMapping) -> None:
        self.root = root
        self.configs = configs
        self.steps: list[Callable[[], Undo]] = []
        self.first_steps: list[Callable[[], Undo]] = []
        self.built: list[FakeQuantize] = []
        self.named: dict[str, FakeQuantize] = {}  # the last one built for each name
        self.dynamic = DynamicAxes()
        self.reads: dict[str, dict[str, FakeQuantize]] = {}  # by module and argument
        self.norms = Norms([], {})
        self.weight_axes = WeightAxes(_WHO)

    def carry_out(self) -> None:
        """Attaches everything, or, if a step raises, nothing."""
        done: list[Undo] = []
        try:
            for step in (*self.first_steps, *self.steps):
                done.append(step())
        except BaseException:
            for undo in reversed(done):
                undo()
            raise

    def add_inserted(
        self,
        inputs: Factory | bool | None,
        outputs: Factory | None,
        example_inputs: Any,
        fold: bool,
    ) -> None:
        """Plans quantizers for the values of the forward, and what reads through which of them.

        ``inputs``: of the model's arguments; True: as for other values; None: not quantized.
        ``outputs``: of what it returns.
        """
        recordings = record_modes(_WHO, self.root, example_inputs, self._is_float)
        names = Names(recordings)
        if fold:
            # Of all modules, as in `fuse`: those that stay float are single nodes in the others.
            self.norms = find_norms(_WHO, self.root, example_inputs)
        pairs = {pair.weight: pair for pair in self.norms.pairs}
        folded = frozenset(pair.norm for pair in self.norms.pairs)

        def make(placement: Placement, site: Site) -> str:
            name = self._add_site(placement, site, names)
            # Calibration in eval mode does not come by what only train mode has.
            self.built[-1].optional |= placement.recording.training
            return name

        assignment = Assignment(make)
        done: set[tuple[str, str]] = set()
        for recording in recordings:
            placement = Placement(recording, self.configs, inputs, self.dynamic)
            quantize_results(placement, folded)
            for key, weight in placement.weights.items():
                if key not in done:
                    pair = pairs.get(".".join(key).strip("."))
                    module = self.root.get_submodule(weight.owner)
                    self._add_weight(weight.owner, module, *weight[1:], pair=pair)
                done.add(key)
            assignment.add(placement)
        self.dynamic.set_axes(self.named)
        if self.built:
            link = Link(make_plan(self.root.forward, recordings, self._layers()))
            for name in tracked_modules(self.root, recordings, link.plan):
                place = Place(name, link)
                module = self.root.get_submodule(name)
                # Before weights are parametrized, which gives each module a class of its own.
                self.first_steps.append(functools.partial(track, module, place))
        if outputs is not None:
            self.add_outputs(outputs, [(r.result, r.training) for r in recordings])

    def add_outputs(self, factory: Factory, results: list[tuple[Any, bool]] | None) -> None:
        """Plans quantizers of what the model returns.

        ``results``, if known: each with whether it is of train mode; those of eval mode first.
        """
        host_name, host = output_host(_WHO, self.root)
        attach.check_free(_WHO, host_name, host, OUTPUTS)
        keys: dict[Path, str] = {}
        quantizers: dict[str, FakeQuantize] = {}
        for result, training in [((), False)] if results is None else results:
            add_output_keys(keys, result)
            for key in keys.values() if results is not None else ("0",):
                if key not in quantizers:
                    where = f"{host_name}.{OUTPUTS}.{key}".strip(".")
                    quantizers[key] = self._build(where, factory, self._device(self.root))
                    # Calibration in eval mode does not come by what only train mode returns.
                    quantizers[key].optional |= training
        if not quantizers:
            raise ValueError(
                f"{_WHO}: expected the model to return floating tensors with output_qconfig, got "
                "none; pass output_qconfig=None"
            )
        planned = None if results is None else keys
        self.first_steps.append(lambda: attach_outputs(host, quantizers, planned))

    def _layers(self) -> frozenset[str]:
        """Modules whose every call reads something quantized."""
        found = set()
        for name, module in self.root.named_modules():
            target, config = target_of(module), self.configs.of(name)
            embeds = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            if target and target.weights and config and config.activation and not embeds:
                found.add(name)
        return frozenset(found)

    def _is_float(self, name: str) -> bool:
        """Whether no module in the module of that name has a QConfig."""
        inside = self.root.get_submodule(name).named_modules(prefix=name)
        return not any(self.configs.of(inner_name) for inner_name, _ in inside)

    def _add_site(self, placement: Placement, site: Site, names: Names) -> str:
        """Plans a quantizer of values; returns its name."""
        value = site.name_giver
        if value.op == "placeholder":
            return self._add_input(str(value.target), site.factory)
        host_name, name = names.of(placement.recording.keys[value])
        host = self.root.get_submodule(host_name)
        attach.check_free(_WHO, host_name, host, name)
        where, device = f"{host_name}.{name}".strip("."), self._device(host)
        if site.weight is None:
            quantizer = self._build(where, site.factory, device)
        else:
            made = self._build(where, site.factory, device)
            keys = self.weight_axes.computed_keys(where, made, *site.weight, host_name)
            quantizer = self._build(where, site.factory, device, **keys)
        self.steps.append(lambda: attach.attach_child(host, name, quantizer))
        return where

    def _add_input(self, argument: str, factory: Factory) -> str:
        """Plans the quantizer of an argument of the model; returns its name."""
        host_name, host = input_host(_WHO, self.root)
        if host is not self.root:  # named after the host's argument, as without example_inputs
            argument = next(iter(input_arguments(host)), argument)
        # The plan of the forward calls it, so the host keeps its class.
        self._add_reads(host_name, host, {argument: False}, factory)
        return f"{host_name}.{INPUTS}.{key_for(argument)}".strip(".")

    def add_modules(self, inputs: Factory | None, outputs: Factory | None) -> None:
        """Plans quantizers of what layers read, of their weights, and of the model's arguments."""
        if inputs is not None:
            host_name, host = input_host(_WHO, self.root)
            arguments = dict.fromkeys(input_arguments(host), True)
            self._add_reads(host_name, host, arguments, inputs)
        for name, module in self.root.named_modules():
            self._add_module(name, module)
        for name, factory in traced_results(_WHO, self.root, self.configs, self.reads):
            self._add_output(name, self.root.get_submodule(name), factory)
        reading = tuple(f"{name}." for name in self.reads)
        for name, module in self.root.named_modules():
            if has_fused_path(module) and any(
                r.startswith(f"{name}.".lstrip(".")) for r in reading
            ):
                self.first_steps.append(functools.partial(swap_class, module, class_layer_by_layer))
            elif name in self.reads:
                self.first_steps.append(functools.partial(swap_class, module, class_with_inputs))
        self.dynamic.set_axes(self.named)
        if outputs is not None:
            self.add_outputs(outputs, None)

    def _add_module(self, name: str, module: nn.Module) -> None:
        """Plans the quantizers of a module's weights, arguments and output."""
        config = self.configs.of(name)
        target = target_of(module)
        if target is None and self.configs.chosen(name) and not any(module.children()):
            target = OUTPUT_ONLY
        if config is None or target is None:
            return
        if config.weight is not None:
            for parameter in target.weights:
                self._add_weight(name, module, parameter, target, config.weight)
        if config.activation is None:
            return
        template = self.dynamic.quantizer(config.activation)
        if template is not None and (is_sum(module) or is_float_functional(module)):
            return
        parent = self.root.get_submodule(name.rpartition(".")[0])
        # Attention of another forward than torch's reads this weight in a way that is not known.
        called = not is_out_proj(parent, module) or has_fused_path(parent)
        if target.reads is not Reads.NOTHING and called:
            arguments = read_arguments(_WHO, name, module, target.reads)
            self._add_reads(name, module, arguments, config.activation, target.reads is Reads.PAIR)
            if template is not None:
                names = [f"{name}.{INPUTS}.{key_for(a)}".strip(".") for a in arguments]
                self.dynamic.of_module(name, module, template, names)
        # What reads a result with scales of each call has a quantizer of its own, with its axis.
        if target.output and not self.dynamic.follows_readers(config.activation):
            self._add_output(name, module, config.activation)

    def _add_output(self, name: str, module: nn.Module, factory: Factory) -> None:
        """Plans the quantizer of a module's result."""
        attribute = attach.output_name(module)
        attach.check_free(_WHO, name, module, attribute)
        quantizer = self._build(f"{name}.{attribute}".strip("."), factory, self._device(module))
        self.steps.append(lambda: attach.attach_output(module, quantizer))

    def _add_reads(
        self,
        name: str,
        module: nn.Module,
        arguments: Mapping[str, bool],
        factory: Factory,
        pair: bool = False,
    ) -> None:
        """Plans quantizers of arguments, given with whether each may see no data.

        Those that are planned already stay.
        """
        if name not in self.reads:
            attach.check_free(_WHO, name, module, INPUTS)
            quantizers = self.reads[name] = {}
            self.first_steps.append(lambda: add_inputs(module, quantizers, pair))
        for argument, optional in arguments.items():
            if argument not in self.reads[name]:
                where = f"{name}.{INPUTS}.{key_for(argument)}".strip(".")
                quantizer = self._build(where, factory, self._device(module))
                quantizer.optional |= optional
                self.reads[name][argument] = quantizer

    def _add_weight(
        self,
        name: str,
        module: nn.Module,
        parameter: str,
        target: Target,
        factory: Factory,
        pair: Pair | None = None,
    ) -> None:
        """Plans the quantizer of a weight, as folded with the norm of ``pair`` if that is given."""
        if getattr(module, parameter, None) is None:
            return
        attach.check_weight(_WHO, name, module, parameter)
        weight = getattr(module, parameter)
        where = f"{name}.{parameter}".strip(".")
        groups, shape = grouped_shape(module, weight.shape)
        keys = self._weight_keys(where, factory, weight.device, target, shape, name)
        quantizer = self._build(where, factory, weight.device, **keys)
        if attach.is_hooked(module, parameter):
            attach.check_called(_WHO, self.root, name, parameter)
            attach.check_free(_WHO, name, module, f"{parameter}{attach.SUFFIX}")
            self.steps.append(lambda: attach.attach_hook(module, parameter, quantizer))
            return
        chain: list[nn.Module] = [quantizer]
        if pair is not None:
            parent = self.root.get_submodule(pair.norm.rpartition(".")[0])
            names = (pair.norm, pair.layer)
            sides = [
                FoldedWeight(quantizer, parent, *names, pair.ch_axis, inverse)
                for inverse in (False, True)
            ]
            chain = [sides[0], *chain, sides[1]]
        if groups > 1 and (pair is not None or quantizer.observer.ch_axis >= 0):
            ends = [OutputChannels(quantizer, groups, side) for side in (False, True)]
            chain = [ends[0], *chain, ends[1]]
        for step in chain:
            self.steps.append(functools.partial(attach.attach_weight, module, parameter, step))

    def _weight_keys(
        self,
        where: str,
        factory: Factory,
        device: torch.device,
        target: Target,
        shape: torch.Size,
        owner: str,
    ) -> dict[str, object]:
        """The keys that a factory gets for a weight of a module, with its axes as in ``target``."""
        made = self._build(where, factory, device)
        return self.weight_axes.keys(where, made, target, shape, owner)

    def _device(self, module: nn.Module) -> torch.device:
        """The device of the module's first tensor, or, if it has none, of the model's."""
        for source in (module, self.root):
            for tensor in (*source.parameters(), *source.buffers()):
                return tensor.device
        return torch.device("cpu")

    def _build(
        self, where: str, factory: Factory, device: torch.device, **overrides: object
    ) -> FakeQuantize:
        """Calls a factory; raises its errors with ``where``, and TypeError for other modules."""
        try:
            quantizer = factory(**overrides)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{_WHO}: {where}: {error}") from error
        if not isinstance(quantizer, FakeQuantize):
            raise TypeError(
                f"{_WHO}: {where}: expected the factory to make a FakeQuantize, got "
                f"{bounded(quantizer)}; pass one such as functools.partial(FakeQuantize, ...)"
            )
        if any(quantizer is other for other in self.built):
            raise ValueError(
                f"{_WHO}: {where}: expected the factory to make a new quantizer at each call, "
                "got one that it made before; pass one such as functools.partial(FakeQuantize, ...)"
            )
        self.built.append(quantizer)
        self.named[where] = quantizer
        return quantizer.to(device)
