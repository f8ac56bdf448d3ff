"""Ranges, statistics and qparams from one model, or from a file, into another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_ext import ops
from torch_ext.files.observer_params import read_observer_params
from torch_ext.files.quantizer_params import STATISTIC, Params, params_of
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.float_state_dict import float_state_dict, load_float_state_dict
from torch_ext.quantizers.solve import Solution
from torch_ext.utils.arguments import bounded, parse_flag

_WHO = "load_observer_params"


@dataclass
class LoadReport:
    """What `load_observer_params` did, by quantizer name."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the model, not in the source
    unexpected: list[str] = field(default_factory=list)  # in the source, not in the model
    mismatched: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)  # loaded, for another grid or layout
    unsolved: list[str] = field(default_factory=list)  # the source has no range
    kept: list[str] = field(default_factory=list)  # given scales (fixed_scale) stay as they are
    statistics_skipped: dict[str, str] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def text(self, loaded: bool = False) -> str:
        """Counts, and the names of what was not loaded as it is; with ``loaded`` all names."""
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
            why = names if isinstance(names, dict) else dict.fromkeys(names, "")
            lines += [f"  {label}: {n}" + (f" ({w})" if w else "") for n, w in why.items()]
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

    Works between any two observers. For another grid the parameters are computed anew from the
    range; one range serves all channels, and channels join in one range. Statistics are copied
    where their layouts agree. A quantizer with a given scale (``fixed_scale``) keeps it.

    Args:
        from_model: a prepared model, or a file of :func:`save_observer_params`.
        weights: copy the float weights and buffers too (from a model only).
        strict: raise for missing, unexpected and mismatched quantizers; nothing is changed then.
        verbose: print the report; it is returned either way, and ``report.text(loaded=True)`` has
            the names of what was loaded too.

    Raises:
        TypeError: ``to_model`` is no module, or ``from_model`` neither a module nor a path.
        ValueError: no quantizers, no ranges to load, or with ``strict`` names that do not match.
        FileError, OSError: a file that cannot be read.
    """
    for flag, value in (("weights", weights), ("strict", strict), ("verbose", verbose)):
        parse_flag(_WHO, flag, value)
    target = PreparedModel(_WHO, to_model, "to_model").quantizers
    if isinstance(from_model, nn.Module):
        label = type(from_model).__name__
        quantizers = PreparedModel(_WHO, from_model, "from_model").quantizers
        source = {name: params_of(quantizer) for name, quantizer in quantizers.items()}
    elif isinstance(from_model, (str, os.PathLike)):
        label, source = os.fspath(from_model), read_observer_params(from_model)
        if weights:
            raise ValueError(f"{_WHO}: expected weights=False with a file, which holds none")
    else:
        raise TypeError(
            f"{_WHO}: expected from_model to be a model or a file, got {bounded(from_model)}"
        )
    if not any(params.solved for params in source.values()):
        raise ValueError(
            f"{_WHO}: {label} has no ranges to load; if it is in CALIBRATION, leave that first"
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
        change.carry_out()
    if verbose:
        print(report)
    return report


@dataclass(frozen=True)
class _Change:
    quantizer: FakeQuantize
    solution: Solution | None
    statistic: Mapping[str, Tensor]
    synced: bool

    @torch.no_grad()
    def carry_out(self) -> None:
        if self.solution is not None:
            self.quantizer.take_(self.solution)
        for name, value in self.statistic.items():
            self.quantizer.get_buffer(name).copy_(value)
            self.quantizer.observer.synced = self.synced


def _changes(
    source: Mapping[str, Params], target: Mapping[str, FakeQuantize], report: LoadReport
) -> list[_Change]:
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
        changes.append(_Change(quantizer, solution, statistic, params.synced))
    return changes


def _mismatch(params: Params, quantizer: FakeQuantize) -> str:
    observer = quantizer.observer
    have, want = params.channels, observer.channel_len
    if 1 not in (have, want) and have != want:
        return f"{have} channels for {want}"
    if params.ch_axis >= 0 and observer.ch_axis >= 0 and params.ch_axis != observer.ch_axis:
        return f"channels on axis {params.ch_axis} for axis {observer.ch_axis}"
    return ""


def _convert(params: Params, target: Params) -> tuple[Solution, str]:
    """The parameters for the target's grid and channels, and what was done to them."""
    count = target.channels
    if params.grid == target.grid and params.channels in (1, count):
        parts = (params[name] for name in ("range", "scale", "zero_point"))
        solution = Solution(*(part.expand(count, *part.shape[1:]) for part in parts))
        return solution, "" if params.channels == count else f"one range for {count} channels"
    range_, notes = params["range"], []
    if params.channels != count:
        joined = torch.stack([range_[:, 0].min(), range_[:, 1].max()]).unsqueeze(0)
        range_ = joined if count == 1 else range_.expand(count, 2).contiguous()
        notes.append(f"{params.channels} ranges for {count}")
    if params.grid != target.grid:
        notes.append(f"{_grid_text(params)} to {_grid_text(target)}")
    return Solution(range_, *ops.qparams(range_, *target.grid)), "; ".join(notes)


def _grid_text(params: Params) -> str:
    kind = "symmetric" if params.symmetric else "affine"
    more = "" if params.scale_rule == "grid" else f" {params.scale_rule}"
    more += " power of two" if params.power_of_two else ""
    return f"[{params.quant_min}, {params.quant_max}] {kind}{more}"


def _statistic(params: Params, target: Params) -> tuple[dict[str, Tensor], str]:
    """The statistic as the target keeps it, or why it cannot."""
    extrema, tally, counts = (params[name] for name in STATISTIC)
    want = target["observer.counts"]
    if params.channels != target.channels or params.ch_axis != target.ch_axis:
        return {}, "other channels"
    if want.numel() == 0:
        # Without a histogram nothing is too small for its window.
        tally = tally.clone()
        tally[:, 2] = 0
        counts = want
    elif counts.shape != want.shape:
        have = list(counts.shape) if counts.numel() else "none"
        return {}, f"histogram {have} for {list(want.shape)}"
    return dict(zip(STATISTIC, (extrema, tally, counts), strict=True)), ""
