"""The picture of one quantizer: its histogram, every rule's threshold, and the error curve."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch_ext.analysis.report.quality import Bins, RuleLine
from torch_ext.analysis.report.quantizer_report import QuantizerReport
from torch_ext.analysis.rule_choices import rules_that_look
from torch_ext.analysis.svg import COLOURS, GREY, Svg

# Pixels.
_LEFT, _WIDTH = 58.0, 640.0  # of both charts
_TOP, _HIGH = 18.0, 170.0  # top and height of the histogram
_GAP, _LOW = 26.0, 96.0  # the space between histogram and error curve, and the height of the curve
_NEGATIVE, _POSITIVE = "#b9a3c9", "#8fb3d9"
_OCTAVES = 12.0  # how far below the largest magnitude the charts begin


def colour_of(line: RuleLine) -> str:
    """A rule's colour; black for the range in use and for rules that do not look at the data."""
    rules = rules_that_look()
    if line.choice is None or line.choice.rule not in rules:
        return "#111"
    return COLOURS[rules.index(line.choice.rule) % len(COLOURS)]


def picture(subject: QuantizerReport) -> str:
    """The picture as an ``<svg>`` element; empty if there are no values to show."""
    bins = subject.bins
    if bins is None or not any(map(sum, bins.counts)):
        return ""
    return _Picture(subject, bins).draw()


class _Picture:
    """Draws a histogram and an error curve below it, on the same horizontal axis.

    The axis is the magnitude in octaves (log2), relative to the channel's largest, which is at 0.
    """

    def __init__(self, subject: QuantizerReport, bins: Bins) -> None:
        self.subject = subject
        self.bins = bins
        lines = [*subject.lines, *([subject.in_use] if subject.in_use else [])]
        self.lines = [line for line in lines if line.share > 0]
        reach = max((math.log2(line.share) for line in self.lines), default=0.0)
        self.right = min(max(reach, 0.0), 3.0) + 0.15
        self.left = -_OCTAVES
        most = max(max(side) for side in bins.counts)
        self.decades = max(1.0, math.ceil(math.log10(most) + 0.05))
        self.svg = Svg(_LEFT + _WIDTH + 12, _TOP + _HIGH + _GAP + _LOW + 40, subject.name)

    def draw(self) -> str:
        self._histogram()
        self._curve()
        bottom = _TOP + _HIGH + (_GAP + _LOW if self.subject.curve else 0)
        for line in self.lines:
            place = math.log2(line.share)
            if self.left <= place <= self.right:
                width, dashes = (2.5, "") if line.choice is None else (1.5, "5 3")
                x = self._x(place)
                self.svg.line([(x, _TOP), (x, bottom)], colour_of(line), width, dashes)
        self._magnitudes(bottom)
        return self.svg.render()

    def _x(self, octave: float) -> float:
        """The position of a magnitude, cut to the chart."""
        share = (octave - self.left) / (self.right - self.left)
        return _LEFT + _WIDTH * min(max(share, 0.0), 1.0)

    def _histogram(self) -> None:
        svg, base = self.svg, _TOP + _HIGH

        def y(count: float) -> float:
            return base - _HIGH * max(0.0, math.log10(max(count, 0.1)) / self.decades)

        for decade in range(int(self.decades) + 1):
            level = y(10.0**decade)
            svg.line([(_LEFT, level), (_LEFT + _WIDTH, level)], "#e4e4e4")
            if decade % max(1, round(self.decades / 6)) == 0:
                svg.text((_LEFT - 5, level + 4), f"1e{decade}" if decade else "1", "end")
        for counts, colour in zip(self.bins.counts, (_NEGATIVE, _POSITIVE), strict=True):
            steps = [(x, y(count)) for x, count in self._steps(counts)]
            if steps:
                first, last = steps[0][0], steps[-1][0]
                svg.line([(first, base), *steps, (last, base)], colour, 1, fill=colour)
        svg.text((_LEFT, _TOP - 6), "values per 1/8 octave of magnitude:")
        for place, colour, word in ((212, _NEGATIVE, "negative"), (282, _POSITIVE, "positive")):
            svg.rectangle((_LEFT + place, _TOP - 14), 9, 9, colour)
            svg.text((_LEFT + place + 13, _TOP - 6), word)

    def _steps(self, counts: list[float]) -> Iterator[tuple[float, float]]:
        """The outline of the bins inside the chart, from the first to the last with values."""
        held = [i for i, count in enumerate(counts) if count]
        for i in range(held[0], held[-1] + 1) if held else ():
            begin = self.bins.low + i / 8
            if begin >= self.left:
                yield self._x(begin), counts[i]
                yield self._x(begin + 1 / 8), counts[i]

    def _curve(self) -> None:
        if not self.subject.curve:
            return
        svg, top = self.svg, _TOP + _HIGH + _GAP
        errors = [error for _, error in self.subject.curve]
        low, high = min(errors), max(errors)
        span = max(high - low, 1.0)

        def y(error: float) -> float:
            return top + _LOW * (high - error) / span

        for error in (low, high):
            svg.line([(_LEFT, y(error)), (_LEFT + _WIDTH, y(error))], "#e4e4e4")
            svg.text((_LEFT - 5, y(error) + 4), f"{round(error)}", "end")
        points = [(self._x(math.log2(share)), y(error)) for share, error in self.subject.curve]
        svg.line(points, "#111", 1.5)
        svg.text((_LEFT, top - 6), "squared error by threshold, dB of the values' power")

    def _magnitudes(self, bottom: float) -> None:
        """The axis, with ticks at powers of ten.

        They are of the magnitude; with several channels, of its share of the channel's largest.
        """
        single = self.subject.channels == 1
        unit = self.bins.largest if single else 1.0
        words = "magnitude" if single else "magnitude / largest of its channel"
        base = math.log2(unit) if unit > 0 else 0.0
        first = math.ceil((self.left + base) * math.log10(2))
        last = math.floor((self.right + base) * math.log10(2))
        for decade in range(first, last + 1):
            x = self._x(decade / math.log10(2) - base)
            self.svg.line([(x, bottom), (x, bottom + 4)], GREY)
            self.svg.text((x, bottom + 16), f"{10.0**decade:g}", "middle")
        self.svg.line([(_LEFT, bottom), (_LEFT + _WIDTH, bottom)], GREY)
        self.svg.text((_LEFT + _WIDTH, bottom + 30), words, "end")
