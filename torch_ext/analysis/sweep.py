"""Measures a model with different rules and options, all solved from one calibration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_ext.analysis.rule_choices import Candidates, Choice, parse_candidates, usual_candidates
from torch_ext.analysis.svg import bar_picture
from torch_ext.calibration.resolve import plan_resolve, resolve
from torch_ext.calibration.restore import restored
from torch_ext.files.measurements import Results, fingerprint
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import Pattern, PreparedModel
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
    """One combination of a :class:`Sweep`."""

    #: The rule of activations with its options; None if they were left as they are.
    activations: Choice | None
    #: The rule of weights with its options; None if they were left as they are.
    weights: Choice | None
    #: What ``evaluate`` returned.
    metric: float

    @property
    def label(self) -> str:
        """The combination as text, such as ``percentile(99.9), weights min_max``."""
        return _label(self.activations, self.weights)


@dataclass(frozen=True)
class Sweep:
    """The result of :func:`sweep`; as text, a table."""

    #: The combinations, the best first.
    rows: tuple[SweepRow, ...]
    #: The metric of the float model.
    floating: float
    #: The metric with the rules that the model has.
    as_it_is: float
    #: Whether a higher metric is better.
    higher_is_better: bool
    #: Which quantizers were solved, as in ``set_fake_quantize``; None for all.
    pattern: Pattern | None

    @property
    def best(self) -> SweepRow:
        """The row with the best metric."""
        return self.rows[0]

    def apply(self, model: nn.Module, row: SweepRow | None = None) -> None:
        """Solves the model's quantizers by the rules of a row, by default of the best.

        Args:
            model: the model that was swept, or one with the same statistics.
            row: one of ``rows``.

        Raises:
            ValueError, RuntimeError: as ``resolve``, if the rules cannot be solved on this model.
        """
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
        """Writes an SVG with a bar for each row: its metric minus the float model's."""
        bars = [(row.label, [row.metric - self.floating], f"{row.metric:.6g}") for row in self.rows]
        bars.append(("as it is", [self.as_it_is - self.floating], f"{self.as_it_is:.6g}"))
        title = f"{_WHO}: metric minus the float model's {self.floating:.6g}"
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

    Every combination is solved from the statistics that the model holds, without data. The model is
    evaluated in VALIDATION and eval mode, without gradients, always from the same random state.
    Afterwards it is as it was before; :meth:`Sweep.apply` solves it by the best combination::

        rules = {"percentile": {"percentile": [99.9, 99.99]}, "kl": {}}
        result = sweep(model, accuracy, activation_observers=rules)
        print(result)
        result.apply(model)

    Args:
        model: calibrated, with histograms for the rules that read one.
        evaluate: a function of the model that returns a number.
        activation_observers: names of rules; or a mapping from names to options, each a value or a
            list of values. By default, unless ``weight_observers`` is given, every rule that
            derives its range from the data and can be solved on this model, with the usual values
            of its options.
        weight_observers: the same for weights, by default left as they are. With both, every pair
            is measured.
        pattern: which quantizers to solve, as in ``set_fake_quantize``, by default all; the others
            stay as they are.
        higher_is_better: whether the best row has the highest metric (default) or the lowest; NaN
            comes last.
        progress: whether to show a progress bar; by default if standard error is a terminal.
        checkpoint: a file that keeps the numbers measured so far, for a run that is interrupted:
            numbers in it are not measured again. Only the float model's metric is, and has to
            agree within a relative 1e-6; the model has to be the same to the bit. The file is
            deleted at the end.

    Returns:
        The metric of each combination, the best first.

    Raises:
        TypeError: if ``evaluate`` is no function or returns no number.
        ValueError, RuntimeError: before anything is measured, for rules and options that are
            unknown or cannot be solved on this model, and for a checkpoint of another run.
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
    """The combinations by label, activations first; each was checked to be solvable."""

    def check(side: str, candidate: Choice) -> None:
        plan_resolve(prepared, **_arguments(side, candidate, pattern))

    sides: list[list[Choice | None]] = []
    for side, given in zip(_SIDES, (activation_observers, weight_observers), strict=True):
        choices: list[Choice] = []
        if given is not None:
            choices = parse_candidates(_WHO, f"{side}s", given)
            for candidate in choices:
                try:
                    check(side, candidate)
                except (ValueError, RuntimeError) as error:
                    raise type(error)(f"{_WHO}: {side} {candidate}: {error}") from error
        elif side == _SIDES[0] and weight_observers is None:
            try:
                choices = usual_candidates(lambda candidate: check(_SIDES[0], candidate))
            except (ValueError, RuntimeError) as error:
                why = str(error).removeprefix("resolve: ")
                raise type(error)(f"{_WHO}: {_SIDES[0]}s: {why}") from error
        sides.append([*choices] or [None])
    return {
        _label(activations, weights): (activations, weights)
        for weights in sides[1]
        for activations in sides[0]
    }


def _solve_by(
    model: nn.Module, activations: Choice | None, weights: Choice | None, pattern: Pattern | None
) -> None:
    for side, chosen in zip(_SIDES, (activations, weights), strict=True):
        if chosen is not None:
            resolve(model, **_arguments(side, chosen, pattern))


def _arguments(side: str, chosen: Choice, pattern: Pattern | None) -> dict[str, Any]:
    """The arguments of `resolve` for one side: activations or weights."""
    return {side: chosen.rule, "pattern": pattern, **chosen.options}


class _SweepRun:
    """The measurements of one call of :func:`sweep`, on a model in VALIDATION."""

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
        self._weights: Choice | None = None  # the rule that the weights are solved by now

    def measure(self, label: str, pair: _Pair | None) -> float:
        """The metric of a combination; without a pair, of the float model or the model as it is."""
        return self.results.measure(label, lambda: self._compute(label, pair))

    def _compute(self, label: str, pair: _Pair | None) -> Any:
        """Solves and evaluates a combination; what `evaluate` returns is not checked yet."""
        if label == _FLOAT:
            with restored(self.quantizers):
                change_states(_WHO, self.model, FakeQuantState.FLOAT)
                return self._evaluate()
        if pair is not None:
            activations, weights = pair
            # Solving reads the whole weights, so it is done only if their rule changes.
            changed = weights if weights != self._weights else None
            _solve_by(self.model, activations, changed, self.pattern)
            self._weights = weights
        return self._evaluate()

    def _evaluate(self) -> Any:
        with forked_rng(self.model):
            return self.evaluate(self.model)
