"""Quantization specs for torchao's PT2E that use the observers and fake-quants of this package.

This module has to be imported explicitly, and needs torchao (``pip install "torch_ext[pt2e]"``). A
PT2E quantizer annotates a graph with such specs, which say how each value is quantized::

    from torch_ext import pt2e

    activation = pt2e.observer_spec("kl", dtype="uint8", qscheme="per_tensor_affine")
    weight = pt2e.observer_spec("min_max", qscheme="per_channel_symmetric", ch_axis=0)

Use :func:`observer_spec` with ``prepare_pt2e`` and :func:`fake_quant_spec` with
``prepare_qat_pt2e``; ``convert_pt2e`` writes the resulting scales into the graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.ops.registry_names import Method, Rule
from torch_ext.quantizers.fake_quantize import KEYS as FAKE_QUANT_KEYS
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.grid import DType, parse_dtype
from torch_ext.quantizers.observer import KEYS as OBSERVER_KEYS
from torch_ext.quantizers.observer import Observer, check_keys
from torch_ext.quantizers.set_state import set_fake_quantize
from torch_ext.quantizers.state_table import FakeQuantState

try:
    from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
except ImportError as error:
    raise ImportError(
        "torch_ext.pt2e: expected torchao 0.18 to be installed, but it cannot be imported "
        f'({error}); pip install "torch_ext[pt2e]"'
    ) from error

__all__ = ["PT2EFakeQuantize", "PT2EObserver", "fake_quant_spec", "observer_spec"]

# Keys that a spec cannot have, because the number of channels and the role depend on the graph.
_SET_BY_GRAPH = ("channel_len", "transient", "optional")
# The dtype of a converted graph, by whether the grid is signed and has more than 8 bits. int4 is
# stored in int8.
_STORED_IN = {
    (True, False): torch.int8,
    (False, False): torch.uint8,
    (True, True): torch.int16,
    (False, True): torch.uint16,
}


def observer_spec(
    observer: Rule = "min_max",
    dtype: DType = torch.int8,
    qscheme: torch.qscheme | str = torch.per_tensor_symmetric,
    ch_axis: int = -1,
    quant_min: int | None = None,
    quant_max: int | None = None,
    **keys: Any,
) -> QuantizationSpec:
    """A spec for ``prepare_pt2e`` that observes a value with an :class:`Observer`.

    The number of channels comes from the data.

    Args:
        observer: the name of the rule.
        dtype: the grid's dtype, as in :class:`Observer`.
        qscheme: symmetric or affine, per tensor or per channel.
        ch_axis: the axis of the channels; -1 with a per-tensor scheme.
        quant_min: the smallest integer of the grid; by default, the dtype's.
        quant_max: the largest integer of the grid; by default, the dtype's.
        **keys: other keys of :class:`Observer` (``power_of_two=True``), and options of the rule
            (``percentile=99.9``).

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a key, a rule, a dtype or a scheme is unknown, or arguments do not fit together.
        RuntimeError: the rule does not accept its options or the grid.
    """
    spec_keys: dict[str, Any] = {
        "observer": observer,
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": ch_axis,
        "quant_min": quant_min,
        "quant_max": quant_max,
        **keys,
    }
    _check("observer_spec", keys, observer, OBSERVER_KEYS)
    return _spec("observer_spec", PT2EObserver, spec_keys)


def fake_quant_spec(
    method: Method = "fake_quant",
    observer: Rule = "min_max",
    dtype: DType = torch.int8,
    qscheme: torch.qscheme | str = torch.per_tensor_symmetric,
    ch_axis: int = -1,
    quant_min: int | None = None,
    quant_max: int | None = None,
    **keys: Any,
) -> QuantizationSpec:
    """A spec for ``prepare_qat_pt2e`` that quantizes a value with a :class:`FakeQuantize`.

    The number of channels comes from the first batch. With per-channel ``lsq``, that batch replaces
    the learned parameters: run one before you make the optimizer.

    Args:
        method: one of ``torch_ext.fake_quants()``.
        observer, dtype, qscheme, ch_axis, quant_min, quant_max: as in :func:`observer_spec`.
        **keys: keys as in :func:`observer_spec`, and those of :class:`FakeQuantize`. Its
            ``averaging_constant`` is 0.01 by default, which suits activations; pass 1 for weights.

    Raises:
        TypeError: as :func:`observer_spec`.
        ValueError: as :func:`observer_spec`, and for an unknown method.
        RuntimeError: as :func:`observer_spec`.
    """
    spec_keys: dict[str, Any] = {
        "method": method,
        "observer": observer,
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": ch_axis,
        "quant_min": quant_min,
        "quant_max": quant_max,
        **keys,
    }
    _check("fake_quant_spec", keys, observer, FAKE_QUANT_KEYS)
    return _spec("fake_quant_spec", PT2EFakeQuantize, spec_keys)


def _check(who: str, keys: dict[str, Any], observer: str, known: tuple[str, ...]) -> None:
    """Raises ValueError for keys that a spec does not take."""
    check_keys(who, keys, observer, [key for key in known if key not in _SET_BY_GRAPH])


def _spec(who: str, adapter: type[Any], keys: dict[str, Any]) -> QuantizationSpec:
    """The spec that makes ``adapter(**keys)``; builds one to check the keys."""
    _, low, high = parse_dtype(who, keys["dtype"])
    keys["dtype"] = _STORED_IN[low < 0, high - low > 255]
    for name, bound in (("quant_min", low), ("quant_max", high)):
        keys[name] = bound if keys[name] is None else keys[name]
    probe = adapter(**keys).observer  # raises if the keys do not fit together
    if not low <= probe.quant_min < probe.quant_max <= high:
        raise ValueError(
            f"{who}: expected quant_min and quant_max to be between {low} and {high}, "
            f"got {probe.quant_min} and {probe.quant_max}"
        )
    return QuantizationSpec(
        dtype=probe.dtype,
        observer_or_fake_quant_ctr=adapter.with_args(**keys),
        quant_min=probe.quant_min,
        quant_max=probe.quant_max,
        qscheme=probe.qscheme,
        ch_axis=probe.ch_axis if probe.ch_axis >= 0 else None,
    )


class _Adapter(nn.Module):
    """The interface that PT2E expects of an observer, for the module ``inner``.

    The number of channels is known from the first batch, or from a state dict. Until then
    ``inner`` has one channel; then it is replaced, see :meth:`_fit`.
    """

    inner: Observer | FakeQuantize

    def _set_factory(self, make: functools.partial[Any]) -> None:
        """``make(channel_len=C)`` gives the inner module."""
        self._make = make
        self._fitted = False
        self.inner = make(channel_len=1)

    @property
    def observer(self) -> Observer:
        return self.inner if isinstance(self.inner, Observer) else self.inner.observer

    # convert_pt2e reads these properties, and ``dtype``.
    @property
    def qscheme(self) -> torch.qscheme:
        return self.observer.qscheme

    @property
    def ch_axis(self) -> int:
        return self.observer.ch_axis

    @property
    def quant_min(self) -> int:
        return self.observer.quant_min

    @property
    def quant_max(self) -> int:
        return self.observer.quant_max

    def forward(self, x: Tensor) -> Tensor:
        if not self._fitted and x.dim() > self.ch_axis:
            self._fit(x.shape[self.ch_axis] if self.ch_axis >= 0 else 1)
        out: Tensor = self.inner(x)
        return out

    def _fit(self, channels: int) -> None:
        """Replaces ``inner`` by a module for that many channels, in the same state and mode."""
        self._fitted = True
        if channels == self.observer.channel_len:
            return
        fitted = self._make(channel_len=channels).to(self.observer.tally.device)
        fitted.train(self.training)
        if isinstance(self.inner, FakeQuantize):
            fitted.enter(self.inner.state)
        self.inner = fitted

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # The shape of the saved statistic says how many channels there are.
        statistic = "inner" if isinstance(self.inner, Observer) else "inner.observer"
        extrema = state_dict.get(f"{prefix}{statistic}.extrema")
        if not self._fitted and isinstance(extrema, Tensor) and extrema.dim() == 2:
            self._fit(extrema.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class PT2EObserver(_Adapter, ObserverBase):  # type: ignore[misc]
    """An :class:`Observer` in a graph of ``prepare_pt2e``; made by :func:`observer_spec`."""

    def __init__(self, observer: Rule, is_dynamic: bool = False, **keys: Any) -> None:
        _check_static("observer_spec", is_dynamic)
        super().__init__(dtype=keys["dtype"])
        self._set_factory(functools.partial(Observer, observer, **keys))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale [C] float32 and zero point [C] int32; raises RuntimeError if it saw no data."""
        _check_observed(self.observer)
        return self.observer.calculate_qparams()


class PT2EFakeQuantize(_Adapter, FakeQuantizeBase):  # type: ignore[misc]
    """A :class:`FakeQuantize` in a graph of ``prepare_qat_pt2e``; made by :func:`fake_quant_spec`.

    It starts in QAT. torchao's switches (``enable_observer``, ``disable_fake_quant``, ...) set its
    state as below; :func:`set_fake_quantize` works too:

    =============  ===============  ===========
    observer       fake-quant       state
    =============  ===============  ===========
    enabled        enabled          QAT
    enabled        disabled         CALIBRATION
    disabled       enabled          VALIDATION
    disabled       disabled         FLOAT
    =============  ===============  ===========
    """

    inner: FakeQuantize

    def __init__(
        self, method: Method, observer: Rule, is_dynamic: bool = False, **keys: Any
    ) -> None:
        _check_static("fake_quant_spec", is_dynamic)
        super().__init__()
        self.dtype: torch.dtype = keys["dtype"]
        self._set_factory(functools.partial(FakeQuantize, method, observer, **keys))
        self.inner.enter(self._chosen())

    def _chosen(self, **switched: bool) -> FakeQuantState:
        """The state for torchao's switches, with those that are being switched."""
        switches = {
            name: bool(getattr(self, f"{name}_enabled")[0]) for name in ("observer", "fake_quant")
        } | switched
        if switches["observer"]:
            return FakeQuantState.QAT if switches["fake_quant"] else FakeQuantState.CALIBRATION
        return FakeQuantState.VALIDATION if switches["fake_quant"] else FakeQuantState.FLOAT

    def _switch(self, **switched: bool) -> None:
        """Sets the state for switches that are about to change, before torchao changes them."""
        state = self._chosen(**switched)
        # Only VALIDATION needs a range already; in QAT the first batch sets it.
        allow_unobserved = state is not FakeQuantState.VALIDATION
        set_fake_quantize(self.inner, state, allow_unobserved=allow_unobserved)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self._switch(fake_quant=enabled)
        super().enable_fake_quant(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        self._switch(observer=enabled)
        super().enable_observer(enabled)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale [C] float32 and zero point [C] int32; raises RuntimeError without a range."""
        if self.inner.state is FakeQuantState.CALIBRATION:  # not solved yet
            _check_observed(self.observer)
            return self.observer.calculate_qparams()
        if not bool(self.inner.solved):
            raise RuntimeError(
                "convert_pt2e: expected every fake-quant to have a range, got none in "
                f"{self.inner}; run data through the prepared model first"
            )
        return self.inner.calculate_qparams()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)  # torchao's switches too
        self.inner.enter(self._chosen())


def _check_static(who: str, is_dynamic: bool) -> None:
    if is_dynamic:
        raise ValueError(
            f"{who}: expected is_dynamic to be False, got True: dynamic quantization "
            "needs torchao's own observers"
        )


def _check_observed(observer: Observer) -> None:
    if observer.statistic != "none" and not observer.saw_data:
        raise RuntimeError(
            f"convert_pt2e: expected every observer to have seen data, got none in {observer}; "
            "run data through the prepared model first"
        )
