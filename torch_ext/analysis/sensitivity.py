"""Which quantizers cost most: each is switched alone, on in the float model or off in the other."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_ext.analysis.measurements import Results, fingerprint
from torch_ext.analysis.svg import bar_picture
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
    """One quantizer; NaN where a way was not asked for."""

    name: str
    of: str  # "input", "output" or "weight"
    on: float  # the metric with this quantizer alone
    off: float  # the metric with all but this one
    loss: float  # how much worse `on` is than the float model
    gain: float  # how much better `off` is than the quantized model


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found, the costliest quantizer first; printed, a table."""

    rows: tuple[SensitivityRow, ...]
    floating: float
    quantized: float
    ways: tuple[Way, ...]
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
        """Writes an SVG with the bars of all quantizers, or of the costliest `most`."""
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

    In VALIDATION, in eval mode and without gradients, always from the same random state; with n
    quantizers and both ways the data is run over 2n + 2 times. Afterwards the model is what it
    was::

        found = sensitivity(model, batches)             # how far from the float outputs
        found = sensitivity(model, loader, accuracy)    # accuracy(model, loader) gives a number

    Args:
        model: calibrated.
        data: what ``metric`` takes; without one, batches as ``calibrate`` takes them, which can be
            run over again (a list, a DataLoader without shuffling).
        metric: called with model and data, gives a number. By default the squared error of the
            model's floating outputs over the float model's, divided by the sum of the squares of
            the latter, which are kept: about additive, and lower is better.
        ways: ``"on"`` (it alone), ``"off"`` (all but it), or both.
        pattern: of the quantizers to switch, as in ``set_fake_quantize``.
        higher_is_better: whether a high ``metric`` is good.
        forward, device: of the default metric, as in ``calibrate``.
        progress: a bar; by default where standard error is a terminal.
        checkpoint: a file that keeps the numbers found so far, as in ``sweep``.

    Raises TypeError where the metric is no number or data cannot be run over again; RuntimeError
    where a quantizer has no range.
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
        active = {name: q for name, q in quantizers.items() if not q.passes_through}
        run = _SensitivityRun(model, active, data, results)
        run.begin(metric, forward or default_forward(_WHO), where)
        switches = [(n, way) for n in chosen if n in active for way in chosen_ways]
        for name, way in progress_bar(switches, len(switches), _WHO, progress):
            run.switch(name, way)
    results.finish()
    sign = 1.0 if metric is None or not higher_is_better else -1.0
    rows = [run.row(name, sign) for name in chosen if name in active]
    rows.sort(key=lambda row: _order(row, chosen_ways))
    title = "relative squared error of the outputs" if metric is None else _name(metric)
    return Sensitivity(tuple(rows), run.floating, run.quantized, chosen_ways, title)


class _SensitivityRun:
    """The measurements of one run, in VALIDATION."""

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
        own, others = FakeQuantState.VALIDATION, FakeQuantState.FLOAT
        if way == "off":
            own, others = others, own
        self._enter(self.active, others)
        self._enter([name], own)
        self.measured[f"{way} {name}"] = self.results.measure(f"{way} {name}", self._call)

    def row(self, name: str, sign: float) -> SensitivityRow:
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
    """The highest loss first, then the highest gain; what broke the model before all."""
    values = [row.loss if way == "on" else row.gain for way in ways]
    return tuple((not math.isnan(value), -value) for value in values)


class _OutputError:
    """Squared error of the model's floating outputs, relative to the float model's."""

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
        for batch in data:
            out = self._forward(model, to_device(batch, self._device))
            yield from (tensor for tensor in tensors_in(out) if tensor.is_floating_point())
