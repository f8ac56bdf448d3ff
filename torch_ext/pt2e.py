"""The observers and fake-quants of this package for torchao's PT2E, as quantization specs.

Imported by name only; it needs torchao (``pip install "torch_ext[pt2e]"``). A PT2E quantizer
annotates a graph with specs, which say how a value is to be quantized::

    from torch_ext import pt2e

    activation = pt2e.observer_spec("kl", dtype="uint8", qscheme="per_tensor_affine")
    weight = pt2e.observer_spec("min_max", qscheme="per_channel_symmetric", ch_axis=0)

``prepare_pt2e`` takes specs of :func:`observer_spec`, ``prepare_qat_pt2e`` those of
:func:`fake_quant_spec`; ``convert_pt2e`` writes the scales found into the graph.
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

# What the graph says and no spec can: the channels of a value, and that it is a weight.
_OF_THE_GRAPH = ("channel_len", "transient", "optional")
# Integers of this width and sign are what a converted graph holds; int4 is a part of int8.
_HELD_IN = {
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
    """A spec for ``prepare_pt2e``: the value is observed by a rule of :class:`Observer`.

    Args:
        observer, dtype, qscheme, ch_axis, quant_min, quant_max: as an :class:`Observer` takes
            them; the number of channels is taken from the data.
        keys: its other keys (``power_of_two=True``) and the rule's options (``percentile=99.9``).

    Raises:
        ValueError, TypeError, RuntimeError: what :class:`Observer` refuses, here and not in
            ``prepare_pt2e``.
    """
    found: dict[str, Any] = {
        "observer": observer,
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": ch_axis,
        "quant_min": quant_min,
        "quant_max": quant_max,
        **keys,
    }
    _check("observer_spec", keys, observer, OBSERVER_KEYS)
    return _spec("observer_spec", PT2EObserver, found)


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
    """A spec for ``prepare_qat_pt2e``: the value is quantized by a :class:`FakeQuantize`.

    Arguments and errors as in :func:`observer_spec`. ``method`` is one of
    ``torch_ext.fake_quants()``, and ``keys`` may hold those of :class:`FakeQuantize` too, such as
    ``averaging_constant``: 0.01 for activations, take 1 for weights.

    How many channels there are shows in the first batch. Per channel, ``lsq`` has its parameters
    from then on: run one before the optimizer is made.
    """
    found: dict[str, Any] = {
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
    return _spec("fake_quant_spec", PT2EFakeQuantize, found)


def _check(who: str, keys: dict[str, Any], observer: str, known: tuple[str, ...]) -> None:
    check_keys(who, keys, observer, [key for key in known if key not in _OF_THE_GRAPH])


def _spec(who: str, adapter: type[Any], keys: dict[str, Any]) -> QuantizationSpec:
    _, low, high = parse_dtype(who, keys["dtype"])
    keys["dtype"] = _HELD_IN[low < 0, high - low > 255]
    for name, bound in (("quant_min", low), ("quant_max", high)):
        keys[name] = bound if keys[name] is None else keys[name]
    probe = adapter(**keys).observer  # refuses what does not fit together
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
    """What PT2E asks of an observer, answered by a module of ours, ``inner``.

    Nobody says how many channels there are before data comes, or a state dict: until then
    ``inner`` has one.
    """

    inner: Observer | FakeQuantize

    def _hold(self, make: functools.partial[Any]) -> None:
        self._make = make
        self._fitted = False
        self.inner = make(channel_len=1)

    @property
    def observer(self) -> Observer:
        return self.inner if isinstance(self.inner, Observer) else self.inner.observer

    # convert_pt2e reads these, and ``dtype``.
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
        self._fitted = True
        if channels == self.observer.channel_len:
            return
        made = self._make(channel_len=channels).to(self.observer.tally.device)
        made.train(self.training)
        if isinstance(self.inner, FakeQuantize):
            made.enter(self.inner.state)
        self.inner = made

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        statistic = "inner" if isinstance(self.inner, Observer) else "inner.observer"
        extrema = state_dict.get(f"{prefix}{statistic}.extrema")
        if not self._fitted and isinstance(extrema, Tensor) and extrema.dim() == 2:
            self._fit(extrema.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class PT2EObserver(_Adapter, ObserverBase):  # type: ignore[misc]
    """An :class:`Observer` in a graph that ``prepare_pt2e`` made."""

    def __init__(self, observer: Rule, is_dynamic: bool = False, **keys: Any) -> None:
        _refuse_dynamic("observer_spec", is_dynamic)
        super().__init__(dtype=keys["dtype"])
        self._hold(functools.partial(Observer, observer, **keys))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale [C] float32 and zero point [C] int32; RuntimeError without data."""
        _refuse_unobserved(self.observer)
        return self.observer.calculate_qparams()


class PT2EFakeQuantize(_Adapter, FakeQuantizeBase):  # type: ignore[misc]
    """A :class:`FakeQuantize` in a graph that ``prepare_qat_pt2e`` made.

    It begins in QAT. torchao's switches choose the state, and ``set_fake_quantize`` does:

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
        _refuse_dynamic("fake_quant_spec", is_dynamic)
        super().__init__()
        self.dtype: torch.dtype = keys["dtype"]
        self._hold(functools.partial(FakeQuantize, method, observer, **keys))
        self.inner.enter(self._chosen())

    def _chosen(self, **switched: bool) -> FakeQuantState:
        """The state that the switches choose."""
        switches = {
            name: bool(getattr(self, f"{name}_enabled")[0]) for name in ("observer", "fake_quant")
        } | switched
        if switches["observer"]:
            return FakeQuantState.QAT if switches["fake_quant"] else FakeQuantState.CALIBRATION
        return FakeQuantState.VALIDATION if switches["fake_quant"] else FakeQuantState.FLOAT

    def _switch(self, **switched: bool) -> None:
        state = self._chosen(**switched)
        # Refused without a range; in QAT the first batch sets it.
        waits = state is not FakeQuantState.VALIDATION
        set_fake_quantize(self.inner, state, allow_unobserved=waits)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self._switch(fake_quant=enabled)
        super().enable_fake_quant(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        self._switch(observer=enabled)
        super().enable_observer(enabled)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale [C] float32 and zero point [C] int32; RuntimeError without a range."""
        if self.inner.state is FakeQuantState.CALIBRATION:  # not solved yet
            _refuse_unobserved(self.observer)
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
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.inner.enter(self._chosen())


def _refuse_dynamic(who: str, is_dynamic: bool) -> None:
    if is_dynamic:
        raise ValueError(
            f"{who}: expected is_dynamic to be False, got True: a range of the running batch "
            "is torchao's own choice, no observer of ours"
        )


def _refuse_unobserved(observer: Observer) -> None:
    if observer.statistic != "none" and not observer.saw_data:
        raise RuntimeError(
            f"convert_pt2e: expected every observer to have seen data, got none in {observer}; "
            "run data through the prepared model first"
        )
