"""Prepares a float model: attaches quantizers to its weights, outputs and inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from torch_ext.prepare import attach, input_quantizers
from torch_ext.prepare.batch_norms.pair import Norms, Pair
from torch_ext.prepare.describe import describe
from torch_ext.prepare.fuse import find_norms, warn_of_left
from torch_ext.prepare.insertion.assign import Assignment, Names, make_plan, tracked_modules
from torch_ext.prepare.insertion.placement import Placement, Site
from torch_ext.prepare.insertion.plan import Link, Place
from torch_ext.prepare.insertion.record_runs import record_modes
from torch_ext.prepare.insertion.running import track
from torch_ext.prepare.module_classes import Undo, copied
from torch_ext.prepare.qconfig import Factory, Mapped, QConfig, QConfigMapping
from torch_ext.prepare.quantizable_modules import (
    OUTPUT_ONLY,
    Target,
    grouped_shape,
    skips_output,
    target_of,
)
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import INPUTS, check_model
from torch_ext.quantizers.folded_weight import FoldedWeight, OutputChannels
from torch_ext.utils.arguments import bounded, parse_flag

_WHO = "prepare_qat"
M = TypeVar("M", bound=nn.Module)


class _FromModel:
    """The type of the default of ``input_qconfig``: the model's own QConfig."""


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
    """Attaches quantizers to a float model. They start in FLOAT, so its outputs do not change yet.

    Without ``example_inputs``, quantizers go to the floating inputs of the model, to the outputs of
    convolutions, transposed convolutions, linear layers, activation functions, attention and the
    modules of ``torch_ext.modules``, and to the weights of these and of embeddings. The output of a
    layer is quantized even if an activation follows it. To quantize only after the activation,
    give the layer ``QConfig(activation=None, weight=...)``. Fold batch norms first, with
    :func:`fuse`.

    With ``example_inputs``, quantizers go to the values that INT8 engines quantize, the operands of
    functions such as ``x + y`` among them; the table is in ``prepare/insertion/operations.py``. A
    copy of the model runs on the example, once in eval and once in train mode, to find them. The
    model's own forward keeps running. A value has one quantizer, however many operations read it;
    the first that reads it quantized decides its QConfig. A function has the QConfig of the module
    whose forward calls it. A later call in which a function that has quantizers does not come by,
    or a layer is called at another place, raises RuntimeError with the line.

    Quantizers are named ``<module>.activation_quantizer``, ``<module>.parametrizations.<weight>.0``
    and ``input_quantizers.<argument>`` (within the first layer, if the model is a Sequential). With
    ``example_inputs`` there are also ``<module>.add_quantizer`` for the result of a function,
    ``<module>.<parameter>_quantizer`` for a parameter, and ``<module>.cat_quantizer`` for operands
    that share a scale. The second ``add`` in a forward is ``add_quantizer_1``, whether or not the
    first is quantized.

    A module's QConfig is the first of: its attribute ``qconfig``; its name in ``mapping`` (exact
    names before patterns); its type in ``mapping``; its parent's. None leaves it float. The model
    itself has the name ``""``. If the mapping has the exact name or the type of a module that is
    not listed above (a pooling, a custom layer), its output is quantized too.

    Args:
        model: a float model, not wrapped.
        inplace: change ``model``; by default, a copy is changed and returned.
        mapping: QConfig or None by module name, pattern (``"layer1.*"``) or module type.
        input_qconfig: the QConfig of the model's inputs, whose ``activation`` is used; by default,
            the model's own. None leaves the inputs float.
        verbose: print :func:`describe` of the result.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a list
            of such tuples or mappings, for a forward that goes several ways.
        fold_batch_norms: with ``example_inputs``, quantize the weight of a layer that a batch norm
            follows as if the norm were folded into it. Both stay and train; the quantizer is
            ``parametrizations.weight.1``. The pairs are those of :func:`fuse`, which folds for
            good; a warning names the batch norms that are in none. By default the unfolded weight
            is quantized. Per output channel this equals folding, up to the factor in the scale.

    Returns:
        The prepared model.

    Raises:
        TypeError: ``model`` is no module, or an argument or a QConfig has a wrong type.
        ValueError: the model is prepared already, wrapped, has no QConfig or nothing to quantize; a
            name in ``mapping`` matches no module; a weight cannot be parametrized; or the model
            does not run on the example, in which case the message has the line.

    If it raises, the model is unchanged.
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
    _check_float(model)
    configs = QConfigMapping(_WHO, model, mapping, captures=example_inputs is not None)
    prepared = model if inplace else copied(_WHO, model)
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
    warn_of_left(_WHO, plan.norms.left, has_example=True)
    plan.carry_out()
    if verbose:
        print(describe(prepared))
    return prepared


def _modules(root: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Every module once, with its first name and its parent."""
    modules: list[tuple[str, nn.Module, nn.Module | None]] = []
    for name, module in root.named_modules():
        parent = root.get_submodule(name.rpartition(".")[0]) if name else None
        modules.append((name, module, parent))
    return modules


def _check_float(model: nn.Module) -> None:
    """Raises for a model that is prepared already, and for a ScriptModule in it."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f'{_WHO}: expected a Python model, got a ScriptModule at "{name}"')
        if quantizer := attach.attached(module):
            where = f"{name}.{quantizer}".strip(".")
            raise ValueError(
                f'{_WHO}: expected a float model, got one that is prepared already ("{where}")'
            )


def _check_input_qconfig(given: object) -> QConfig | None:
    if given is not None and not isinstance(given, QConfig):
        raise TypeError(
            f"{_WHO}: expected input_qconfig to be a QConfig or None, got {bounded(given)}"
        )
    return given


class _Attachments:
    """Plans what to attach to a model; :meth:`carry_out` then attaches it.

    All quantizers are built while planning, so most errors come before the model is changed.
    """

    def __init__(self, root: nn.Module, configs: QConfigMapping) -> None:
        self.root = root
        self.configs = configs
        self.steps: list[Callable[[], Undo]] = []
        self.first_steps: list[Callable[[], Undo]] = []
        self.built: list[FakeQuantize] = []
        self.inputs: dict[str, FakeQuantize] = {}  # by argument, with example_inputs
        self.norms = Norms([], {})

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
        self, given: QConfig | _FromModel | None, example_inputs: Any, fold: bool
    ) -> None:
        """Plans quantizers for the values of the forward, and what reads through which of them."""
        recordings = record_modes(_WHO, self.root, example_inputs, self._is_float)
        config = None if isinstance(given, _FromModel) else _check_input_qconfig(given)
        inputs = None if config is None else config.activation
        names = Names(recordings)
        if fold:
            # Of all modules, as in `fuse`: those that stay float are single nodes in the others.
            self.norms = find_norms(_WHO, self.root, example_inputs)
        pairs = {pair.weight: pair for pair in self.norms.pairs}

        def make(placement: Placement, site: Site) -> str:
            name = self._add_site(placement, site, names)
            # Calibration in eval mode does not come by what only train mode has.
            self.built[-1].optional |= placement.recording is not recordings[0]
            return name

        assignment = Assignment(make)
        done: set[tuple[str, str]] = set()
        for recording in recordings:
            placement = Placement(recording, self.configs, given is _FROM_MODEL or inputs)
            for key, weight in placement.weights.items():
                if key not in done:
                    pair = pairs.get(".".join(key).strip("."))
                    module = self.root.get_submodule(weight.owner)
                    self._add_weight(weight.owner, module, *weight[1:], pair=pair)
                done.add(key)
            assignment.add(placement)
        if self.steps:
            link = Link(make_plan(self.root.forward, recordings, self._layers()))
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
            # The forward computes this weight, so it is observed like an activation.
            keys = self._weight_keys(where, site.factory, device, *site.weight)
            keys["transient"] = False
            quantizer = self._build(where, site.factory, device, **keys)
        self.steps.append(lambda: attach.attach_child(host, name, quantizer))
        return where

    def _add_input(self, argument: str, factory: Factory) -> str:
        """Plans the quantizer of an argument of the model; returns its name."""
        host_name, host = input_quantizers.input_host(_WHO, self.root)
        if host is not self.root:  # named after the host's argument, as without example_inputs
            argument = next(iter(input_quantizers.input_arguments(host)), argument)
        attach.check_free(_WHO, host_name, host, INPUTS)
        key = input_quantizers.key_for(argument)
        where = f"{host_name}.{INPUTS}.{key}".strip(".")
        if not self.inputs:
            self.steps.append(lambda: input_quantizers.add_inputs(host, self.inputs))
        self.inputs[argument] = self._build(where, factory, self._device(host))
        return where

    def add_inputs(self, given: QConfig | _FromModel | None) -> None:
        """Plans the quantizers of the model's inputs."""
        from_model = isinstance(given, _FromModel)
        config = self.configs.of("") if from_model else _check_input_qconfig(given)
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
        """Plans the quantizers of a module's weights and output."""
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
        pair: Pair | None = None,
    ) -> None:
        """Plans the quantizer of a weight, as folded with the norm of ``pair`` if that is given."""
        if getattr(module, parameter, None) is None:
            return
        attach.check_weight(_WHO, name, module, parameter)
        weight = getattr(module, parameter)
        where = f"{name}.{parameter}".strip(".")
        groups, shape = grouped_shape(module, weight.shape)
        keys = self._weight_keys(where, factory, weight.device, target.ch_axis, shape)
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
        self, where: str, factory: Factory, device: torch.device, ch_axis: int, shape: torch.Size
    ) -> dict[str, object]:
        """The keys that a factory gets for a weight with its output channels on ``ch_axis``."""
        axis = self._build(where, factory, device).observer.ch_axis
        if axis < 0:
            return {"transient": True}
        # Axis 0 in a QConfig means the output channels.
        axis = ch_axis if axis == 0 else axis
        if axis >= len(shape):
            raise ValueError(
                f"{_WHO}: {where}: expected ch_axis to be below {len(shape)}, got {axis}"
            )
        return {"transient": True, "ch_axis": axis, "channel_len": shape[axis]}

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
                f"{bounded(quantizer)}"
            )
        if any(quantizer is other for other in self.built):
            raise ValueError(
                f"{_WHO}: {where}: expected the factory to make a new quantizer at each call, "
                "got one that it made before"
            )
        self.built.append(quantizer)
        return quantizer.to(device)
