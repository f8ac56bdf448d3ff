"""Statistics of up to 2^63 - 1 values: every sum is exact, checked against Python's integers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from statistic_tensors import State, observed
from torch_ext import ops

MOST = 2**63 - 1
# Values that a bin holds exactly, in several octaves; the counts have odd low bits.
VALUES = [-3.5, -0.25, 0.0, 0.375, 1.0, 1.0078125, 1.75, 6.0]
SHARES = [3, 7, 11, 401, 1009, 5, 97, 1]
COPIES = [1, 2**29 + 1, 2**31 + 5, 2**43 + 12345, MOST // sum(SHARES)]


def counted(copies: int) -> tuple[State, dict[Fraction, int]]:
    """A statistic with the shares times `copies` of each value, and these counts."""
    x = torch.tensor([v for v, n in zip(VALUES, SHARES, strict=True) for _ in range(n)])
    state = observed(x)
    state.tally.mul_(copies)
    state.counts.mul_(copies)
    counts = {Fraction(v): n * copies for v, n in zip(VALUES, SHARES, strict=True)}
    assert state.tally[0, 0].item() == sum(counts.values())
    return state, counts


def solve(rule: str, state: State, **options: float) -> list[float]:
    return ops.solve(rule, *state, -8, 7, True, **options)[0].tolist()


@pytest.mark.parametrize("copies", COPIES)
def test_moments(copies: int) -> None:
    state, counts = counted(copies)
    n = sum(counts.values())
    mean = sum(x * c for x, c in counts.items()) / n
    squares = sum((x - mean) ** 2 * c for x, c in counts.items())
    deviation = math.sqrt(squares / (n - 1))
    want = [max(-3.5, mean - 3 * deviation), min(6.0, mean + 3 * deviation)]
    assert solve("clip_std", state) == pytest.approx(want, rel=2**-23)
    scale = 2 * sum(abs(x) * c for x, c in counts.items()) / n / math.sqrt(7)
    assert solve("mean_abs", state)[1] == pytest.approx(float(scale) * 7.5, rel=2**-23)


@pytest.mark.parametrize("copies", COPIES)
def test_least_squared_error(copies: int) -> None:
    """The threshold by definition, over all candidates."""
    state, counts = counted(copies)

    def error(t: float) -> Fraction:
        bound = torch.tensor([[max(-3.5, -t), min(6.0, t)]])
        scale = Fraction(ops.qparams(bound, -8, 7, True)[0].item())
        return sum(
            (c * (x - min(max(round(x / scale), -8), 7) * scale) ** 2 for x, c in counts.items()),
            Fraction(0),
        )

    octaves = [2.0**e * (1 + s / 128) for e in range(-13, 3) for s in range(1, 129)]
    half = sum(counts.values()) - counts[Fraction(0)]
    candidates = [
        t
        for t in octaves
        if 2 * sum(c for x, c in counts.items() if 0 < abs(x) < t) >= half and t <= 6
    ]
    best = min(candidates, key=error)
    assert solve("mse", state)[1] == best
