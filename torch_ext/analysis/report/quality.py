"""What a report says of one quantizer: how well its range, and that of every rule, serves its data.

The data are a weight's values, or the histogram of a statistic, whose bins count as their edge of
least magnitude. They are quantized by the library's own ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_ext import ops
from torch_ext.analysis.rule_choices import Choice, choice, rules_that_look
from torch_ext.files.quantizer_params import Params
from torch_ext.ops.registry import observer_info

# Thresholds of the error curve: so many, down to 2^-6 of the largest magnitude.
_STEPS, _OCTAVES = 49, 6


# The picture's bins: so many octaves below the largest magnitude, in parts.
_DEPTH, _PER_OCTAVE = 16, 8
# Values that are looked at in one piece.
_PIECE = 2**22


class Sample(NamedTuple):
    """Values x float32 [C,n] between ends [C,2], each `times` times: float64 [C,n], None for 1."""

    x: Tensor
    ends: Tensor
    times: Tensor | None = None

    @property
    def largest(self) -> Tensor:
        """Magnitude [C,1]; 0 for a channel without values."""
        return self.ends.abs().amax(1, keepdim=True)

    def pick(self, channels: Tensor, step: int = 1) -> Sample:
        """Some channels, and every `step`-th value."""
        times = None if self.times is None else self.times[channels, ::step]
        return Sample(self.x[channels, ::step], self.ends[channels], times)

    def pieces(self) -> Iterator[Sample]:
        width = max(1, _PIECE // len(self.x))
        for begin in range(0, self.x.shape[1], width):
            part = slice(begin, begin + width)
            times = None if self.times is None else self.times[:, part]
            yield Sample(self.x[:, part], self.ends, times)


class Statistic(NamedTuple):
    """As an observer keeps it, on the CPU."""

    extrema: Tensor
    tally: Tensor
    counts: Tensor

    def pick(self, channels: Tensor) -> Statistic:
        return Statistic(*(part[channels] for part in self))


@dataclass(frozen=True)
class Quality:
    """Of all values: shares from 0 to 1, and the ratio of signal to quantization noise."""

    clipped: float  # further from what it is quantized to than half a step
    to_zero: float  # not zero, but quantized to it
    sqnr: float  # dB; NaN without a value other than zero
    cosine: float


class Sums:
    """Sums over values and what they are quantized to; a :class:`Quality` follows from them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64)

    def add(self, x: Tensor, out: Tensor, step: Tensor, times: Tensor | None = None) -> None:
        """`step`: the scale, broadcast to x; `times`: how often each value is there."""
        x, out = x.double(), out.double()
        if not bool(x.isfinite().all()):
            finite = x.isfinite()
            x, out = torch.where(finite, x, 0), torch.where(finite, out, 0)
        away = (x - out).abs()
        # Half a step is rounding; the float32 result may be off by an ulp.
        flags = [torch.ones_like(x), away > 0.50001 * step, (out == 0) & (x != 0)]
        parts = [*flags, away.square(), x.square(), out.square(), x * out]
        kept = [part if times is None else part * times for part in parts]
        self._sums += torch.stack([part.double().sum() for part in kept]).cpu()

    def quality(self) -> Quality:
        total, clipped, to_zero, noise, signal, output, product = self._sums.tolist()
        sqnr = cosine = math.nan
        if signal > 0:
            sqnr = 10 * math.log10(signal / noise) if noise > 0 else math.inf
        if signal > 0 and output > 0:
            cosine = product / math.sqrt(signal) / math.sqrt(output)
        total = max(total, 1.0)
        return Quality(clipped / total, to_zero / total, sqnr, cosine)


@dataclass(frozen=True)
class RuleLine:
    """A range [C,2] on this quantizer's data and grid."""

    label: str
    choice: Choice | None  # None: what is in use
    range: Tensor
    share: float  # of the channel's largest magnitude that the range reaches; median of channels
    quality: Quality


def weight_sample(weight: Tensor, ch_axis: int) -> Sample:
    """The values of a weight; those that are not finite are there 0 times."""
    x = weight.float()
    x = x.movedim(ch_axis, 0).flatten(1) if ch_axis >= 0 else x.reshape(1, -1)
    finite = x.isfinite()
    held = torch.where(finite, x, 0)
    if x.shape[1] == 0:
        return Sample(x, torch.zeros(len(x), 2))
    ends = torch.stack([held.amin(1), held.amax(1)], 1)
    return Sample(held, ends, None if bool(finite.all()) else finite.double())


def histogram_sample(statistic: Statistic) -> Sample | None:
    """The bins of a histogram that hold values, and zero; None without a histogram or data."""
    extrema, tally, counts = statistic
    channels, _, octaves, bins = counts.shape
    if not octaves or not bool((tally[:, 0] > 0).any()):
        return None
    ends = torch.where(tally[:, :1] > 0, extrema, 0)
    largest = ends.abs().amax(1)
    # Octave e lives in slot e mod octaves of the window that ends at that of the largest value.
    top = torch.frexp(largest.double()).exponent - 1
    octave = top[:, None] - torch.remainder(top[:, None] - torch.arange(octaves), octaves)
    mantissa = 1 + torch.arange(bins, dtype=torch.float64) / bins
    shape = (channels, octaves, bins)
    edges = torch.ldexp(mantissa.expand(shape), octave[:, :, None].expand(shape)).flatten(1)
    x = torch.cat([-edges, edges, torch.zeros(channels, 1, dtype=torch.float64)], 1)
    times = torch.cat([counts.flatten(1), tally[:, 1:3].sum(1, keepdim=True)], 1)
    held = (times > 0).any(0)
    # A bin that is empty in this channel may lie past what float32 holds.
    x = torch.where(times > 0, x, 0)
    return Sample(x[:, held].float(), ends, times[:, held].double())


def quality_of(sample: Sample, scale: Tensor, zero_point: Tensor, params: Params) -> Quality:
    """How the values fare with these qparams [C] on the grid of `params`."""
    sums = Sums()
    for piece in sample.pieces():
        out = _quantized(piece.x, scale, zero_point, params)
        sums.add(piece.x, out, scale[:, None], piece.times)
    return sums.quality()


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, params: Params) -> Tensor:
    axis = 0 if len(scale) > 1 else -1
    return ops.fake_quant(x, scale, zero_point, params.quant_min, params.quant_max, axis)


def rule_lines(sample: Sample, statistic: Statistic, params: Params) -> list[RuleLine]:
    """Every rule that can be solved here, with its defaults; the quantizer's with its options."""
    own = choice(params.observer, params.spec["options"])
    names = dict.fromkeys([own.rule, *rules_that_look()])
    bits = (params.quant_max - params.quant_min).bit_length()
    choices = [own if name == own.rule else choice(name, {}) for name in names]
    choices = [c for c in choices if observer_info(c.rule)["max_bits"] >= bits]
    many = len(choices)
    extrema, tally, counts = statistic
    none = counts[:, :, :0, :0]
    reads = [observer_info(c.rule)["statistic"] == "histogram" for c in choices]
    found = ops.solve_many(
        [c.rule for c in choices],
        [extrema] * many,
        [tally] * many,
        [counts if wanted else none for wanted in reads],
        [params.quant_min] * many,
        [params.quant_max] * many,
        [params.symmetric] * many,
        [params.scale_rule] * many,
        [params.power_of_two] * many,
        [c.options for c in choices],
    )
    return [
        line_of(str(one), one, sample, params, *solution)
        for one, *solution in zip(choices, *found, strict=True)
    ]


def line_of(
    label: str,
    one: Choice | None,
    sample: Sample,
    params: Params,
    range_: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> RuleLine:
    shares = range_.double().abs().amax(1, keepdim=True) / sample.largest.double()
    shares = shares[shares.isfinite()]
    share = float(shares.median()) if len(shares) else math.nan
    return RuleLine(label, one, range_, share, quality_of(sample, scale, zero_point, params))


def error_curve(sample: Sample, params: Params) -> list[tuple[float, float]]:
    """Threshold, as a share of the channel's largest magnitude, and squared error in dB.

    The range of a threshold T is [clamp(min, -T, T), clamp(max, -T, T)], as that of search rules;
    the error is relative to the sum of squares.
    """
    x, largest = sample.x, sample.largest.double()
    times = torch.ones(1, 1, dtype=torch.float64) if sample.times is None else sample.times
    power = float((x.double().square() * times).sum())
    shares = torch.logspace(-_OCTAVES, 0, _STEPS, base=2, dtype=torch.float64)
    curve = []
    for share in shares.tolist():
        reach = (largest * share).float()
        range_ = sample.ends.clamp(-reach, reach)
        out = _quantized(x, *ops.qparams(range_, *params.grid), params)
        noise = float(((x.double() - out).square() * times).sum())
        if power > 0 and noise > 0:
            curve.append((share, 10 * math.log10(noise / power)))
    return curve


class Bins(NamedTuple):
    """Values by magnitude, as a share of their channel's largest, in bins of 1/8 octave.

    ``counts[sign][i]`` holds the values from ``2^(low + i/8)`` on; sign 0 is negative.
    """

    low: float
    counts: tuple[list[float], list[float]]
    largest: float  # of all channels, the magnitude that 1 stands for where there is one channel


def bins_of(sample: Sample) -> Bins:
    largest = sample.largest
    counts = torch.zeros(2, _DEPTH * _PER_OCTAVE + 1, dtype=torch.float64)
    for piece in sample.pieces():
        share = piece.x.abs() / largest
        place = (torch.log2(share) + _DEPTH).mul(_PER_OCTAVE).floor()
        inside = (place >= 0) & (share > 0)
        times = torch.ones_like(share) if piece.times is None else piece.times
        for sign, side in enumerate((piece.x < 0, piece.x > 0)):
            chosen = inside & side
            counts[sign] += torch.bincount(
                place[chosen].long().clamp_(max=_DEPTH * _PER_OCTAVE),
                weights=times[chosen].double(),
                minlength=_DEPTH * _PER_OCTAVE + 1,
            )
    negative, positive = counts.tolist()
    return Bins(-float(_DEPTH), (negative, positive), float(largest.max()))
