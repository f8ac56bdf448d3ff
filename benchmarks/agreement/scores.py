"""How a quantized net agrees with the float net, and how well that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 2000
SHARE = 0.95  # of the resamples that an interval holds


@dataclass(frozen=True)
class Outcome:
    """One recipe on the test inputs of one draw; a value for each input."""

    same: list[bool]  # whether the class is the float net's
    right: list[bool]  # whether the class is the label; empty without labels
    error: list[float]  # squared norm of the difference of the logits
    size: list[float]  # squared norm of the float net's logits
    seconds: float  # of processor time, to make the quantized net from the float net
    calibration: float  # error of the logits on the inputs of the calibration


def outcome(
    have: Tensor,
    want: Tensor,
    labels: Tensor | None = None,
    seconds: float = 0.0,
    calibration: float = 0.0,
) -> Outcome:
    """Compares logits [N, classes] with the float net's."""
    if not bool(have.isfinite().all()):
        raise ValueError("accuracy.py: expected finite logits of the quantized net")
    chosen = have.argmax(1)
    difference = (have.double() - want.double()).square().sum(1)
    return Outcome(
        (chosen == want.argmax(1)).tolist(),
        [] if labels is None else (chosen == labels).tolist(),
        [float(f"{value:.6g}") for value in difference.tolist()],
        [float(f"{value:.6g}") for value in want.double().square().sum(1).tolist()],
        round(seconds, 2),
        calibration,
    )


@dataclass(frozen=True)
class Interval:
    """A figure, and the interval that holds SHARE of its resamples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def same_class(draws: Sequence[Outcome]) -> Interval:
    """The share of inputs with the float net's class."""
    return _interval([_table(draw.same) for draw in draws], _mean)


def right_class(draws: Sequence[Outcome]) -> Interval:
    """The share of inputs with the label's class."""
    return _interval([_table(draw.right) for draw in draws], _mean)


def logit_error(draws: Sequence[Outcome]) -> Interval:
    """The norm of the difference of the logits over the norm of the float net's logits."""
    return _interval([_table(draw.error, draw.size) for draw in draws], _ratio)


def chosen(candidates: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """For each draw the candidate with the least error on the inputs of its calibration."""
    draws = zip(*candidates, strict=True)
    return [min(draw, key=lambda outcome: outcome.calibration) for draw in draws]


def same_class_ahead(ours: Sequence[Outcome], other: Sequence[Outcome]) -> Interval:
    """How much larger our share of the float net's class is, input by input."""
    pairs = zip(ours, other, strict=True)
    return _interval([_table(a.same) - _table(b.same) for a, b in pairs], _mean)


def error_ratio(ours: Sequence[Outcome], other: Sequence[Outcome]) -> Interval:
    """Our logit error over the other's, on the same inputs."""
    pairs = zip(ours, other, strict=True)
    return _interval([_table(a.error, b.error) for a, b in pairs], _ratio)


def _table(*columns: Sequence[float]) -> np.ndarray:
    return np.array(columns, dtype=np.float64).T


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-2)[..., 0]


def _ratio(values: np.ndarray) -> np.ndarray:
    sums = values.sum(-2)
    return np.sqrt(sums[..., 0] / np.maximum(sums[..., 1], 1e-300))


def _interval(draws: Sequence[np.ndarray], figure: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Bootstrap: draws are drawn with replacement, and then the inputs of each of them.

    Two recipes are resampled alike, so that what is common to them leaves their difference.
    """
    random = np.random.default_rng(0)
    found = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = random.integers(0, len(draws), len(draws))
        parts = [draws[d][random.integers(0, len(draws[d]), len(draws[d]))] for d in chosen]
        found[i] = figure(np.concatenate(parts))
    low, high = np.quantile(found, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Interval(float(figure(np.concatenate(draws))), float(low), float(high))


def logits(call: Callable[[Tensor], Tensor], inputs: Tensor, batch: int) -> Tensor:
    """What a net makes of inputs, batch after batch."""
    with torch.no_grad():
        return torch.cat([call(part) for part in inputs.split(batch)])
