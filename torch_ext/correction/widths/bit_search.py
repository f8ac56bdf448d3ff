"""Chooses a width for each unit: the cost within a budget, a small sum of losses.

A unit is a quantizer, or several that have to have the same width. Its options are widths with a
measured loss each. The cost is a sum of terms in the widths: of one (the size of a weight), or of
two (a layer's multiplications).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_WORSE = 1e30  # in place of a loss that is no number, so that such an option is the last resort
_STARTS = 8  # points from which options are exchanged
_MANY = 300  # options, with more of which single ones are raised first
_ROWS = 512  # moves that are compared with all others at a time
_LESS = 1e-12  # relative gain below which an exchange is rounding


class BitCosts:
    """A cost in the widths of n units: ``fixed``, and terms that :meth:`add` adds."""

    def __init__(self, count: int) -> None:
        self.fixed = 0.0
        self._single = np.zeros(count)
        self._squared = np.zeros(count)
        self._double = np.zeros((count, count))

    def add(self, amount: float, units: Sequence[int]) -> None:
        """Adds ``amount`` times the widths of the units: of none, one or two (or one twice)."""
        if not units:
            self.fixed += amount
        elif len(units) == 1:
            self._single[units[0]] += amount
        elif units[0] == units[1]:
            self._squared[units[0]] += amount
        else:
            self._double[units[0], units[1]] += amount
            self._double[units[1], units[0]] += amount

    def total(self, widths: Any) -> float:
        """The cost of one width for each unit."""
        of_two = widths @ self._double @ widths / 2
        return float(self.fixed + self._single @ widths + self._squared @ widths**2 + of_two)

    def changes(self, widths: Any, units: Any, new: Any) -> Any:
        """By how much each move, of a unit to a new width, changes the cost."""
        slope = self._single + self._double @ widths
        old = widths[units]
        return slope[units] * (new - old) + self._squared[units] * (new**2 - old**2)

    def together(self, left: Any, right: Any) -> Any:
        """What a product of the steps of two units costs beside each step alone."""
        return self._double[np.ix_(left, right)]


class BitPoint(NamedTuple):
    """One point of the curve of cost against loss."""

    #: Bytes or bit operations.
    cost: float
    #: The sum of the losses of the quantizers.
    loss: float


class FoundWidths(NamedTuple):
    """The option of each unit, and the curve from the most bits down to the fewest."""

    options: list[int]
    curve: list[BitPoint]


class BitSearch:
    """The options of each unit as ``widths`` and ``losses``, both by unit, and their cost."""

    def __init__(
        self, costs: BitCosts, widths: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]
    ) -> None:
        counts = [len(options) for options in widths]
        self._costs = costs
        self._units = np.repeat(np.arange(len(counts)), counts)
        self._options = np.concatenate([np.arange(count) for count in counts])
        self._widths = np.concatenate([np.asarray(options, float) for options in widths])
        plain = np.concatenate([np.asarray(options, float) for options in losses])
        self._losses = np.nan_to_num(plain, nan=_WORSE, posinf=_WORSE, neginf=-_WORSE)
        self._first = np.concatenate([[0], np.cumsum(counts)[:-1]])  # each unit's first option

    def within(self, budget: float) -> FoundWidths:
        """The options for a budget, which is no less than the cost of the fewest bits.

        From the most bits down, the step that costs the least loss for what it saves is taken.
        From where the budget is met, and from a few points further down, single options, and two
        at a time, are exchanged as long as the sum of losses falls; the best of these is returned.
        """
        steps = [
            self._first + [int(np.argmax(part)) for part in np.split(self._widths, self._first[1:])]
        ]
        while (step := self._cheapest_step(steps[-1])) is not None:
            steps.append(steps[-1].copy())
            steps[-1][self._units[step]] = step
        curve = [self._point(chosen) for chosen in steps]
        fitting = [i for i, point in enumerate(curve) if point.cost <= budget]
        assert fitting, "the budget is below the cost of the fewest bits"
        places = np.linspace(fitting[0], fitting[-1], _STARTS).astype(int)
        found = [self._exchanged(steps[i], budget) for i in dict.fromkeys(places.tolist())]
        best = min(found, key=lambda chosen: self._point(chosen).loss)
        return FoundWidths(self._options[best].tolist(), curve)

    def _exchanged(self, chosen: Any, budget: float) -> Any:
        chosen = chosen.copy()
        # Exchanges of two find more, but take the square of the number of options each.
        while len(self._units) > _MANY and (step := self._best_raise(chosen, budget)) is not None:
            chosen[self._units[step]] = step
        while (better := self._exchange(chosen, budget)) is not None:
            chosen = better
        return chosen

    def _point(self, chosen: Any) -> BitPoint:
        cost = self._costs.total(self._widths[chosen])
        return BitPoint(cost, float(self._losses[chosen].sum()))

    def _moves(self, chosen: Any) -> tuple[Any, Any]:
        """How each option, taken in place of its unit's present one, changes cost and loss."""
        costs = self._costs.changes(self._widths[chosen], self._units, self._widths)
        return costs, self._losses - self._losses[chosen][self._units]

    def _cheapest_step(self, chosen: Any) -> int | None:
        """The option that costs the least loss per saved cost; None if nothing can be saved."""
        costs, losses = self._moves(chosen)
        saves = (costs < 0) & (self._widths < self._widths[chosen][self._units])
        if not saves.any():
            return None
        rates = np.full(len(costs), np.inf)
        rates[saves] = losses[saves] / -costs[saves]
        return int(np.argmin(rates))

    def _best_raise(self, chosen: Any, budget: float) -> int | None:
        """The option that fits and wins the most for what it costs; None if none is better."""
        room = budget - self._costs.total(self._widths[chosen])
        costs, losses = self._moves(chosen)
        takes = (costs <= room) & (losses < 0)
        if not takes.any():
            return None
        rates = np.full(len(costs), np.inf)
        rates[takes] = losses[takes] / np.maximum(costs[takes], np.finfo(float).tiny)
        return int(np.argmin(rates))

    def _exchange(self, chosen: Any, budget: float) -> Any:
        """The best change of one or two units that lowers the loss in the budget, or None."""
        room = budget - self._costs.total(self._widths[chosen])
        costs, losses = self._moves(chosen)
        steps = self._widths - self._widths[chosen][self._units]
        present = np.isin(np.arange(len(costs)), chosen)
        best, found = -_LESS * (1 + abs(float(self._losses[chosen].sum()))), None
        for begin in range(0, len(costs), _ROWS):
            rows = slice(begin, begin + _ROWS)
            both = self._costs.together(self._units[rows], self._units)
            cost = costs[rows, None] + costs + both * steps[rows, None] * steps
            loss = losses[rows, None] + losses
            # Beside the present option of its own unit, which changes nothing, a move is alone.
            clash = (self._units[rows, None] == self._units) & ~present
            loss[(cost > room) | clash] = np.inf
            at = int(np.argmin(loss))
            if loss.flat[at] < best:
                best = float(loss.flat[at])
                found = (begin + at // len(costs), at % len(costs))
        if found is None:
            return None
        made = chosen.copy()
        for option in reversed(found):  # the present option of the same unit does not undo a move
            made[self._units[option]] = option
        return made
