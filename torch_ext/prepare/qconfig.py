"""QConfig: the factories of a module's quantizers; and the usual ones, by names."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_ext.ops.registry import fake_quant_info, observer_info
from torch_ext.ops.registry_names import Method, Rule
from torch_ext.prepare.quantizable_modules import NOTHING, is_activation, target_of
from torch_ext.quantizers.fake_quantize import KEYS, FakeQuantize
from torch_ext.quantizers.parts.keys import check_keys
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.backends import (
    BACKENDS,
    GRID_KEYS,
    Backend,
    BackendGrid,
    QuantizedResults,
    backend_grids,
    backend_row,
)

Factory = Callable[..., FakeQuantize]

# Keys of other toolchains that are accepted with a warning and ignored, and why.
_IGNORED = {
    "bins": "the statistic keeps the same relative resolution at every magnitude",
    "stride": "the search is exact over every candidate",
    "update_interval": "the statistic accumulates over all data and is solved once",
}

# A weight can be read at any time, so nothing is accumulated and its range needs no average.
_WEIGHT_DEFAULTS: Mapping[str, Any] = {"averaging_constant": 1.0, "transient": True}
_PER_TENSOR = (torch.per_tensor_symmetric, torch.per_tensor_affine)


@dataclass(frozen=True)
class QConfig:
    """The factories that make the quantizers of a module.

    A factory makes a new :class:`FakeQuantize` at each call and takes keyword overrides, as
    ``functools.partial(FakeQuantize, observer="percentile")`` does. For weights, ``prepare_qat``
    passes ``channel_len``, ``ch_axis`` and ``transient``.

    Args:
        activation: makes quantizers of what the module reads; None leaves that float.
        weight: makes quantizers of weights; None leaves them float.
        backend: the engine that is to run the model, as in :func:`get_default_qconfig`. It decides
            where ``prepare_qat`` quantizes the results of layers too, not their grids: those are
            the factories'. None: nowhere.

    Raises:
        TypeError: a factory cannot be called.
        ValueError: a factory is a module, which all modules would share; the backend is unknown.
    """

    activation: Factory | None
    weight: Factory | None
    backend: Backend | None = None

    @property
    def results(self) -> QuantizedResults | None:
        """The layers whose results have to be quantized; None if there are none."""
        if self.backend is None or self.activation is None or self.weight is None:
            return None
        return BACKENDS[self.backend].results

    def __post_init__(self) -> None:
        if self.backend is not None:
            backend_row("QConfig", self.backend)
        for side in ("activation", "weight"):
            factory = getattr(self, side)
            if isinstance(factory, nn.Module):
                raise ValueError(
                    f"QConfig: expected {side} to be a factory, such as functools.partial("
                    f"FakeQuantize, ...), got an instance of {type(factory).__name__}: "
                    "one instance would be shared by all modules"
                )
            if factory is not None and not callable(factory):
                raise TypeError(
                    f"QConfig: expected {side} to be a factory or None, got {bounded(factory)}"
                )


def get_default_qconfig(
    activation_fake_quant: Method | None = "fake_quant",
    weight_fake_quant: Method | None = "fake_quant",
    activation_observer: Rule | None = "min_max",
    weight_observer: Rule | None = "min_max",
    activation_qkwargs: Mapping[str, Any] | None = None,
    weight_qkwargs: Mapping[str, Any] | None = None,
    *,
    backend: Backend | None = None,
    reduce_range: bool = False,
) -> QConfig:
    """A QConfig, by the names of fake-quant methods and observers.

    By default, activations are int8, per tensor, symmetric, with averaging constant 0.01. Weights
    are int8, per output channel (per tensor with ``pact``), symmetric, with averaging constant 1.
    ``ch_axis=0`` of a weight means its output channels: ``prepare_qat`` uses axis 1 for transposed
    convolutions. With ``group_size`` in ``weight_qkwargs`` so many inputs of an output channel
    share a scale; ``ch_axis=1``, the default then, means the inputs of every layer.

    Args:
        activation_fake_quant: the method for activations, one of ``torch_ext.fake_quants()``; None
            leaves them float (the last layer's output, say).
        weight_fake_quant: the method for weights, likewise.
        activation_observer: the rule for activations, one of ``torch_ext.observers()``.
        weight_observer: the rule for weights, likewise.
        activation_qkwargs: keys of :class:`FakeQuantize`, of :class:`Observer` and options of the
            rule, in one mapping: ``dtype``, ``qscheme``, ``quant_min``, ``averaging_constant``,
            ``percentile``, ``scale``, ... It is not changed.
        weight_qkwargs: the same for weights.
        backend: the engine that is to run the model: ``"onnxruntime"``, ``"openvino"``,
            ``"tensorrt"``, ``"ncnn"``, ``"x86"`` (PT2E, Inductor), ``"xnnpack"`` (ExecuTorch) or
            ``"horizon"``. It decides the grids, which the guide lists, so ``*_qkwargs`` give none,
            and which results of layers ``prepare_qat`` quantizes: onnxruntime and XNNPACK compute
            a layer before SiLU, say, in integers only if a quantizer stands between the two.
            None (default) is int8, symmetric, which fits no engine best.
        reduce_range: weights of 7 bits, for CPUs without VNNI, where onnxruntime, OpenVINO and
            Inductor add up products in 16 bits and saturate.

    Raises:
        TypeError: ``*_qkwargs`` is no mapping, or a value has a wrong type.
        ValueError: a method, rule, key or backend is unknown, or values do not fit together.
        RuntimeError: the rule does not accept its options or the grid.

    Warns:
        UserWarning: ``bins``, ``stride`` or ``update_interval`` is given; they have no effect here.
    """
    who = "get_default_qconfig"
    if str(activation_fake_quant) in BACKENDS:
        raise ValueError(
            f"{who}: expected activation_fake_quant to be a method, got the backend "
            f'"{activation_fake_quant}"; pass backend="{activation_fake_quant}"'
        )
    grids: tuple[BackendGrid | None, BackendGrid | None] = (None, None)
    if backend is not None:
        grids = backend_grids(who, backend, reduce_range)
    elif parse_flag(who, "reduce_range", reduce_range):
        raise ValueError(f"{who}: expected a backend with reduce_range=True, got None")
    return QConfig(
        activation=make_factory(
            who,
            "activation",
            activation_fake_quant,
            activation_observer,
            activation_qkwargs,
            grids[0],
        ),
        weight=make_factory(
            who, "weight", weight_fake_quant, weight_observer, weight_qkwargs, grids[1]
        ),
        backend=backend,
    )


def get_default_calib_qconfig(
    activation_fake_quant: Method | None = "fake_quant",
    weight_fake_quant: Method | None = "fake_quant",
    activation_observer: Rule | None = "percentile",
    weight_observer: Rule | None = "min_max",
    activation_qkwargs: Mapping[str, Any] | None = None,
    weight_qkwargs: Mapping[str, Any] | None = None,
    *,
    backend: Backend | None = None,
    reduce_range: bool = False,
) -> QConfig:
    """:func:`get_default_qconfig` with ``"percentile"`` for activations, for calibration.

    Its statistic includes a histogram, from which :func:`resolve` can solve every other rule.
    Arguments and errors are those of :func:`get_default_qconfig`.
    """
    return get_default_qconfig(
        activation_fake_quant,
        weight_fake_quant,
        activation_observer,
        weight_observer,
        activation_qkwargs,
        weight_qkwargs,
        backend=backend,
        reduce_range=reduce_range,
    )


def make_factory(
    who: str,
    side: str,
    method: Method | None,
    observer: Rule | None,
    qkwargs: Mapping[str, Any] | None,
    grid: BackendGrid | None,
) -> Factory | None:
    """The factory of one side; calls it once, so that wrong values raise here."""
    if qkwargs is not None and not isinstance(qkwargs, Mapping):
        raise TypeError(f"{who}: expected {side}_qkwargs to be a mapping, got {bounded(qkwargs)}")
    given = dict(qkwargs or {})
    if method is None:
        if given:
            raise ValueError(
                f"{who}: expected {side}_qkwargs to be empty with {side}_fake_quant=None, "
                f"got {', '.join(given)}"
            )
        return None
    if observer is None:
        raise ValueError(
            f"{who}: expected {side}_observer to be a name with {side}_fake_quant={method!r}, "
            "got None"
        )
    for info, name in ((fake_quant_info, method), (observer_info, observer)):
        try:
            info(name)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from error
    for key in [key for key in given if key in _IGNORED]:
        warnings.warn(f"{who}: {side}_qkwargs: {key} is ignored, as {_IGNORED[key]}", stacklevel=4)
        del given[key]
    keys = dict(_WEIGHT_DEFAULTS) if side == "weight" else {}
    if grid is not None:
        if decided := [key for key in given if key in GRID_KEYS]:
            raise ValueError(
                f"{who}: expected {side}_qkwargs without {', '.join(decided)} where a backend "
                "decides the grid; leave out one of the two"
            )
        keys |= grid.keys()
        if fake_quant_info(method)["per_channel"]:  # else weights are per tensor, as without it
            given["qscheme"] = keys["qscheme"]
    if side == "weight":
        per_channel = fake_quant_info(method)["per_channel"]
        default = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
        given.setdefault("qscheme", default)
    check_keys(f"{who}: {side}_qkwargs", given, observer, KEYS)
    probe_keys = keys | given
    grouped = given.get("group_size") is not None
    free = "ch_axis" not in given and not grouped
    if side == "weight" and free and not _is_per_tensor(given["qscheme"]):
        probe_keys["ch_axis"] = 0
    factory = functools.partial(FakeQuantize, method, observer, **probe_keys)
    factory()
    return factory


def _is_per_tensor(qscheme: object) -> bool:
    return str(qscheme).removeprefix("torch.") in (
        str(s).removeprefix("torch.") for s in _PER_TENSOR
    )


Mapped = str | type[nn.Module]
_ATTRIBUTE = "qconfig"


class QConfigMapping:
    """The QConfig of every module of a model.

    A module's QConfig is the first of: its attribute ``qconfig``; its name in ``mapping`` (exact
    names before patterns); its type in ``mapping`` (subclasses before bases); its parent's.
    """

    def __init__(
        self,
        who: str,
        model: nn.Module,
        mapping: Mapping[Mapped, QConfig | None] | None,
        by_forward: bool = False,
    ) -> None:
        """Assigns the QConfigs, for the function ``who`` that errors name.

        Args:
            who: the function.
            model: the model.
            mapping: as in ``prepare_qat``.
            by_forward: whether functions that the modules call are quantized too.

        Raises:
            TypeError: ``mapping`` or one of its entries, or an attribute, has a wrong type.
            ValueError: a name matches no module, no module has a QConfig, or a module that appears
                under two names has two of them and something of it may be quantized.
        """
        self._who = who
        self._by_forward = by_forward
        self._names: dict[str, QConfig | None] = {}
        self._types: dict[type[nn.Module], QConfig | None] = {}
        self._assigned: dict[str, QConfig | None] = {}
        self._explicit: set[str] = set()
        self._read(model, mapping)
        self._assign(model, "", None)
        if not any(self._assigned.values()):
            raise ValueError(
                f"{who}: expected a qconfig on the model, on a submodule or in mapping, found "
                "none; set model.qconfig = get_default_qconfig()"
            )
        self._check_conflicts(model)

    def of(self, name: str) -> QConfig | None:
        """The QConfig of the module of that name; None leaves it float."""
        return self._assigned[name]

    def chosen(self, name: str) -> bool:
        """Whether the mapping has this module's exact name or its type, so not by a pattern."""
        return name in self._explicit

    def _read(self, model: nn.Module, mapping: Mapping[Mapped, QConfig | None] | None) -> None:
        if mapping is not None and not isinstance(mapping, Mapping):
            raise TypeError(
                f"{self._who}: expected mapping to be a mapping, got {bounded(mapping)}"
            )
        known = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for key, config in (mapping or {}).items():
            self._check(f"mapping[{key!r}]", config)
            if isinstance(key, str):
                if not any(fnmatch.fnmatchcase(name, key) for name in known):
                    near = difflib.get_close_matches(key, known, 3) or known[:20]
                    raise ValueError(
                        f'{self._who}: no module is named "{key}" as in mapping; '
                        f"known: {', '.join(filter(None, near))}"
                    )
                self._names[key] = config
            elif isinstance(key, type) and issubclass(key, nn.Module):
                self._types[key] = config
            else:
                raise TypeError(
                    f"{self._who}: expected keys of mapping to be names or module types, "
                    f"got {bounded(key)}"
                )

    def _check(self, where: str, config: object) -> None:
        if config is None or isinstance(config, QConfig):
            return
        hint = ""
        if type(config).__name__ == "QConfig":  # torch.ao's, or another package's of that name
            hint = (
                f", which is {type(config).__module__}'s: take torch_ext.get_default_qconfig(), "
                'or QConfig(functools.partial(FakeQuantize, observer="percentile"), ...)'
            )
        raise TypeError(
            f"{self._who}: expected {where} to be a torch_ext.QConfig or None, got "
            f"{bounded(config)}{hint}"
        )

    def _assign(self, module: nn.Module, name: str, inherited: QConfig | None) -> None:
        config = self._config_of(module, name, inherited)
        self._assigned[name] = config
        for child_name, child in module._modules.items():  # shared ones under each of their names
            if child is None:
                continue
            self._assign(child, f"{name}.{child_name}" if name else child_name, config)

    def _config_of(self, module: nn.Module, name: str, inherited: QConfig | None) -> QConfig | None:
        if hasattr(module, _ATTRIBUTE):
            config: QConfig | None = getattr(module, _ATTRIBUTE)
            self._check(f"{name}.{_ATTRIBUTE}".strip("."), config)
            return config
        if name in self._names:
            self._explicit.add(name)
            return self._names[name]
        for pattern, config in self._names.items():
            if fnmatch.fnmatchcase(name, pattern):
                return config
        for kind in type(module).__mro__:
            if kind in self._types:
                self._explicit.add(name)
                return self._types[kind]
        return inherited

    def _is_quantized(self, module: nn.Module, name: str) -> bool:
        """Whether something of the module may be quantized; its children are looked at by name."""
        if is_activation(module):
            return False
        if self.chosen(name) and self.of(name) is not None:
            return True
        # By the forward, a QConfig also counts for what other modules read and call.
        return self._by_forward or target_of(module) not in (None, NOTHING)

    def _check_conflicts(self, model: nn.Module) -> None:
        """Raises ValueError if a module that appears under several names has several QConfigs."""
        first: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            earlier = first.setdefault(id(module), name)
            if self._assigned[name] is self._assigned[earlier]:
                continue
            if self._is_quantized(module, earlier) or self._is_quantized(module, name):
                raise ValueError(
                    f'{self._who}: "{earlier}" and "{name}" are one module, '
                    "but have different qconfigs; give both names the same one"
                )
