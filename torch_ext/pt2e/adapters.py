"""Observers and fake-quants with the interface that torchao's PT2E expects."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase

from torch_ext.ops.registry_names import Method, Rule
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.set_state import set_fake_quantize
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.quantizers.transition import QuantizationWarning
from torch_ext.utils.mask_values import mask_fill


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
    """Raises RuntimeError for an observer that saw no data; warns of one that saw a mask."""
    if observer.statistic == "none":
        return
    if not observer.saw_data:
        raise RuntimeError(
            f"convert_pt2e: expected every observer to have seen data, got none in {observer}; "
            "run data through the prepared model first"
        )
    infinite = int(observer.tally[:, 3].sum())
    fill = mask_fill(float(observer.extrema[:, 0].min()), float(observer.extrema[:, 1].max()))
    if infinite or fill:
        seen = f"{infinite} infinite values" if infinite else f"values that reach {fill}"
        warnings.warn(
            f"convert_pt2e: {observer} saw {seen}, as of an attention mask, which a grid cannot "
            "hold; prepare with pt2e.FloatMasks(quantizer)",
            QuantizationWarning,
            stacklevel=3,
        )
