"""Which rule for this model: tries rules and options on one calibration, and measures each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_ext.analysis.measurements import Results, fingerprint
from torch_ext.analysis.rule_choices import Candidates, Choice, parse_candidates, usual_candidates
from torch_ext.analysis.svg import bar_picture
from torch_ext.calibration.resolve import plan_resolve, resolve
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import Pattern, PreparedModel
from torch_ext.quantizers.restore import restored
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.modes import eval_mode, forked_rng
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import text_table

_WHO = "sweep"
_FLOAT, _AS_IT_IS = "the float model", "the model as it is"
_SIDES = ("activation_observer", "weight_observer")


@dataclass(frozen=True)
class SweepRow:
    """One combination; None where that side was left as it is."""

    activations: Choice | None
    weights: Choice | None
    metric: float

    @property
    def label(self) -> str:
        return _label(self.activations, self.weights)


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found, best first; printed, a table."""

    rows: tuple[SweepRow, ...]
    floating: float  # the metric of the float model
    as_it_is: float  # with the rules that the model has
    higher_is_better: bool
    pattern: Pattern | None

    @property
    def best(self) -> SweepRow:
        return self.rows[0]

    def apply(self, model: nn.Module, row: SweepRow | None = None) -> None:
        """Solves the model's quantizers by a row's rules, by default the best one's."""
        chosen = self.best if row is None else row
        _solve_by(model, chosen.activations, chosen.weights, self.pattern)

    def __str__(self) -> str:
        rows = [
            [str(row.activations or ""), str(row.weights or ""), *self._numbers(row.metric)]
            for row in self.rows
        ]
        rows.append(["as it is", "as it is", *self._numbers(self.as_it_is)])
        rows.append(["float", "float", *self._numbers(self.floating)])
        shown = [i for i in range(4) if any(row[i] for row in rows[:-2])]
        header = ("activations", "weights", "metric", "to float")
        return text_table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])

    def save_picture(self, path: PathLike) -> None:
        """Writes an SVG with a bar for each row: how far its metric is from the float model's."""
        bars = [(row.label, [row.metric - self.floating], f"{row.metric:.6g}") for row in self.rows]
        bars.append(("as it is", [self.as_it_is - self.floating], f"{self.as_it_is:.6g}"))
        title = f"{_WHO}: metric, less the float model's {self.floating:.6g}"
        write_atomically(path, bar_picture(title, ["difference"], bars).encode())

    def _numbers(self, metric: float) -> list[str]:
        return [f"{metric:.6g}", f"{metric - self.floating:+.6g}"]


def sweep(
    model: nn.Module,
    evaluate: Callable[[nn.Module], Any],
    *,
    activation_observers: Candidates | None = None,
    weight_observers: Candidates | None = None,
    pattern: Pattern | None = None,
    higher_is_better: bool = True,
    progress: bool | None = None,
    checkpoint: PathLike | None = None,
) -> Sweep:
    """Measures the model with each rule and each value of its options, from one calibration.

    Every combination is solved from the statistics that the model holds, without data, and
    evaluated in VALIDATION, in eval mode and without gradients, always from the same random state.
    Afterwards the model is what it was; ``apply`` takes the best::

        rules = {"percentile": {"percentile": [99.9, 99.99]}, "kl": {}}
        found = sweep(model, accuracy, activation_observers=rules)
        print(found)
        found.apply(model)

    Args:
        model: calibrated, with histograms for the rules that read one.
        evaluate: called with the model, gives a number.
        activation_observers: names of rules, or names with options, each a value or a list of
            values. By default, unless weight_observers is given, every rule that looks at the
            data and can be solved here, with the usual values of its options.
        weight_observers: the same for weights; together with the above, every pair.
        pattern: as in ``set_fake_quantize``; the other quantizers stay as they are.
        higher_is_better: whether the best row is that of the highest metric; NaN comes last.
        progress: a bar; by default where standard error is a terminal.
        checkpoint: a file that keeps the numbers found so far; where it exists, what it holds is
            not measured again. Its model has to be the same to the bit, and the float model's
            metric, which is measured again, within 1e-6. Deleted at the end.

    Raises TypeError where a metric is no number, ValueError or RuntimeError for rules and options
    that cannot be solved here: before anything is measured.
    """
    prepared = PreparedModel(_WHO, model)
    quantizers, chosen = prepared.quantizers, prepared.select(pattern)
    if not callable(evaluate):
        raise TypeError(
            f"{_WHO}: expected evaluate to be a function of a model, got {bounded(evaluate)}"
        )
    parse_flag(_WHO, "higher_is_better", higher_is_better)
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored(quantizers))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        about = fingerprint(prepared, sorted(chosen))
        change_states(_WHO, model, FakeQuantState.VALIDATION)
        pairs = _pairs(prepared, activation_observers, weight_observers, pattern)
        run = _SweepRun(model, quantizers, evaluate, Results(_WHO, checkpoint, about), pattern)
        labels = [_FLOAT, _AS_IT_IS, *pairs]
        measured = {
            label: run.measure(label, pairs.get(label))
            for label in progress_bar(labels, len(labels), _WHO, progress)
        }
    run.results.finish()
    rows = [SweepRow(*pair, measured[label]) for label, pair in pairs.items()]
    rows.sort(key=lambda row: _order(row.metric, higher_is_better))
    floating, as_it_is = measured[_FLOAT], measured[_AS_IT_IS]
    return Sweep(tuple(rows), floating, as_it_is, higher_is_better, pattern)


_Pair = tuple[Choice | None, Choice | None]


def _label(activations: Choice | None, weights: Choice | None) -> str:
    parts = [str(activations or ""), f"weights {weights}" if weights else ""]
    return ", ".join(part for part in parts if part)


def _order(metric: float, higher_is_better: bool) -> tuple[bool, float]:
    return metric != metric, -metric if higher_is_better else metric


def _pairs(
    prepared: PreparedModel,
    activation_observers: Candidates | None,
    weight_observers: Candidates | None,
    pattern: Pattern | None,
) -> dict[str, _Pair]:
    """The combinations by label; each is known to be solvable."""

    def check(side: str, one: Choice) -> None:
        plan_resolve(prepared, **_arguments(side, one, pattern))

    lists: list[list[Choice | None]] = []
    for side, given in zip(_SIDES, (activation_observers, weight_observers), strict=True):
        found: list[Choice] = []
        if given is not None:
            found = parse_candidates(_WHO, f"{side}s", given)
            for one in found:
                try:
                    check(side, one)
                except (ValueError, RuntimeError) as error:
                    raise type(error)(f"{_WHO}: {side} {one}: {error}") from error
        elif side == _SIDES[0] and weight_observers is None:
            found = usual_candidates(lambda one: check(_SIDES[0], one))
        lists.append([*found] or [None])
    return {_label(first, second): (first, second) for second in lists[1] for first in lists[0]}


def _solve_by(
    model: nn.Module, activations: Choice | None, weights: Choice | None, pattern: Pattern | None
) -> None:
    for side, one in zip(_SIDES, (activations, weights), strict=True):
        if one is not None:
            resolve(model, **_arguments(side, one, pattern))


def _arguments(side: str, one: Choice, pattern: Pattern | None) -> dict[str, Any]:
    return {side: one.rule, "pattern": pattern, **one.options}


class _SweepRun:
    """The measurements of one sweep."""

    def __init__(
        self,
        model: nn.Module,
        quantizers: dict[str, FakeQuantize],
        evaluate: Callable[[nn.Module], Any],
        results: Results,
        pattern: Pattern | None,
    ) -> None:
        self.model = model
        self.quantizers = quantizers
        self.evaluate = evaluate
        self.results = results
        self.pattern = pattern
        self._weights: Choice | None = None  # what the weights are solved by

    def measure(self, label: str, pair: _Pair | None) -> float:
        return self.results.measure(label, lambda: self._compute(label, pair))

    def _compute(self, label: str, pair: _Pair | None) -> Any:
        if label == _FLOAT:
            with restored(self.quantizers):
                change_states(_WHO, self.model, FakeQuantState.FLOAT)
                return self._evaluate()
        if pair is not None:
            activations, weights = pair
            # Weights are read anew, so they are solved when their rule changes.
            again = weights if weights != self._weights else None
            _solve_by(self.model, activations, again, self.pattern)
            self._weights = weights
        return self._evaluate()

    def _evaluate(self) -> Any:
        with forked_rng(self.model):
            return self.evaluate(self.model)
