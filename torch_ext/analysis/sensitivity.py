"""Measures the cost of each quantizer: on alone in the float model, off alone in the quantized."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_ext.analysis.svg import bar_picture
from torch_ext.files.measurements import Results, fingerprint
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import Pattern, PreparedModel, role_of
from torch_ext.quantizers.restore import restored
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import bounded, check_callable, parse_flag
from torch_ext.utils.batches import (
    Forward,
    check_batches,
    default_forward,
    model_device,
    tensors_in,
    to_device,
)
from torch_ext.utils.modes import eval_mode, forked_rng
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import text_table

_WHO = "sensitivity"
Way = Literal["on", "off"]
_WAYS: tuple[Way, ...] = ("on", "off")
Metric = Callable[[nn.Module, Any], Any]


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

    def __str__(self) -> str:
        header = ["quantizer", "of"]
        header += ["alone", "loss"] * ("on" in self.ways) + ["all but it", "gain"] * (
            "off" in self.ways
        )
        rows = []
        for row in self.rows:
            cells = [row.name, row.of]
            cells += [f"{row.on:.4g}", f"{row.loss:+.4g}"] * ("on" in self.ways)
            cells += [f"{row.off:.4g}", f"{row.gain:+.4g}"] * ("off" in self.ways)
            rows.append(cells)
        text = f"{self.metric}: float {self.floating:.4g}, quantized {self.quantized:.4g}\n"
        return text + text_table(header, rows)

    def save_picture(self, path: PathLike, most: int | None = None) -> None:
        """Writes an SVG with bars of loss and gain.

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
            (row.name, [float(getattr(row, fields[way])) for way in self.ways], row.of)
            for row in self.rows[:most]
        ]
        title = f"{_WHO}: {self.metric}, float {self.floating:.4g}, quantized {self.quantized:.4g}"
        picture = bar_picture(title, [words[way] for way in self.ways], bars)
        write_atomically(path, picture.encode())


def sensitivity(
    model: nn.Module,
    data: Any,
    metric: Metric | None = None,
    *,
    ways: Way | Sequence[Way] = _WAYS,
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
        print(result)

    Args:
        model: calibrated.
        data: the second argument of ``metric``. Without a metric: batches as ``calibrate`` takes
            them, which can be run over again (a list, a DataLoader without shuffling).
        metric: a function of model and data that returns a number. By default the squared error of
            the model's floating outputs, divided by the sum of squares of the float model's
            outputs, which stay in memory. Lower is then better, and the errors of quantizers about
            add up.
        ways: ``"on"`` (this quantizer alone), ``"off"`` (all but this one), or both (default).
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
            another run.
        RuntimeError: if a quantizer has no range.
    """
    prepared = PreparedModel(_WHO, model)
    quantizers, chosen = prepared.quantizers, prepared.select(pattern)
    chosen_ways = _parse_ways(ways)
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
        active = {
            name: quantizer
            for name, quantizer in quantizers.items()
            if not quantizer.passes_through
        }
        run = _SensitivityRun(model, active, data, results)
        run.begin(metric, forward or default_forward(_WHO), where)
        switches = [(name, way) for name in chosen if name in active for way in chosen_ways]
        for name, way in progress_bar(switches, len(switches), _WHO, progress):
            run.switch(name, way)
    results.finish()
    sign = 1.0 if metric is None or not higher_is_better else -1.0
    rows = [run.row(name, sign) for name in chosen if name in active]
    rows.sort(key=lambda row: _order(row, chosen_ways))
    title = "relative squared error of the outputs" if metric is None else _name(metric)
    return Sensitivity(tuple(rows), run.floating, run.quantized, chosen_ways, title)


class _SensitivityRun:
    """The measurements of one call; `active` are the quantizers that quantize, by name.

    Call `begin` first, then `switch`, then `row` for each quantizer.
    """

    def __init__(
        self, model: nn.Module, active: Mapping[str, FakeQuantize], data: Any, results: Results
    ) -> None:
        self.model = model
        self.active = active
        self.data = data
        self.results = results
        self.floating = self.quantized = 0.0
        self.measured: dict[str, float] = {}

    def begin(self, metric: Metric | None, forward: Forward, device: torch.device) -> None:
        """Measures the float and the quantized model."""
        self._enter(self.active, FakeQuantState.FLOAT)
        if metric is None:
            error = _OutputError(self.model, self.data, forward, device)
            self.metric: Metric = error
            self.results.measure("the power of the float outputs", lambda: error.power)
        else:
            self.metric = metric
            self.floating = self.results.measure("the float model", self._call)
        self._enter(self.active, FakeQuantState.VALIDATION)
        self.quantized = self.results.measure("the quantized model", self._call)

    def switch(self, name: str, way: str) -> None:
        """Measures with one quantizer on in the float model, or off in the quantized one."""
        state, others = FakeQuantState.VALIDATION, FakeQuantState.FLOAT
        if way == "off":
            state, others = others, state
        self._enter(self.active, others)
        self._enter([name], state)
        self.measured[f"{way} {name}"] = self.results.measure(f"{way} {name}", self._call)

    def row(self, name: str, sign: float) -> SensitivityRow:
        """A quantizer's row; `sign` is 1 if a lower metric is better, else -1."""
        on, off = (self.measured.get(f"{way} {name}", math.nan) for way in _WAYS)
        loss, gain = sign * (on - self.floating), sign * (self.quantized - off)
        return SensitivityRow(name, role_of(name, self.active[name]), on, off, loss, gain)

    def _enter(self, names: Iterable[str], state: FakeQuantState) -> None:
        for name in names:
            self.active[name].enter(state)

    def _call(self) -> Any:
        with forked_rng(self.model):
            return self.metric(self.model, self.data)


def _parse_ways(ways: Way | Sequence[Way]) -> tuple[Way, ...]:
    """The ways in the order of ``_WAYS``; raises ValueError for unknown ones and for none."""
    given = [ways] if isinstance(ways, str) else list(ways)
    for way in given:
        if way not in _WAYS:
            raise ValueError(f"{_WHO}: unknown way {way!r}; known: {', '.join(_WAYS)}")
    if not given:
        raise ValueError(f"{_WHO}: expected ways to be on, off or both, got none")
    return tuple(way for way in _WAYS if way in given)


def _name(metric: Metric) -> str:
    return str(getattr(metric, "__name__", type(metric).__name__))


def _order(row: SensitivityRow, ways: tuple[str, ...]) -> tuple[tuple[bool, float], ...]:
    """Sort key: NaN first (the metric is no number), then the highest loss, then the gain."""
    values = [row.loss if way == "on" else row.gain for way in ways]
    return tuple((not math.isnan(value), -value) for value in values)


class _OutputError:
    """The default metric: squared error of the floating outputs over the float model's power.

    Runs the model, which has to be in FLOAT, over the data and keeps its outputs. `power` is the
    sum of their squares. Raises TypeError for data that can be run over only once, and ValueError
    if `power` is not positive and finite.
    """

    def __init__(self, model: nn.Module, data: Any, forward: Forward, device: torch.device) -> None:
        if isinstance(data, Iterator):
            raise TypeError(
                f"{_WHO}: expected data to be batches that can be run over again, such as a list, "
                f"got {type(data).__name__}"
            )
        self._forward = forward
        self._device = device
        with forked_rng(model):
            self._wanted = list(self._outputs(model, data))
        self.power = sum(float(want.double().square().sum()) for want in self._wanted)
        if not 0 < self.power < math.inf:
            raise ValueError(
                f"{_WHO}: expected the float model's outputs to be finite and not all zero, got "
                f"{len(self._wanted)} tensors whose squares sum to {self.power:g}"
            )

    def __call__(self, model: nn.Module, data: Any) -> float:
        error = 0.0
        outputs = self._outputs(model, data)
        for have, want in itertools.zip_longest(outputs, self._wanted):
            if have is None or want is None or have.shape != want.shape:
                raise ValueError(
                    f"{_WHO}: expected data to give the same batches each time it is run over, got "
                    "outputs of other shapes"
                )
            error += float((have.double() - want.double()).square().sum())
        return error / self.power

    def _outputs(self, model: nn.Module, data: Iterable[Any]) -> Iterator[Tensor]:
        """The floating tensors in the outputs of all batches."""
        for batch in data:
            out = self._forward(model, to_device(batch, self._device))
            yield from (tensor for tensor in tensors_in(out) if tensor.is_floating_point())
