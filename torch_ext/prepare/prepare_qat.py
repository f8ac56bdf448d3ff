"""Makes a quantizable model of a float one: attaches quantizers to weights, outputs, inputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.prepare import attach, input_quantizers
from torch_ext.prepare.describe import describe
from torch_ext.prepare.fuse import foldable_norms
from torch_ext.prepare.insertion.assign import Assignment, make_plan
from torch_ext.prepare.insertion.names import Names
from torch_ext.prepare.insertion.placement import Placement, Site
from torch_ext.prepare.insertion.recording import record_modes
from torch_ext.prepare.insertion.tracking import tracked_modules
from torch_ext.prepare.insertion.running import track
from torch_ext.prepare.insertion.plan import Link, Place
from torch_ext.prepare.module_classes import Undo
from torch_ext.prepare.qconfig import Factory, QConfig
from torch_ext.prepare.qconfig_mapping import Mapped, QConfigMapping
from torch_ext.prepare.quantizable_modules import OUTPUT_ONLY, Target, skips_output, target_of
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import INPUTS, check_model
from torch_ext.quantizers.folded_weight import FoldedWeight
from torch_ext.utils.arguments import bounded, parse_flag

_WHO = "prepare_qat"
M = TypeVar("M", bound=nn.Module)


class _FromModel:
    """Default of ``input_qconfig``: what the model itself has."""


_FROM_MODEL = _FromModel()


def prepare_qat(
    model: M,
    inplace: bool = False,
    *,
    mapping: Mapping[Mapped, QConfig | None] | None = None,
    input_qconfig: QConfig | _FromModel | None = _FROM_MODEL,
    verbose: bool = False,
    example_inputs: Any = None,
    fold_batch_norms: bool = False,
) -> M:
    """Attaches quantizers to a float model; all are in FLOAT, so it computes what it did.

    Quantized are the floating inputs of the model, the outputs of convolutions, transposed
    convolutions, linear layers, activation functions, attention and the modules of
    ``torch_ext.modules``, and the weights of these and of embeddings. An output is quantized for
    every such module, also where an activation follows it: names do not depend on the
    neighbours. To quantize only after the activation, give the layer a
    ``QConfig(activation=None, weight=...)``. Fold batch norms first, with ``fuse``.

    With ``example_inputs`` the forward is captured, and the values that INT8 engines want quantized
    are, those of functions such as ``x + y`` too; ``prepare/insertion/operations.py`` has the
    table. A value has one quantizer, however many operations read it; the first that asks
    for it decides with which configuration. A function has that of the module whose forward calls
    it. Control flow that depends on sizes is that of the example: a call that would go another way
    is refused. Modules that have nothing to quantize by configuration are called as they are.

    Names: ``<module>.activation_quantizer``, ``<module>.parametrizations.<weight>.0`` and
    ``input_quantizers.<argument>`` (within the first layer, where the model is a Sequential).
    Captured also ``<module>.add_quantizer`` for a function, ``<module>.<parameter>_quantizer`` for
    a parameter, and for results of operands that share a scale that of their ``cat``; the second
    such call in a forward is ``add_quantizer_1``, counted whether quantized or not.

    A module's configuration is the first of: its own attribute ``qconfig``; its name in
    ``mapping`` (exact, then patterns); its type in ``mapping``; that of its parent. ``None`` leaves
    it float. The model has its attribute ``qconfig``, or the mapping's ``""``. A module of
    another kind (a pooling, a custom layer) that is mapped by exact name or type has its output
    quantized too.

    Args:
        inplace: change ``model``; otherwise a copy is changed and returned.
        mapping: module names, patterns (``"layer1.*"``) or types to QConfig or None.
        input_qconfig: for the inputs of the model; None leaves them float.
        verbose: print the table of ``describe(model)``.
        example_inputs: captures the forward: a tensor, a tuple of positional or a mapping of
            keyword arguments. Only shapes, dtypes and what is no tensor matter. A forward that
            cannot be captured is refused with its line and the ways out.
        fold_batch_norms: with ``example_inputs``: where a batch norm follows a layer, both train
            on as they are, and the layer's weight is quantized as it is once the norm is folded
            into it (its quantizer is then ``parametrizations.weight.1``). By default the weight is
            quantized as it is; per output channel that comes to the same, but for the scale's
            value. To fold for good, before training: :func:`fuse`.
    """
    for name, flag in (("verbose", verbose), ("fold_batch_norms", fold_batch_norms)):
        parse_flag(_WHO, name, flag)
    if isinstance(inplace, Mapping):
        raise TypeError(
            f"{_WHO}: expected inplace to be True or False, got {bounded(inplace)}; "
            "pass mapping=... by name"
        )
    parse_flag(_WHO, "inplace", inplace)
    if check_model(_WHO, model) is not model:
        raise ValueError(
            f"{_WHO}: expected a plain model, got a {type(model).__name__}; prepare before wrapping"
        )
    _refuse_prepared(model)
    configs = QConfigMapping(_WHO, model, mapping)
    prepared = model if inplace else copy.deepcopy(model)
    plan = _Attachments(prepared, configs)
    if example_inputs is not None:
        plan.add_inserted(input_qconfig, example_inputs, fold_batch_norms)
    elif fold_batch_norms:
        raise ValueError(f"{_WHO}: expected example_inputs with fold_batch_norms=True, got None")
    else:
        plan.add_inputs(input_qconfig)
        for name, module, parent in _modules(prepared):
            plan.add_module(name, module, parent)
    if not plan.steps:
        raise ValueError(f"{_WHO}: expected model to have modules to quantize, found none")
    plan.carry_out()
    if verbose:
        print(describe(prepared))
    return prepared


def _modules(root: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Every module once, with its first name and its parent."""
    found: list[tuple[str, nn.Module, nn.Module | None]] = []
    for name, module in root.named_modules():
        parent = root.get_submodule(name.rpartition(".")[0]) if name else None
        found.append((name, module, parent))
    return found


def _refuse_prepared(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f'{_WHO}: expected a Python model, got a ScriptModule at "{name}"')
        if found := attach.attached(module):
            where = f"{name}.{found}".strip(".")
            raise ValueError(
                f'{_WHO}: expected a float model, got one that is prepared already ("{where}")'
            )


def _checked(given: object) -> QConfig | None:
    if given is not None and not isinstance(given, QConfig):
        raise TypeError(
            f"{_WHO}: expected input_qconfig to be a QConfig or None, got {bounded(given)}"
        )
    return given


class _Attachments:
    """The quantizers to attach, all built before the first is attached."""

    def __init__(self, root: nn.Module, configs: QConfigMapping) -> None:
        self.root = root
        self.configs = configs
        self.steps: list[Callable[[], Undo]] = []
        self.first_steps: list[Callable[[], Undo]] = []
        self.made: list[FakeQuantize] = []
        self.inputs: dict[str, FakeQuantize] = {}  # of a captured forward

    def carry_out(self) -> None:
        done: list[Undo] = []
        try:
            for step in (*self.first_steps, *self.steps):
                done.append(step())
        except BaseException:
            for undo in reversed(done):
                undo()
            raise

    def add_inserted(
        self, given: QConfig | _FromModel | None, example_inputs: Any, fold: bool
    ) -> None:
        """Quantizers for what the forward computes, and the plan by which it calls them."""
        recordings = record_modes(_WHO, self.root, example_inputs, self._is_float)
        config = None if isinstance(given, _FromModel) else _checked(given)
        inputs = None if config is None else config.activation
        names = Names(recordings)
        norms = foldable_norms(self.root, recordings[0].graph) if fold else {}

        def make(placement: Placement, site: Site) -> str:
            name = self._add_site(placement, site, names)
            # Calibration in eval mode does not come by what only train mode has.
            self.made[-1].optional |= placement.recording is not recordings[0]
            return name

        assignment = Assignment(make)
        done: set[tuple[str, str]] = set()
        for recording in recordings:
            placement = Placement(recording, self.configs, given is _FROM_MODEL or inputs)
            for key, weight in placement.weights.items():
                if key not in done:
                    module, norm = self.root.get_submodule(weight.owner), norms.get(weight.owner)
                    self._add_weight(weight.owner, module, *weight[1:], norm=norm)
                done.add(key)
            assignment.add(placement)
        if self.steps:
            link = Link(make_plan(recordings, self._layers()))
            for name in tracked_modules(self.root, recordings, link.plan):
                place = Place(name, link)
                module = self.root.get_submodule(name)
                # Before weights are parametrized, which gives each module a class of its own.
                self.first_steps.append(functools.partial(track, module, place))

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
        """Whether nothing in the module of that name is to be quantized."""
        inside = self.root.get_submodule(name).named_modules(prefix=name)
        return not any(self.configs.of(inner) for inner, _ in inside)

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
            # The forward computes it, so there is no parameter to read it from.
            keys = self._weight_keys(where, site.factory, device, *site.weight)
            keys["transient"] = False
            quantizer = self._build(where, site.factory, device, **keys)
        self.steps.append(lambda: attach.attach_child(host, name, quantizer))
        return where

    def _add_input(self, argument: str, factory: Factory) -> str:
        host_name, host = input_quantizers.input_host(_WHO, self.root)
        if host is not self.root:  # its own argument, as it is without example_inputs
            argument = next(iter(input_quantizers.input_arguments(host)), argument)
        attach.check_free(_WHO, host_name, host, INPUTS)
        key = input_quantizers.key_for(argument)
        where = f"{host_name}.{INPUTS}.{key}".strip(".")
        if not self.inputs:
            self.steps.append(lambda: input_quantizers.add_inputs(host, self.inputs))
        self.inputs[argument] = self._build(where, factory, self._device(host))
        return where

    def add_inputs(self, given: QConfig | _FromModel | None) -> None:
        config = self.configs.of("") if isinstance(given, _FromModel) else _checked(given)
        if config is None or config.activation is None:
            return
        host_name, host = input_quantizers.input_host(_WHO, self.root)
        attach.check_free(_WHO, host_name, host, INPUTS)
        device = self._device(host)
        quantizers = {}
        for argument in input_quantizers.input_arguments(host):
            where = f"{host_name}.{INPUTS}.{argument}".strip(".")
            quantizers[argument] = self._build(where, config.activation, device)
            quantizers[argument].optional = True
        if quantizers:
            self.steps.append(lambda: input_quantizers.attach_inputs(host, quantizers))

    def add_module(self, name: str, module: nn.Module, parent: nn.Module | None) -> None:
        config = self.configs.of(name)
        target = target_of(module)
        if target is None and self.configs.chosen(name) and not any(module.children()):
            target = OUTPUT_ONLY
        if config is None or target is None:
            return
        if config.weight is not None:
            for parameter in target.weights:
                self._add_weight(name, module, parameter, target, config.weight)
        if target.output and config.activation is not None and not skips_output(parent, module):
            where = f"{name}.{attach.output_name(module)}".strip(".")
            attach.check_free(_WHO, name, module, attach.output_name(module))
            quantizer = self._build(where, config.activation, self._device(module))
            self.steps.append(lambda: attach.attach_output(module, quantizer))

    def _add_weight(
        self,
        name: str,
        module: nn.Module,
        parameter: str,
        target: Target,
        factory: Factory,
        norm: _BatchNorm | None = None,
    ) -> None:
        if getattr(module, parameter, None) is None:
            return
        attach.check_weight(_WHO, name, module, parameter)
        weight = getattr(module, parameter)
        where = f"{name}.{parameter}".strip(".")
        keys = self._weight_keys(where, factory, weight.device, target.ch_axis, weight.shape)
        quantizer = self._build(where, factory, weight.device, **keys)
        chain: list[nn.Module] = [quantizer]
        if norm is not None:
            sides = [FoldedWeight(quantizer, norm, target.ch_axis, side) for side in (False, True)]
            chain = [sides[0], quantizer, sides[1]]
        for one in chain:
            self.steps.append(functools.partial(attach.attach_weight, module, parameter, one))

    def _weight_keys(
        self, where: str, factory: Factory, device: torch.device, ch_axis: int, shape: torch.Size
    ) -> dict[str, object]:
        """What a factory is told about a weight whose output channels are on an axis."""
        axis = self._build(where, factory, device).observer.ch_axis
        if axis < 0:
            return {"transient": True}
        # Axis 0 of a qconfig means the output channels.
        axis = ch_axis if axis == 0 else axis
        if axis >= len(shape):
            raise ValueError(
                f"{_WHO}: {where}: expected ch_axis to be below {len(shape)}, got {axis}"
            )
        return {"transient": True, "ch_axis": axis, "channel_len": shape[axis]}

    def _device(self, module: nn.Module) -> torch.device:
        """That of the module's own tensors, or of the model's first."""
        for source in (module, self.root):
            for tensor in (*source.parameters(), *source.buffers()):
                return tensor.device
        return torch.device("cpu")

    def _build(
        self, where: str, factory: Factory, device: torch.device, **overrides: object
    ) -> FakeQuantize:
        try:
            made = factory(**overrides)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{_WHO}: {where}: {error}") from error
        if not isinstance(made, FakeQuantize):
            raise TypeError(
                f"{_WHO}: {where}: expected the factory to make a FakeQuantize, got {bounded(made)}"
            )
        if any(made is other for other in self.made):
            raise ValueError(
                f"{_WHO}: {where}: expected the factory to make a new quantizer at each call, "
                "got one that it made before"
            )
        self.made.append(made)
        return made.to(device)
