"""One quantizer of a report: its settings and range, and the measurements of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_ext.analysis.report.quality import (
    MAX_PIECE,
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
    weight_rows,
    weight_sample,
)
from torch_ext.files.quantizer_params import STATISTIC, Params, spec_of
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.grid import largest_step
from torch_ext.quantizers.observer import Observer

# The most channels, evenly spread, that rules are compared on and the error curve is computed for.
_CHANNELS = 16
# About the most values of a weight's channel that the error curve is computed for, evenly spread.
_VALUES = 2**14


class WatchedData:
    """Accumulates what passes through a quantizer of activations.

    `largest` are the largest magnitudes by position along `axis`, on the CPU, or None before data.
    `observer` collects the histogram if the quantizer's own observer keeps none, else it is None.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        self._sums = Sums()
        self.axis = 1
        self.largest: Tensor | None = None
        self.observer: Observer | None = None
        if not (quantizer.observer.has_histogram or quantizer.is_dynamic):
            channels = quantizer.observer.channel_len
            self.observer = _histogram_observer(spec_of(quantizer), channels)

    @torch.no_grad()
    def add(self, quantizer: FakeQuantize, x: Tensor, out: Tensor) -> None:
        """Adds the quantizer's input and output, of the same shape; scalars are ignored."""
        if x.dim() == 0 or x.numel() == 0:
            return
        if self.observer is not None:
            self.observer.to(x.device)(x)
        axis = quantizer.observer.ch_axis
        step = quantizer.calculate_qparams()[0] * largest_step(quantizer.observer.dtype)
        if quantizer.is_dynamic:  # steps of groups are not known here: none counts as clipped
            step = torch.full_like(step, torch.inf)
        rows = max(1, MAX_PIECE * len(x) // x.numel())
        if axis >= 0:
            step = step.view([-1 if i == axis else 1 for i in range(x.dim())])
        steps = torch.split(step, rows) if axis == 0 else itertools.repeat(step)
        for part, out_part, step_part in zip(
            torch.split(x, rows), torch.split(out, rows), steps, strict=False
        ):
            self._sums.add(part, out_part, step_part)
        # Channels are axis 1, but the last axis of [channels] and [batch, tokens, channels].
        self.axis = x.dim() - 1 if x.dim() in (1, 3) else 1
        finite = torch.where(x.isfinite(), x.abs(), 0)
        others = [i for i in range(x.dim()) if i != self.axis]
        largest = (finite.amax(others) if others else finite).float().cpu()
        if self.largest is not None and self.largest.shape == largest.shape:
            largest = torch.maximum(self.largest, largest)
        self.largest = largest

    @property
    def quality(self) -> Quality:
        """The quality over everything added so far."""
        return self._sums.quality()


@dataclass
class QuantizerReport:
    """Everything that the page shows of a quantizer; None for what there is no data for."""

    name: str
    of: str  # "input", "output" or "weight"
    params: Params
    statistic: Statistic
    bins: Bins | None = None  # the picture's histogram
    quality: Quality | None = None
    source: str = ""  # what `quality` was measured on
    lines: list[RuleLine] = field(default_factory=list)  # the rules, compared on some channels
    in_use: RuleLine | None = None  # the quantizer's range, on the same channels
    compared: int = 0  # the number of these channels
    curve: list[tuple[float, float]] = field(default_factory=list)  # of error_curve
    largest: Tensor | None = None  # the largest magnitudes by position along `axis`
    axis: int = 0

    @property
    def channels(self) -> int:
        return self.params.channels

    @property
    def counts(self) -> list[int]:
        """How many values were finite, zero, tiny, infinite and NaN, over all channels."""
        totals: list[int] = self.statistic.tally.sum(0).tolist()
        return totals

    def suggestion(self) -> RuleLine | None:
        """The rule with the highest SQNR; None if none was measured."""
        lines = [line for line in self.lines if not math.isnan(line.quality.sqnr)]
        return max(lines, key=lambda line: line.quality.sqnr, default=None)


def measured(
    name: str,
    of: str,
    params: Params,
    weight: Tensor | None = None,
    seen: WatchedData | None = None,
) -> QuantizerReport:
    """Measures a quantizer on its weight, on watched data, or else on its histogram.

    Args:
        name, of: the quantizer's name, and ``"input"``, ``"output"`` or ``"weight"``.
        params: its settings and tensors, on the CPU.
        weight: the weight that it quantizes, for a quantizer of a weight.
        seen: what passed through it, for a quantizer of activations, if the report has data.
    """
    statistic = Statistic(*(params[key] for key in STATISTIC))
    subject = QuantizerReport(name, of, params, statistic)
    if params.is_dynamic:
        # Each group has a range of its own, so there is no threshold, nor other rules for it.
        if seen is not None:
            subject.quality, subject.source = seen.quality, "the data"
            subject.largest, subject.axis = seen.largest, seen.axis
        return subject
    if weight is not None:
        weight = weight.detach().cpu()
        sample: Sample | None = weight_sample(weight, params.ch_axis, params.group_size)
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
    """Fills in the comparison of rules and the error curve, on some of the channels."""
    params = subject.params
    step = -(-params.channels // _CHANNELS)
    channels = torch.arange(0, params.channels, step)
    if weight is None:
        statistic = subject.statistic.pick(channels)
    else:
        # A weight's statistic is not kept, so it is collected again.
        rows = weight_rows(weight, params.ch_axis, params.group_size)[channels]
        per_row = {"qscheme": "per_channel_symmetric", "ch_axis": 0}
        observer = _histogram_observer({**params.spec, **per_row}, len(channels))
        observer(rows)
        statistic = _statistic(observer)
    picked = sample.pick(channels)
    subject.compared = len(channels)
    subject.lines = rule_lines(picked, statistic, params)
    if params.solved:
        solution = (params["range"], *_qparams(params))
        parts = (part[channels] for part in solution)
        subject.in_use = line_of("in use", None, picked, params, *parts)
    stride = -(-picked.x.shape[1] // _VALUES) if weight is not None else 1
    subject.curve = error_curve(sample.pick(channels, stride), params)


def _histogram_observer(spec: Mapping[str, Any], channels: int) -> Observer:
    """A min_max observer with the layout of a quantizer's settings, that keeps a histogram."""
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
    tensors = (observer.extrema, observer.tally, observer.counts)
    return Statistic(*(tensor.cpu() for tensor in tensors))
