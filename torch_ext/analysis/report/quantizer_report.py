"""One quantizer of a report: its keys and range, and what was measured of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_ext.analysis.report.quality import (
    Bins,
    Quality,
    RuleLine,
    Sample,
    Statistic,
    Sums,
    bins_of,
    error_curve,
    histogram_sample,
    line_of,
    quality_of,
    rule_lines,
    weight_sample,
)
from torch_ext.files.quantizer_params import STATISTIC, Params, spec_of
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.observer import Observer

# Rules are compared, and errors drawn, on at most so many channels, evenly spread.
_CHANNELS = 16
# A channel's values past which the error curve takes every so many-th.
_VALUES = 2**14
# Values of an activation that are looked at in one piece.
_PIECE = 2**22


class WatchedData:
    """What passed through a quantizer while data ran through the model."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        self._sums = Sums()
        self.axis = 1
        self.largest: Tensor | None = None  # magnitude by position along the axis
        own = quantizer.observer
        # Keeps the histogram that the quantizer's own observer does not.
        spec = spec_of(quantizer)
        self.observer = None if own.has_histogram else _histogram_observer(spec, own.channel_len)

    @torch.no_grad()
    def add(self, quantizer: FakeQuantize, x: Tensor, out: Tensor) -> None:
        if x.dim() == 0 or x.numel() == 0:
            return
        if self.observer is not None:
            self.observer.to(x.device)(x)
        axis = quantizer.observer.ch_axis
        step = quantizer.calculate_qparams()[0]
        rows = max(1, _PIECE * len(x) // x.numel())
        if axis >= 0:
            step = step.view([-1 if i == axis else 1 for i in range(x.dim())])
        steps = torch.split(step, rows) if axis == 0 else itertools.repeat(step)
        for piece, result, one in zip(
            torch.split(x, rows), torch.split(out, rows), steps, strict=False
        ):
            self._sums.add(piece, result, one)
        # Channels are the second axis, but the last of [batch, tokens, channels].
        self.axis = x.dim() - 1 if x.dim() in (1, 3) else 1
        finite = torch.where(x.isfinite(), x.abs(), 0)
        others = [i for i in range(x.dim()) if i != self.axis]
        largest = (finite.amax(others) if others else finite).float().cpu()
        if self.largest is not None and self.largest.shape == largest.shape:
            largest = torch.maximum(self.largest, largest)
        self.largest = largest

    @property
    def quality(self) -> Quality:
        return self._sums.quality()


@dataclass
class QuantizerReport:
    """Everything the page says; None where there is nothing to say it from."""

    name: str
    of: str
    params: Params
    statistic: Statistic
    bins: Bins | None = None
    quality: Quality | None = None
    source: str = ""  # what `quality` was measured on
    lines: list[RuleLine] = field(default_factory=list)
    in_use: RuleLine | None = None  # on the channels of `lines`
    compared: int = 0  # channels of `lines`
    curve: list[tuple[float, float]] = field(default_factory=list)
    largest: Tensor | None = None  # magnitude by position along `axis` of what was quantized
    axis: int = 0

    @property
    def channels(self) -> int:
        return self.params.channels

    @property
    def counts(self) -> list[int]:
        """finite, zeros, tiny, inf, nan"""
        found: list[int] = self.statistic.tally.sum(0).tolist()
        return found

    def suggestion(self) -> RuleLine | None:
        """The rule with the least noise."""
        lines = [line for line in self.lines if not math.isnan(line.quality.sqnr)]
        return max(lines, key=lambda line: line.quality.sqnr, default=None)


def measured(
    name: str,
    of: str,
    params: Params,
    weight: Tensor | None = None,
    seen: WatchedData | None = None,
) -> QuantizerReport:
    """Measures on the weight, on what was seen, or on the histogram that is kept."""
    statistic = Statistic(*(params[key] for key in STATISTIC))
    subject = QuantizerReport(name, of, params, statistic)
    if weight is not None:
        weight = weight.detach().cpu()
        sample: Sample | None = weight_sample(weight, params.ch_axis)
        subject.source = "the weight"
        if params.channels == 1 and weight.dim() > 1:
            subject.largest = weight.float().abs().flatten(1).amax(1)
    else:
        if seen is not None and seen.observer is not None:
            subject.statistic = _statistic(seen.observer)
        sample, subject.source = histogram_sample(subject.statistic), "the histogram"
    if params.solved and sample is not None:
        subject.quality = quality_of(sample, *_qparams(params), params)
    if seen is not None:
        subject.quality, subject.source = seen.quality, "the data"
        subject.largest, subject.axis = seen.largest, seen.axis
    if sample is not None:
        subject.bins = bins_of(sample)
        _compare(subject, sample, weight)
    return subject


def _qparams(params: Params) -> tuple[Tensor, Tensor]:
    return params["scale"], params["zero_point"]


def _compare(subject: QuantizerReport, sample: Sample, weight: Tensor | None) -> None:
    """Every rule, and the error by threshold, on some of the channels."""
    params = subject.params
    step = -(-params.channels // _CHANNELS)
    channels = torch.arange(0, params.channels, step)
    statistic = subject.statistic.pick(channels)
    if weight is not None:
        # The transient statistic that its rule was solved from.
        part = weight if params.ch_axis < 0 else weight.index_select(params.ch_axis, channels)
        observer = _histogram_observer(params.spec, len(channels))
        observer(part)
        statistic = _statistic(observer)
    chosen = sample.pick(channels)
    subject.compared = len(channels)
    subject.lines = rule_lines(chosen, statistic, params)
    if params.solved:
        own = (params["range"], *_qparams(params))
        parts = (part[channels] for part in own)
        subject.in_use = line_of("in use", None, chosen, params, *parts)
    fewer = -(-chosen.x.shape[1] // _VALUES) if weight is not None else 1
    subject.curve = error_curve(sample.pick(channels, fewer), params)


def _histogram_observer(spec: Mapping[str, Any], channels: int) -> Observer:
    """An observer of the same layout that keeps its histogram."""
    return Observer(
        "min_max",
        qscheme=spec["qscheme"],
        ch_axis=spec["ch_axis"],
        channel_len=channels,
        mantissa_bits=spec["mantissa_bits"],
        octaves=spec["octaves"],
        histogram=True,
    )


def _statistic(observer: Observer) -> Statistic:
    return Statistic(*(t.cpu() for t in (observer.extrema, observer.tally, observer.counts)))
