"""Measures how well a range, or that of each rule, quantizes a quantizer's data.

The data are a weight's values, or the histogram of a statistic: then each value counts as the edge
of its bin that is nearest to 0. They are quantized by the library's own ops.
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
from torch_ext.quantizers.grid import largest_step
from torch_ext.quantizers.parts.groups import rows_of

# The error curve: its number of thresholds, and how many octaves below the largest magnitude the
# least of them is.
_STEPS, _OCTAVES = 49, 6
# The picture's histogram: octaves below the largest magnitude, and bins per octave.
_DEPTH, _PER_OCTAVE = 16, 8
# Values that are processed at a time, to bound the memory.
MAX_PIECE = 2**22


class Sample(NamedTuple):
    """Values by channel, each with how often it is there."""

    x: Tensor  # float32 [C,n]
    ends: Tensor  # the least and the greatest value, float32 [C,2]
    times: Tensor | None = None  # how often each value is there, float64 [C,n]; None: once

    @property
    def largest(self) -> Tensor:
        """The largest magnitude, float32 [C,1]; 0 for a channel without values."""
        return self.ends.abs().amax(1, keepdim=True)

    def pick(self, channels: Tensor, step: int = 1) -> Sample:
        """Every `step`-th value of some channels (int64 indices)."""
        times = None if self.times is None else self.times[channels, ::step]
        return Sample(self.x[channels, ::step], self.ends[channels], times)

    def pieces(self) -> Iterator[Sample]:
        """The sample in parts of at most ``MAX_PIECE`` values."""
        width = max(1, MAX_PIECE // len(self.x))
        for begin in range(0, self.x.shape[1], width):
            part = slice(begin, begin + width)
            times = None if self.times is None else self.times[:, part]
            yield Sample(self.x[:, part], self.ends, times)


class Statistic(NamedTuple):
    """An observer's statistic, on the CPU."""

    extrema: Tensor  # the least and the greatest value, float32 [C,2]
    tally: Tensor  # how many were finite, zero, tiny, infinite and NaN, int64 [C,5]
    counts: Tensor  # the histogram by sign, octave and bin, int64 [C,2,octaves,bins]

    def pick(self, channels: Tensor) -> Statistic:
        """The statistic of some channels (int64 indices)."""
        return Statistic(*(part[channels] for part in self))


@dataclass(frozen=True)
class Quality:
    """How well values are quantized; `clipped` and `to_zero` are shares from 0 to 1."""

    clipped: float  # values that are more than half a step from their quantized value
    to_zero: float  # values other than 0 that are quantized to 0
    sqnr: float  # signal to quantization noise ratio in dB; NaN if all values are 0
    cosine: float  # of the angle between values and quantized values; NaN if either is all 0


class Sums:
    """Accumulates values and their quantized values, for a :class:`Quality`."""

    def __init__(self) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64)

    def add(self, x: Tensor, out: Tensor, step: Tensor, times: Tensor | None = None) -> None:
        """Adds values that are finite and stay so; others count as 0 quantized to 0.

        Args:
            x: the values.
            out: their quantized values, of the same shape.
            step: the largest step of the grid, broadcastable to x.
            times: how often each value is there; None: once.
        """
        x, out = x.double(), out.double()
        if not bool((x.isfinite() & out.isfinite()).all()):
            finite = x.isfinite() & out.isfinite()
            x, out = torch.where(finite, x, 0), torch.where(finite, out, 0)
        error = (x - out).abs()
        # Rounding is off by half a step at most, and the float32 result by an ulp more.
        flags = [torch.ones_like(x), error > 0.50001 * step, (out == 0) & (x != 0)]
        terms = [*flags, error.square(), x.square(), out.square(), x * out]
        weighted = [term if times is None else term * times for term in terms]
        self._sums += torch.stack([term.double().sum() for term in weighted]).cpu()

    def quality(self) -> Quality:
        """The quality over everything added so far."""
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
    """A rule's range on the quantizer's grid, and how well it quantizes the quantizer's data."""

    label: str
    choice: Choice | None  # the rule; None for the range that is in use
    range: Tensor  # float32 [C,2]
    # The largest magnitude in the range over that in the channel's data; median of the channels.
    share: float
    quality: Quality


def weight_rows(weight: Tensor, ch_axis: int, group_size: int | None = None) -> Tensor:
    """A weight as one channel (`ch_axis` -1: one), or with `group_size` one group, a row."""
    if group_size is not None:
        return rows_of(weight, ch_axis, group_size)
    return weight.movedim(ch_axis, 0).flatten(1) if ch_axis >= 0 else weight.reshape(1, -1)


def weight_sample(weight: Tensor, ch_axis: int, group_size: int | None = None) -> Sample:
    """The values of a weight by channel or group; those not finite are there 0 times."""
    x = weight_rows(weight.float(), ch_axis, group_size)
    if x.shape[1] == 0:
        return Sample(x, torch.zeros(len(x), 2))
    finite = x.isfinite()
    x = torch.where(finite, x, 0)
    ends = torch.stack([x.amin(1), x.amax(1)], 1)
    return Sample(x, ends, None if bool(finite.all()) else finite.double())


def histogram_sample(statistic: Statistic) -> Sample | None:
    """The values that a histogram counted; None without a histogram or data.

    Each bin gives its edge nearest to 0, as often as it counted; tiny values count as 0.
    """
    extrema, tally, counts = statistic
    channels, _, octaves, bins = counts.shape
    if not octaves or not bool((tally[:, 0] > 0).any()):
        return None
    ends = torch.where(tally[:, :1] > 0, extrema, 0)
    largest = ends.abs().amax(1)
    # Octave e is kept in slot e mod `octaves`, and the highest octave is the largest value's.
    top = torch.frexp(largest.double()).exponent - 1
    octave = top[:, None] - torch.remainder(top[:, None] - torch.arange(octaves), octaves)
    mantissa = 1 + torch.arange(bins, dtype=torch.float64) / bins
    shape = (channels, octaves, bins)
    edges = torch.ldexp(mantissa.expand(shape), octave[:, :, None].expand(shape)).flatten(1)
    x = torch.cat([-edges, edges, torch.zeros(channels, 1, dtype=torch.float64)], 1)
    times = torch.cat([counts.flatten(1), tally[:, 1:3].sum(1, keepdim=True)], 1)
    held = (times > 0).any(0)
    # An empty bin's edge may be too large for float32, and inf * 0 is NaN.
    x = torch.where(times > 0, x, 0)
    return Sample(x[:, held].float(), ends, times[:, held].double())


def quality_of(sample: Sample, scale: Tensor, zero_point: Tensor, params: Params) -> Quality:
    """The quality with a scale and a zero point [C] each, on the grid of `params`."""
    sums = Sums()
    step = scale[:, None] * largest_step(params.spec["dtype"])
    for piece in sample.pieces():
        out = _quantized(piece.x, scale, zero_point, params)
        sums.add(piece.x, out, step, piece.times)
    return sums.quality()


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, params: Params) -> Tensor:
    """Fake-quantizes x [C,n] by channel."""
    axis = 0 if len(scale) > 1 else -1
    return ops.fake_quant(x, scale, zero_point, ch_axis=axis, grid=params.grid)


def _supports(rule: str, params: Params) -> bool:
    """Whether a rule is defined for the grid of `params`."""
    info = observer_info(rule)
    if params.is_float:
        return not info["only_integers"]
    return info["max_bits"] >= (params.quant_max - params.quant_min).bit_length()


def rule_lines(sample: Sample, statistic: Statistic, params: Params) -> list[RuleLine]:
    """Solves every rule that supports the grid, and measures its range on the sample.

    Rules have their default options, the quantizer's own rule its options; that rule comes first.
    """
    current = choice(params.observer, params.spec["options"])
    names = dict.fromkeys([current.rule, *rules_that_look()])
    choices = [current if name == current.rule else choice(name, {}) for name in names]
    choices = [candidate for candidate in choices if _supports(candidate.rule, params)]
    many = len(choices)
    extrema, tally, counts = statistic
    no_counts = counts[:, :, :0, :0]
    reads = [observer_info(candidate.rule)["statistic"] == "histogram" for candidate in choices]
    solutions = ops.solve_many(
        [candidate.rule for candidate in choices],
        [extrema] * many,
        [tally] * many,
        [counts if reads_counts else no_counts for reads_counts in reads],
        options=[candidate.options for candidate in choices],
        grids=[params.grid] * many,
    )
    return [
        line_of(str(candidate), candidate, sample, params, *solution)
        for candidate, *solution in zip(choices, *solutions, strict=True)
    ]


def line_of(
    label: str,
    candidate: Choice | None,
    sample: Sample,
    params: Params,
    range_: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> RuleLine:
    """Measures a range [C,2], with its scale and zero point [C], on the sample."""
    shares = range_.double().abs().amax(1, keepdim=True) / sample.largest.double()
    shares = shares[shares.isfinite()]
    share = float(shares.median()) if len(shares) else math.nan
    return RuleLine(label, candidate, range_, share, quality_of(sample, scale, zero_point, params))


def error_curve(sample: Sample, params: Params) -> list[tuple[float, float]]:
    """The squared error by threshold: pairs of a threshold and an error in dB.

    A threshold is a share of the channel's largest magnitude. The range of a threshold T is
    [clamp(min, -T, T), clamp(max, -T, T)], as in the rules that search for one. The error is
    relative to the sum of the squared values.
    """
    x, largest = sample.x, sample.largest.double()
    times = torch.ones(1, 1, dtype=torch.float64) if sample.times is None else sample.times
    power = float((x.double().square() * times).sum())
    shares = torch.logspace(-_OCTAVES, 0, _STEPS, base=2, dtype=torch.float64)
    curve = []
    for share in shares.tolist():
        reach = (largest * share).float()
        range_ = sample.ends.clamp(-reach, reach)
        out = _quantized(x, *ops.qparams(range_, grid=params.grid), params)
        noise = float(((x.double() - out).square() * times).sum())
        if power > 0 and noise > 0:
            curve.append((share, 10 * math.log10(noise / power)))
    return curve


class Bins(NamedTuple):
    """A histogram of magnitudes, relative to their channel's largest, in bins of 1/8 octave.

    ``counts[sign][i]`` is the number of values from ``2^(low + i/8)`` up to the next bin; sign 0
    is negative.
    """

    low: float  # octave of the first bin
    counts: tuple[list[float], list[float]]
    largest: float  # the largest magnitude of all channels; with one channel, that of octave 0


def bins_of(sample: Sample) -> Bins:
    """The histogram of all channels of a sample."""
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
