"""Measures the cost of each quantizer: on alone in the float model, off alone in the quantized."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from torch_ext.analysis.svg import bar_picture
from torch_ext.calibration.change_bits import check_bits, parse_bits
from torch_ext.calibration.restore import restored
from torch_ext.calibration.switched_model import Metric, SwitchedModel, name_of
from torch_ext.files.measurements import Results, fingerprint
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.find import Pattern, PreparedModel, role_of
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import bounded, check_callable, parse_flag
from torch_ext.utils.batches import Forward, check_batches, default_forward, model_device
from torch_ext.utils.modes import eval_mode
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import text_table

_WHO = "sensitivity"
Way = Literal["on", "off"]
_WAYS: tuple[Way, ...] = ("on", "off")


@dataclass(frozen=True)
class SensitivityRow:
    """One quantizer of a :class:`Sensitivity`; NaN for a way that was not measured."""

    #: The quantizer's name.
    name: str
    #: ``"input"``, ``"output"`` or ``"weight"``, whichever it quantizes.
    of: str
    #: The metric with this quantizer alone.
    on: float
    #: The metric with all quantizers but this one.
    off: float
    #: How much worse ``on`` is than the float model.
    loss: float
    #: How much better ``off`` is than the quantized model.
    gain: float
    #: ``loss`` at other widths: by the numbers of bits that were asked for.
    losses: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """The result of :func:`sensitivity`; as text, a table."""

    #: One per quantizer, the costliest first.
    rows: tuple[SensitivityRow, ...]
    #: The metric of the float model.
    floating: float
    #: The metric with all quantizers.
    quantized: float
    #: The ways that were measured, ``"on"``, ``"off"`` or both.
    ways: tuple[Way, ...]
    #: The metric's name.
    metric: str
    #: The numbers of bits that were measured beside the quantizers' own.
    bits: tuple[int, ...] = ()

    def __str__(self) -> str:
        header = ["quantizer", "of"]
        header += ["alone", "loss"] * ("on" in self.ways) + ["all but it", "gain"] * (
            "off" in self.ways
        )
        header += _titles(self.bits)
        rows = []
        for row in self.rows:
            cells = [row.name, row.of]
            cells += [f"{row.on:.4g}", f"{row.loss:+.4g}"] * ("on" in self.ways)
            cells += [f"{row.off:.4g}", f"{row.gain:+.4g}"] * ("off" in self.ways)
            cells += [f"{row.losses[bits]:+.4g}" for bits in self.bits]
            rows.append(cells)
        text = f"{self.metric}: float {self.floating:.4g}, quantized {self.quantized:.4g}\n"
        return text + text_table(header, rows)

    def save_picture(self, path: PathLike, most: int | None = None) -> None:
        """Writes an SVG with bars of loss and gain, and of the loss at each number of bits.

        Args:
            path: the file; appears complete or not at all.
            most: how many of the costliest quantizers to show, 1 or more; None shows all.

        Raises:
            ValueError: for another ``most``.
        """
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ValueError(f"{_WHO}: expected most to be 1 or more, got {bounded(most)}")
        words = {"on": "loss with it alone", "off": "gain without it"}
        fields = {"on": "loss", "off": "gain"}
        bars = [
            (
                row.name,
                [
                    *(float(getattr(row, fields[way])) for way in self.ways),
                    *(row.losses[bits] for bits in self.bits),
                ],
                row.of,
            )
            for row in self.rows[:most]
        ]
        title = f"{_WHO}: {self.metric}, float {self.floating:.4g}, quantized {self.quantized:.4g}"
        series = [*(words[way] for way in self.ways), *_titles(self.bits)]
        picture = bar_picture(title, series, bars)
        write_atomically(path, picture.encode())


def sensitivity(
    model: nn.Module,
    data: Any,
    metric: Metric | None = None,
    *,
    ways: Way | Sequence[Way] | None = None,
    bits: int | Sequence[int] | None = None,
    pattern: Pattern | None = None,
    higher_is_better: bool = True,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    checkpoint: PathLike | None = None,
) -> Sensitivity:
    """Measures the model with each quantizer alone, and with all quantizers but each.

    The quantizers that are on are in VALIDATION. The model is in eval mode, without gradients, and
    always starts from the same random state; afterwards it is as it was before. With n quantizers
    and both ways, the data is run over 2n + 2 times::

        result = sensitivity(model, batches)            # error relative to the float outputs
        result = sensitivity(model, loader, accuracy)   # accuracy(model, loader) gives a number
        result = sensitivity(model, batches, bits=(4, 8, 16))   # each alone, at these widths
        print(result)

    Args:
        model: calibrated.
        data: the second argument of ``metric``. Without a metric: batches as ``calibrate`` takes
            them, which can be run over again (a list, a DataLoader without shuffling).
        metric: a function of model and data that returns a number. By default the squared error of
            the model's floating outputs, divided by the sum of squares of the float model's
            outputs, which stay in memory. Lower is then better, and the errors of quantizers about
            add up.
        ways: ``"on"`` (this quantizer alone), ``"off"`` (all but this one), or both, which is the
            default unless ``bits`` are given.
        bits: numbers of bits, 2 to 16. Each quantizer is also measured alone on a grid of its kind
            with so many, solved without data from what it has seen, by its own rule; by ``min_max``
            where that does not take so many bits.
        pattern: which quantizers to switch, as in ``set_fake_quantize``; by default all.
        higher_is_better: whether a higher ``metric`` is better, by default True; the default
            metric ignores it.
        forward, device: of the default metric, as in ``calibrate``.
        progress: whether to show a progress bar; by default if standard error is a terminal.
        checkpoint: a file that keeps the numbers measured so far, as in ``sweep``.

    Returns:
        The metric and the cost of each quantizer, the costliest first.

    Raises:
        TypeError: if the metric returns no number, or data cannot be run over again.
        ValueError: for an unknown way or pattern; for data that gives other batches the second
            time; if the float model's outputs are not finite or all zero; for a checkpoint of
            another run; by name, for quantizers that cannot change to one of ``bits``: with a
            learned, given or frozen range, or a range but no statistic.
        RuntimeError: if a quantizer has no range.
    """
    prepared = PreparedModel(_WHO, model)
    quantizers, chosen = prepared.quantizers, prepared.select(pattern)
    widths = () if bits is None else parse_bits(_WHO, bits)
    chosen_ways = _parse_ways(ways, widths)
    check_callable(_WHO, "metric", metric)
    check_callable(_WHO, "forward", forward)
    if metric is None:
        check_batches(_WHO, "data", data)
    where = model_device(_WHO, model, device)
    parse_flag(_WHO, "higher_is_better", higher_is_better)
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored(quantizers))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        results = Results(_WHO, checkpoint, fingerprint(prepared))
        change_states(_WHO, model, FakeQuantState.VALIDATION)
        names = [name for name in chosen if not quantizers[name].passes_through]
        check_bits(_WHO, {name: quantizers[name] for name in names}, widths)
        run = _SensitivityRun(
            SwitchedModel(
                prepared, model, data, metric, forward or default_forward(_WHO), where, results
            )
        )
        steps = [(name, key) for name in names for key in (*chosen_ways, *widths)]
        for name, key in progress_bar(steps, len(steps), _WHO, progress):
            run.measure(name, key)
    results.finish()
    sign = 1.0 if metric is None or not higher_is_better else -1.0
    rows = [run.row(name, sign, widths) for name in names]
    rows.sort(key=lambda row: _order(row, chosen_ways))
    title = "relative squared error of the outputs" if metric is None else name_of(metric)
    floating = run.switched.floating
    return Sensitivity(tuple(rows), floating, run.quantized, chosen_ways, title, widths)


class _SensitivityRun:
    """The measurements of one call: the quantized model's first, then those of `measure`."""

    def __init__(self, switched: SwitchedModel) -> None:
        self.switched = switched
        self.quantized = switched.measure("the quantized model", switched.active)
        self.measured: dict[tuple[str, Way | int], float] = {}

    def measure(self, name: str, key: Way | int) -> None:
        """Measures one quantizer in a way, or alone at a number of bits."""
        if isinstance(key, int):
            value = self.switched.measure(f"{key} bits {name}", [name], {name: key})
        else:
            others = [other for other in self.switched.active if other != name]
            value = self.switched.measure(f"{key} {name}", [name] if key == "on" else others)
        self.measured[name, key] = value

    def row(self, name: str, sign: float, bits: Sequence[int]) -> SensitivityRow:
        """A quantizer's row; `sign` is 1 if a lower metric is better, else -1."""
        floating = self.switched.floating
        on, off = (self.measured.get((name, way), math.nan) for way in _WAYS)
        loss, gain = sign * (on - floating), sign * (self.quantized - off)
        losses = {width: sign * (self.measured[name, width] - floating) for width in bits}
        of = role_of(name, self.switched.active[name])
        return SensitivityRow(name, of, on, off, loss, gain, losses)


def _parse_ways(ways: Way | Sequence[Way] | None, bits: tuple[int, ...]) -> tuple[Way, ...]:
    """The ways in the order of ``_WAYS``; raises ValueError for unknown ones and for none."""
    if ways is None:
        return () if bits else _WAYS
    given = [ways] if isinstance(ways, str) else list(ways)
    for way in given:
        if way not in _WAYS:
            raise ValueError(f"{_WHO}: unknown way {way!r}; known: {', '.join(_WAYS)}")
    if not given and not bits:
        raise ValueError(f"{_WHO}: expected ways to be on, off or both, got none")
    return tuple(way for way in _WAYS if way in given)


def _titles(bits: Sequence[int]) -> list[str]:
    return [f"loss, {width} bits" for width in bits]


def _order(row: SensitivityRow, ways: tuple[str, ...]) -> tuple[tuple[bool, float], ...]:
    """Sort key: NaN first (the metric is no number), then the highest loss, then the gain.

    Last come the losses at few bits before those at more.
    """
    values = [row.loss if way == "on" else row.gain for way in ways]
    return tuple((not math.isnan(value), -value) for value in (*values, *row.losses.values()))
