"""The findings of a report: what is wrong with a quantizer, and what to do about it."""

from __future__ import annotations

import glob
import json
from typing import NamedTuple

import torch

from torch_ext.analysis.report.quality import RuleLine
from torch_ext.analysis.report.quantizer_report import QuantizerReport
from torch_ext.quantizers.solve import dead_channels, listed
from torch_ext.utils.mask_values import mask_fill

# The limits from which on something is a finding.
_FEW = 1000  # fewer values of an activation are too few
_OUTLIER = 0.5  # share of the range that only 0.01 % of the values need
_APART = 2.0  # the largest channel's magnitude over the second largest one's
_CLIPPED = 0.01  # share of the values that are clipped
_BETTER, _MUCH_BETTER = 1.0, 3.0  # dB of SQNR that another rule gains
_POOR, _FINE = 15.0, 40.0  # dB of SQNR
_USUAL = "percentile(99.99)"  # the rule that leaves out 0.01 % of the values


class Note(NamedTuple):
    """A finding: `flag` is its word in the table; empty for a hint, which is no warning."""

    flag: str
    text: str


def notes(subject: QuantizerReport) -> list[Note]:
    """The findings about a quantizer, warnings before hints."""
    all_notes = _data_notes(subject)
    if subject.params.solved:
        all_notes += _range_notes(subject)
    return sorted(all_notes, key=lambda note: not note.flag)


def _data_notes(subject: QuantizerReport) -> list[Note]:
    """Findings about the values that were seen, and a missing range."""
    # The range of fixed_scale does not depend on the values.
    params = subject.params
    fixed = params.observer == "fixed_scale" or params.is_dynamic
    finite, zeros, _, infinite, nan = subject.counts
    data_notes = []
    if infinite or nan:
        text = (
            f"{infinite} infinite and {nan} NaN values were left out. An engine would turn them "
            "into numbers: find the operation that makes them. If it is a mask, leave its module "
            "float with qconfig=None."
        )
        data_notes.append(Note("non-finite", text))
    if params.rangeless:
        return data_notes
    if not params.solved:
        text = (
            "It has no range. Run calibration data through it, or leave its module float with "
            "qconfig=None."
        )
        return [*data_notes, Note("no range", text)]
    if finite and finite == zeros and not fixed:
        text = (
            "Every value is 0, so the scale is 1. Look at the calibration data, or leave the "
            "module float with qconfig=None."
        )
        data_notes.append(Note("dead", text))
    elif 0 < finite < _FEW and subject.of != "weight":
        text = f"Only {finite} values were seen. Calibrate on more data."
        data_notes.append(Note("little data", text))
    if subject.bins is None and subject.of != "weight" and not fixed:
        text = (
            "No histogram was kept, so there is no picture. Calibrate with histogram=True in the "
            "qconfig, or give the report data."
        )
        data_notes.append(Note("", text))
    return data_notes


def _range_notes(subject: QuantizerReport) -> list[Note]:
    """Findings about the range and the grid of a solved quantizer."""
    params = subject.params
    extrema = subject.statistic.extrema
    low, high = float(extrema[:, 0].min()), float(extrema[:, 1].max())
    one_sided = params.symmetric and params.quant_min >= 0
    range_notes = []
    if fill := mask_fill(low, high):
        text = (
            f"Its values reach {fill}, as masks do, which leaves no levels for data. Leave the "
            "module that reads the mask float with qconfig=None."
        )
        range_notes.append(Note("mask", text))
    dead = dead_channels(params["range"], one_sided)
    if 0 < len(dead) < params.channels:
        kind = "Channels" if params.group_size is None else "Groups"
        text = (
            f"{kind} {listed(dead)} of {params.channels} hold nothing to scale (scale 1). They "
            "cost no accuracy; pruning them saves time."
        )
        range_notes.append(Note("", text))
    if one_sided and low < 0:
        text = f"Negative values, down to {low:.4g}, clip to 0. Use a signed or an affine grid."
        range_notes.append(Note("clips negatives", text))
    if params.symmetric and params.quant_min < 0 and 0 <= low < high and not params.is_float:
        text = (
            "No value is negative, so half of the grid is idle. An unsigned or affine grid would "
            "halve the step, if the engine supports it."
        )
        range_notes.append(Note("", text))
    if subject.in_use is not None:
        range_notes += _noise_notes(subject, subject.in_use)
    return range_notes


def _noise_notes(subject: QuantizerReport, used: RuleLine) -> list[Note]:
    """Findings about the noise of the range in use, compared with that of the other rules."""
    best = subject.suggestion()
    gain = best.quality.sqnr - used.quality.sqnr if best is not None else 0.0
    advice = ""
    if best is not None and gain >= _BETTER:
        advice = (
            f" {_call(subject, best)} would take {_reach(subject, best)} instead, and the SQNR "
            f"from {used.quality.sqnr:.1f} to {best.quality.sqnr:.1f} dB."
        )
    noise_notes = []
    outlier = _outlier(subject, used)
    if outlier:
        otherwise = (
            " No rule gains 1 dB, because these few values carry much of the signal. Quantize per "
            "channel, or equalize the channels."
        )
        noise_notes.append(Note("outlier", outlier + (advice or otherwise)))
    if used.quality.clipped > _CLIPPED:
        text = f"{100 * used.quality.clipped:.2g} % of the values are clipped."
        otherwise = " No rule gains 1 dB, so this clipping lowers the error."
        noise_notes.append(Note("clips" if advice else "", text + (advice or otherwise)))
    if not noise_notes and gain >= _MUCH_BETTER and used.quality.sqnr < _FINE:
        noise_notes.append(Note("better rule", f"Another rule leaves less noise.{advice}"))
    if not advice and used.quality.sqnr < _POOR:
        text = (
            f"The SQNR is {used.quality.sqnr:.1f} dB, and no rule gains 1 dB. Give it more bits or "
            "more channels, or leave its module float with qconfig=None."
        )
        noise_notes.append(Note("noisy", text))
    return noise_notes


def _outlier(subject: QuantizerReport, used: RuleLine) -> str:
    """Says that 0.01 % of the values take most of the range; empty if they do not."""
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
    """The call of `resolve` that solves the quantizer by a rule, as code."""
    assert line.choice is not None
    side = "weight_observer" if subject.of == "weight" else "activation_observer"
    options = "".join(f", {key}={value!r}" for key, value in line.choice.options.items())
    pattern = json.dumps(glob.escape(subject.name))
    return f'resolve(model, {side}="{line.choice.rule}"{options}, pattern={pattern})'


def _reach(subject: QuantizerReport, line: RuleLine) -> str:
    """A rule's range in words: its ends, or per channel its share of the largest value."""
    if subject.channels > 1:
        return f"{line.share:.3g} of each channel's largest value (median)"
    low, high = line.range[0].tolist()
    return f"[{low:.4g}, {high:.4g}]"
