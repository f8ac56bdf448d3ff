"""Makes a quantizable model of a float one: attaches quantizers to weights, outputs, inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from torch_ext import _attach, _inputs
from torch_ext._configs import Configs, Mapped
from torch_ext._targets import OUTPUT_ONLY, Target, skips_output, target_of
from torch_ext._walk import check_model
from torch_ext.describe import describe
from torch_ext.fake_quant import FakeQuantize
from torch_ext.qconfig import Factory, QConfig

_WHO = "prepare_qat"
M = TypeVar("M", bound=nn.Module)


class _FromModel:
    """Default of ``input_qconfig``: what the model itself has."""


_FROM_MODEL = _FromModel()


def prepare_qat(
    model: M,
    inplace: bool = False,
    mapping: Mapping[Mapped, QConfig | None] | None = None,
    input_qconfig: QConfig | _FromModel | None = _FROM_MODEL,
    verbose: bool = False,
) -> M:
    """Attaches quantizers to a float model; all are in FLOAT, so it computes what it did.

    Quantized are the floating inputs of the model, the outputs of convolutions, transposed
    convolutions, linear layers, activation functions, attention and the modules of
    ``torch_ext.modules``, and the weights of these and of embeddings. An output is quantized for
    every such module, also where an activation follows it: names do not depend on the
    neighbours. To quantize only after the activation, give the layer a
    ``QConfig(activation=None, weight=...)``. Fold batch norms first, with ``fuse``.

    Names: ``<module>.activation_quantizer``, ``<module>.parametrizations.<weight>.0`` and
    ``input_quantizers.<argument>`` (within the first layer, where the model is a Sequential).

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
    """
    if check_model(_WHO, model) is not model:
        raise ValueError(
            f"{_WHO}: expected a plain model, got a {type(model).__name__}; prepare before wrapping"
        )
    _refuse_prepared(model)
    configs = Configs(_WHO, model, mapping)
    prepared = model if inplace else copy.deepcopy(model)
    plan = _Plan(prepared, configs)
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
        if found := _attach.attached(module):
            where = f"{name}.{found}".strip(".")
            raise ValueError(
                f'{_WHO}: expected a float model, got one that is prepared already ("{where}")'
            )


class _Plan:
    """The quantizers to attach, all built before the first is attached."""

    def __init__(self, root: nn.Module, configs: Configs) -> None:
        self.root = root
        self.configs = configs
        self.steps: list[Callable[[], _attach.Undo]] = []
        self.made: list[FakeQuantize] = []

    def carry_out(self) -> None:
        done: list[_attach.Undo] = []
        try:
            for step in self.steps:
                done.append(step())
        except BaseException:
            for undo in reversed(done):
                undo()
            raise

    def add_inputs(self, given: QConfig | _FromModel | None) -> None:
        config = self.configs.of("") if isinstance(given, _FromModel) else given
        if config is not None and not isinstance(config, QConfig):
            raise TypeError(
                f"{_WHO}: expected input_qconfig to be a QConfig or None, got {config!r}"
            )
        if config is None or config.activation is None:
            return
        host_name, host = _inputs.input_host(_WHO, self.root)
        _attach.check_free(_WHO, host_name, host, _inputs.INPUTS)
        device = self._device(host)
        quantizers = {}
        for argument in _inputs.input_arguments(host):
            where = f"{host_name}.{_inputs.INPUTS}.{argument}".strip(".")
            quantizers[argument] = self._build(where, config.activation, device)
            quantizers[argument].optional = True
        if quantizers:
            self.steps.append(lambda: _inputs.attach_inputs(host, quantizers))

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
            where = f"{name}.{_attach.output_name(module)}".strip(".")
            _attach.check_free(_WHO, name, module, _attach.output_name(module))
            quantizer = self._build(where, config.activation, self._device(module))
            self.steps.append(lambda: _attach.attach_output(module, quantizer))

    def _add_weight(
        self, name: str, module: nn.Module, parameter: str, target: Target, factory: Factory
    ) -> None:
        if getattr(module, parameter, None) is None:
            return
        _attach.check_weight(_WHO, name, module, parameter)
        weight = getattr(module, parameter)
        where = f"{name}.{parameter}".strip(".")
        overrides: dict[str, object] = {"transient": True}
        if (axis := self._build(where, factory, weight.device).observer.ch_axis) >= 0:
            # Axis 0 of a qconfig means the output channels.
            axis = target.ch_axis if axis == 0 else axis
            if axis >= weight.dim():
                raise ValueError(
                    f"{_WHO}: {where}: expected ch_axis to be below {weight.dim()}, got {axis}"
                )
            overrides |= {"ch_axis": axis, "channel_len": weight.shape[axis]}
        quantizer = self._build(where, factory, weight.device, **overrides)
        self.steps.append(lambda: _attach.attach_weight(module, parameter, quantizer))

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
                f"{_WHO}: {where}: expected the factory to make a FakeQuantize, got {made!r}"
            )
        if any(made is other for other in self.made):
            raise ValueError(
                f"{_WHO}: {where}: expected the factory to make a new quantizer at each call, "
                "got one that it made before"
            )
        self.made.append(made)
        return made.to(device)
