"""Copies ranges, qparams and statistics from a model or a file into another model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_ext import ops
from torch_ext.files.float_state_dict import float_state_dict, load_float_state_dict
from torch_ext.files.observer_params import read_observer_params
from torch_ext.files.quantizer_params import STATISTIC, Params, params_of
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.solve import Solution
from torch_ext.utils.arguments import bounded, parse_flag

_WHO = "load_observer_params"


@dataclass
class LoadReport:
    """What :func:`load_observer_params` did, by quantizer name. ``str()`` gives :meth:`text`."""

    #: The model's class, or the file.
    source: str
    #: Quantizers whose range was loaded.
    loaded: list[str] = field(default_factory=list)
    #: In the model, but not in the source.
    missing: list[str] = field(default_factory=list)
    #: In the source, but not in the model.
    unexpected: list[str] = field(default_factory=list)
    #: Not loaded, as the number or the axis of the channels or the size of the groups differs;
    #: with the difference.
    mismatched: dict[str, str] = field(default_factory=dict)
    #: Loaded for another grid or number of channels, and what was done.
    converted: dict[str, str] = field(default_factory=dict)
    #: Not loaded, because the source has no range.
    unsolved: list[str] = field(default_factory=list)
    #: Not loaded, because the model's quantizer has a given scale (``fixed_scale``), or dynamic
    #: ones.
    kept: list[str] = field(default_factory=list)
    #: Quantizers whose statistic was not loaded, and why.
    statistics_skipped: dict[str, str] = field(default_factory=dict)
    #: Keys of the float tensors that were loaded.
    weights: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def text(self, loaded: bool = False) -> str:
        """Counts, and the names of quantizers whose range was not loaded.

        Args:
            loaded: list the other names too: loaded, converted, statistics that were not loaded and
                float tensors.
        """
        lines = [
            f"observer parameters from {self.source}: {len(self.loaded)} loaded, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.mismatched)} mismatched"
        ]
        if self.weights:
            lines[0] += f", {len(self.weights)} float tensors"
        groups: dict[str, list[str] | dict[str, str]] = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": self.mismatched,
            "without a range": self.unsolved,
            "kept": self.kept,
        }
        if loaded:
            groups |= {
                "loaded": self.loaded,
                "converted": self.converted,
                "statistics not loaded": self.statistics_skipped,
                "float tensors": self.weights,
            }
        for label, names in groups.items():
            reasons = names if isinstance(names, dict) else dict.fromkeys(names, "")
            lines += [
                f"  {label}: {name}" + (f" ({reason})" if reason else "")
                for name, reason in reasons.items()
            ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def load_observer_params(
    from_model: nn.Module | PathLike,
    to_model: nn.Module,
    weights: bool = False,
    strict: bool = True,
    verbose: bool = True,
) -> LoadReport:
    """Copies ranges, quantization parameters and statistics, by quantizer name.

    The observers' rules may differ. If the grids differ, scale and zero point are computed from the
    range. A per-tensor range is copied to every channel; per-channel ranges are joined to their
    least and greatest end for a per-tensor quantizer. Statistics are copied if channels and
    histogram layout agree. A quantizer with a given scale (``fixed_scale``) keeps it,
    and one whose scales are dynamic has nothing to load or to give.

    A weight's range is replaced by that of the model's own weight when the model enters VALIDATION,
    or now if it is in VALIDATION, except where it is learned, frozen or held (by
    :func:`reconstruct`, and on the same grid; a quantizer that learns starts from that range).
    Ranges of weights in ``from_model`` are first solved from its present weights.

    Args:
        from_model: a prepared model, or the path of a file of :func:`save_observer_params`.
        to_model: the prepared model to load into.
        weights: copy the float weights and buffers too; only from a model.
        strict: raise for missing, unexpected and mismatched quantizers, before anything changes.
            False loads the others.
        verbose: print the report.

    Returns:
        The report; ``report.text(loaded=True)`` lists the loaded quantizers too.

    Raises:
        TypeError: ``to_model`` is no module, ``from_model`` neither a module nor a path, or a flag
            no bool.
        ValueError: no quantizers, no ranges to load, ``weights`` with a file, or with ``strict``
            quantizers that do not match.
        FileError: a file with invalid contents.
        OSError: a file that cannot be read.
    """
    for flag, value in (("weights", weights), ("strict", strict), ("verbose", verbose)):
        parse_flag(_WHO, flag, value)
    to_prepared = PreparedModel(_WHO, to_model, "to_model")
    target = to_prepared.quantizers
    if isinstance(from_model, nn.Module):
        label = type(from_model).__name__
        from_prepared = PreparedModel(_WHO, from_model, "from_model")
        from_prepared.refresh_weights()
        source = {
            name: params_of(quantizer) for name, quantizer in from_prepared.quantizers.items()
        }
    elif isinstance(from_model, (str, os.PathLike)):
        label, source = os.fspath(from_model), read_observer_params(from_model)
        if weights:
            raise ValueError(
                f"{_WHO}: expected weights to be False with a file, got True: a file has no weights"
            )
    else:
        raise TypeError(
            f"{_WHO}: expected from_model to be a model or a file, got {bounded(from_model)}"
        )
    if not any(params.solved or params.rangeless for params in source.values()):
        raise ValueError(
            f"{_WHO}: expected from_model to have ranges, got none in {label}; a model in "
            "CALIBRATION gets them when it leaves that state"
        )

    report = LoadReport(label)
    changes = _changes(source, target, report)
    if strict and not report.complete:
        raise ValueError(
            f"{_WHO}: expected the same quantizers on both sides (check the qconfigs, or pass "
            f"strict=False)\n{report}"
        )
    if weights and isinstance(from_model, nn.Module):
        state = float_state_dict(from_model)
        load_float_state_dict(to_model, state, strict)
        report.weights = list(state)
    for change in changes:
        change.apply()
    to_prepared.refresh_validating_weights()
    if verbose:
        print(report)
    return report


@dataclass(frozen=True)
class _Change:
    """What is copied into a quantizer of the model, once all checks have passed."""

    quantizer: FakeQuantize
    solution: Solution | None
    held: bool
    statistic: Mapping[str, Tensor]
    synced: bool

    @torch.no_grad()
    def apply(self) -> None:
        if self.solution is not None:
            self.quantizer.take_(self.solution)
            if self.held:
                self.quantizer.hold_range()
        for name, value in self.statistic.items():
            self.quantizer.get_buffer(name).copy_(value)
            self.quantizer.observer.synced = self.synced


def _changes(
    source: Mapping[str, Params], target: Mapping[str, FakeQuantize], report: LoadReport
) -> list[_Change]:
    """What to copy, by comparing names, channels and grids; fills the report."""
    report.missing = [name for name in target if name not in source]
    report.unexpected = [name for name in source if name not in target]
    changes = []
    for name in target:
        if name not in source:
            continue
        params, quantizer = source[name], target[name]
        if problem := _mismatch(params, quantizer):
            report.mismatched[name] = problem
            continue
        solution = None
        if quantizer.observer.statistic == "none":
            report.kept.append(name)
        elif not params.solved:
            report.unsolved.append(name)
        else:
            solution, note = _convert(params, params_of(quantizer))
            report.loaded.append(name)
            if note:
                report.converted[name] = note
        statistic, skipped = _statistic(params, params_of(quantizer))
        if skipped:
            report.statistics_skipped[name] = skipped
        # Converted to another grid, the range is no reason to keep it.
        held = params.held and name not in report.converted
        changes.append(_Change(quantizer, solution, held, statistic, params.synced))
    return changes


def _mismatch(params: Params, quantizer: FakeQuantize) -> str:
    """Why the range cannot be loaded: other channels or groups; else empty."""
    observer = quantizer.observer
    if params.group_size != observer.group_size:
        return f"{params.groups} for {params_of(quantizer).groups}"
    if params.group_size is not None and params.channels != observer.channel_len:
        return f"{params.channels} groups for {observer.channel_len}"
    have, want = params.channels, observer.channel_len
    if 1 not in (have, want) and have != want:
        return f"{have} channels for {want}"
    if params.ch_axis >= 0 and observer.ch_axis >= 0 and params.ch_axis != observer.ch_axis:
        return f"channels on axis {params.ch_axis} for axis {observer.ch_axis}"
    return ""


def _convert(params: Params, target: Params) -> tuple[Solution, str]:
    """The range and qparams for the target's grid and channels, and a note of what changed."""
    count = target.channels
    if params.grid == target.grid and params.channels in (1, count):
        tensors = (params[name] for name in ("range", "scale", "zero_point"))
        solution = Solution(*(tensor.expand(count, *tensor.shape[1:]) for tensor in tensors))
        return solution, "" if params.channels == count else f"one range for {count} channels"
    range_, notes = params["range"], []
    if params.channels != count:
        joined = torch.stack([range_[:, 0].min(), range_[:, 1].max()]).unsqueeze(0)
        range_ = joined if count == 1 else range_.expand(count, 2).contiguous()
        notes.append(f"{params.channels} ranges for {count}")
    if params.grid != target.grid:
        notes.append(f"{_grid_text(params)} to {_grid_text(target)}")
    return Solution(range_, *ops.qparams(range_, grid=target.grid)), "; ".join(notes)


def _grid_text(params: Params) -> str:
    kind = "symmetric" if params.symmetric else "affine"
    more = "" if params.scale_rule == "grid" else f" {params.scale_rule}"
    more += " power of two" if params.power_of_two else ""
    return f"{params.values} {kind}{more}"


def _statistic(params: Params, target: Params) -> tuple[dict[str, Tensor], str]:
    """The statistic in the target's layout, or no tensors and the reason."""
    if params.rangeless or target.rangeless:
        return {}, "dynamic scales"
    extrema, tally, counts = (params[name] for name in STATISTIC)
    want = target["observer.counts"]
    if params.channels != target.channels or params.ch_axis != target.ch_axis:
        return {}, "other channels"
    if want.numel() == 0:
        # Tiny means below the histogram's window; without a histogram nothing is.
        tally = tally.clone()
        tally[:, 2] = 0
        counts = want
    elif counts.shape != want.shape:
        have = list(counts.shape) if counts.numel() else "none"
        return {}, f"histogram {have} for {list(want.shape)}"
    return dict(zip(STATISTIC, (extrema, tally, counts), strict=True)), ""
