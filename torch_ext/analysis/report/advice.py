"""What a report says in words: what is wrong with a quantizer, and what to do about it."""

from __future__ import annotations

import glob
import json
from typing import NamedTuple

import torch

from torch_ext.analysis.report.quality import RuleLine
from torch_ext.analysis.report.quantizer_report import QuantizerReport
from torch_ext.quantizers.solve import dead_channels, listed

# When something is worth a word.
_FEW = 1000  # values of an activation
_OUTLIER = 0.5  # of the range, left to 0.01 % of the values
_APART = 2.0  # the largest channel over the second largest
_CLIPPED = 0.01  # share of the values
_BETTER, _MUCH_BETTER = 1.0, 3.0  # dB
_POOR, _FINE = 15.0, 40.0  # dB
_USUAL = "percentile(99.99)"


class Note(NamedTuple):
    """`flag` is the word in the table; a hint has none and is no warning."""

    flag: str
    text: str


def notes(subject: QuantizerReport) -> list[Note]:
    """The most serious first."""
    found = [*_data_notes(subject)]
    if subject.params.solved:
        found += _range_notes(subject)
    return sorted(found, key=lambda note: not note.flag)


def _data_notes(subject: QuantizerReport) -> list[Note]:
    params, given = subject.params, subject.params.observer == "fixed_scale"
    finite, zeros, _, infinite, nan = subject.counts
    found = []
    if infinite or nan:
        text = (
            f"{infinite} infinite and {nan} NaN values were left out. An engine would turn them "
            "into numbers: find the operation that makes them."
        )
        found.append(Note("non-finite", text))
    if not params.solved:
        text = (
            "It has no range. Run calibration data through it, or leave its module float with "
            "qconfig=None."
        )
        return [*found, Note("no range", text)]
    if finite and finite == zeros and not given:
        text = (
            "Every value is 0, so the scale is 1. Look at the calibration data, or leave the "
            "module float with qconfig=None."
        )
        found.append(Note("dead", text))
    elif 0 < finite < _FEW and subject.of != "weight":
        text = f"Only {finite} values were seen. Calibrate on more data."
        found.append(Note("little data", text))
    if subject.bins is None and subject.of != "weight" and not given:
        text = (
            "No histogram was kept, so there is no picture. Calibrate with histogram=True in the "
            "qconfig, or give the report data."
        )
        found.append(Note("", text))
    return found


def _range_notes(subject: QuantizerReport) -> list[Note]:
    params = subject.params
    extrema = subject.statistic.extrema
    low, high = float(extrema[:, 0].min()), float(extrema[:, 1].max())
    one_sided = params.symmetric and params.quant_min >= 0
    found = []
    dead = dead_channels(params["range"], one_sided)
    if 0 < len(dead) < params.channels:
        text = (
            f"Channels {listed(dead)} of {params.channels} hold nothing to scale (scale 1). They "
            "cost nothing; pruning them saves time."
        )
        found.append(Note("", text))
    if one_sided and low < 0:
        text = f"Negative values, down to {low:.4g}, clip to 0. Take a signed or an affine grid."
        found.append(Note("clips negatives", text))
    if params.symmetric and params.quant_min < 0 and 0 <= low < high:
        text = (
            "No value is negative, so half of the grid is idle. An unsigned or affine grid would "
            "halve the step, where the engine takes one."
        )
        found.append(Note("", text))
    if subject.in_use is not None:
        found += _noise_notes(subject, subject.in_use)
    return found


def _noise_notes(subject: QuantizerReport, used: RuleLine) -> list[Note]:
    best = subject.suggestion()
    gain = best.quality.sqnr - used.quality.sqnr if best is not None else 0.0
    advice = ""
    if best is not None and gain >= _BETTER:
        advice = (
            f" {_call(subject, best)} would take {_reach(subject, best)} instead, and the SQNR "
            f"from {used.quality.sqnr:.1f} to {best.quality.sqnr:.1f} dB."
        )
    found = []
    outlier = _outlier(subject, used)
    if outlier:
        rest = (
            " No rule does better by 1 dB: the few carry much. Quantize per channel, or equalize."
        )
        found.append(Note("outlier", outlier + (advice or rest)))
    if used.quality.clipped > _CLIPPED:
        text = f"{100 * used.quality.clipped:.2g} % of the values are clipped."
        rest = " No rule does better by 1 dB, so the clipping pays."
        found.append(Note("clips" if advice else "", text + (advice or rest)))
    if not found and gain >= _MUCH_BETTER and used.quality.sqnr < _FINE:
        found.append(Note("better rule", f"Another rule leaves less noise.{advice}"))
    if not advice and used.quality.sqnr < _POOR:
        text = (
            f"The SQNR is {used.quality.sqnr:.1f} dB, and no rule does better by 1 dB. Give it "
            "more bits or more channels, or leave its module float with qconfig=None."
        )
        found.append(Note("noisy", text))
    return found


def _outlier(subject: QuantizerReport, used: RuleLine) -> str:
    """In words, that a few values take most of the range; empty where they do not."""
    if subject.channels > 1:
        return ""
    usual = next((line for line in subject.lines if line.label == _USUAL), None)
    if usual is None or not used.share > 0:
        return ""
    idle = 1 - usual.share / used.share
    if idle < _OUTLIER or used.share > 1.01:
        return ""
    who = ""
    largest = subject.largest
    if largest is not None and len(largest) > 1:
        (first, second), (index, _) = (part.tolist() for part in torch.topk(largest, 2))
        if first >= _APART * second:
            who = f"Outlier channel {index} (axis {subject.axis}) sets the scale: "
    text = f"0.01 % of the values use {100 * idle:.0f} % of the range."
    return who + text


def _call(subject: QuantizerReport, line: RuleLine) -> str:
    assert line.choice is not None
    side = "weight_observer" if subject.of == "weight" else "activation_observer"
    options = "".join(f", {key}={value!r}" for key, value in line.choice.options.items())
    pattern = json.dumps(glob.escape(subject.name))
    return f'resolve(model, {side}="{line.choice.rule}"{options}, pattern={pattern})'


def _reach(subject: QuantizerReport, line: RuleLine) -> str:
    if subject.channels > 1:
        return f"{line.share:.3g} of each channel's largest value (median)"
    low, high = line.range[0].tolist()
    return f"[{low:.4g}, {high:.4g}]"
