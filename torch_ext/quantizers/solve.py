"""Ranges from statistics and weights: what quantizers would take, before any of them does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from torch_ext import ops
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.text import label_of, shown

_SHOWN = 8  # channels that a finding lists


class Solution(NamedTuple):
    """A range [C,2] with the parameters that quantize to it, not yet in a quantizer."""

    range: Tensor  # float32 [C,2]
    scale: Tensor  # float32 [C]
    zero_point: Tensor  # int32 [C]

    @classmethod
    def nothing(cls, channels: int, device: torch.device) -> Solution:
        """Of data that is all zero: the range (0,0), scale 1."""
        return cls(
            torch.zeros(channels, 2, dtype=torch.float32, device=device),
            torch.ones(channels, dtype=torch.float32, device=device),
            torch.zeros(channels, dtype=torch.int32, device=device),
        )


class WeightSolution(NamedTuple):
    """What a weight gives, and its statistic; ``solution`` is None without a finite value."""

    solution: Solution | None
    extrema: Tensor  # float32 [C,2]
    tally: Tensor  # int64 [C,5]


class Quantizer(Protocol):
    """What solving and a change of state need of a FakeQuantize, whose module imports this one."""

    observer: Observer
    solved: Tensor
    optional: bool
    unobserved_allowed: bool

    @property
    def state(self) -> FakeQuantState: ...
    @property
    def transient(self) -> bool: ...
    def check_enters(self, who: str, name: str, state: FakeQuantState) -> None: ...
    def enter(self, state: FakeQuantState, *, pass_through: bool = False) -> None: ...
    def take_(self, solution: Solution) -> Self: ...
    def solve_weight(self, weight: Tensor) -> WeightSolution: ...


Q = TypeVar("Q", bound=Quantizer)
# The weight that a quantizer quantizes; None where it is no parametrization of one.
ReadWeight = Callable[[Q], Tensor | None]


class Solutions:
    """Ranges found for a set of quantizers, before any of them is taken."""

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        self.quantizers = quantizers
        self.solved: dict[str, Solution] = {}
        self.weights: dict[str, WeightSolution] = {}
        self.unobserved: dict[str, str] = {}  # those with nothing to solve from, and why

    @torch.no_grad()
    def commit(self) -> None:
        """Every quantizer takes its range; weights' observers their statistic."""
        for name, weight in self.weights.items():
            observer = self.quantizers[name].observer
            observer.extrema.copy_(weight.extrema)
            observer.tally.copy_(weight.tally)
        for name, solution in self.solved.items():
            self.quantizers[name].take_(solution)

    def findings(self) -> list[str]:
        """What deserves a look, one line per quantizer and kind of finding."""
        return findings(
            {
                name: (self.quantizers[name].observer, solution.range)
                for name, solution in self.solved.items()
            }
        )


def solve_quantizers(chosen: Mapping[str, Q], read_weight: ReadWeight[Q]) -> Solutions:
    """Solves quantizers without changing them; those with nothing to solve are named."""
    solutions = Solutions(chosen)
    counts = _finite_counts(chosen)
    ready: dict[str, Observer] = {}
    for name, quantizer in chosen.items():
        finite, non_finite = counts[name]
        if quantizer.transient:
            weight = read_weight(quantizer)
            if weight is None:
                solutions.unobserved[name] = "it reads a weight, but is no parametrization of one"
                continue
            solutions.weights[name] = solved = quantizer.solve_weight(weight)
            if solved.solution is None:
                solutions.unobserved[name] = "the weight has no finite value"
            else:
                solutions.solved[name] = solved.solution
        elif quantizer.observer.statistic == "none" or finite > 0:
            ready[name] = quantizer.observer
        elif not quantizer.optional or non_finite > 0:
            solutions.unobserved[name] = "only non-finite values" if non_finite else ""
    solutions.solved.update(solve_observers(ready))
    return solutions


def _finite_counts(chosen: Mapping[str, Quantizer]) -> dict[str, tuple[int, int]]:
    """Finite and non-finite values that each statistic holds; one transfer per device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, quantizer in chosen.items():
        by_device.setdefault(quantizer.observer.tally.device, []).append(name)
    counts: dict[str, tuple[int, int]] = {}
    for names in by_device.values():
        sums = torch.stack([chosen[name].observer.tally.sum(0) for name in names]).tolist()
        for name, (finite, _, _, inf, nan) in zip(names, sums, strict=True):
            counts[name] = (finite, inf + nan)
    return counts


def solve_observers(observers: Mapping[str, Observer]) -> dict[str, Solution]:
    """Solves statistics, all those of a device in one call.

    Raises ValueError, by name, for a statistic that no data makes.
    """
    by_device: dict[torch.device, list[str]] = {}
    for name, observer in observers.items():
        by_device.setdefault(observer.extrema.device, []).append(name)
    solutions: dict[str, Solution] = {}
    for names in by_device.values():
        own = [observers[name] for name in names]
        ranges, scales, zero_points = ops.solve_many(
            [o.name for o in own],
            [o.extrema for o in own],
            [o.tally for o in own],
            [o.counts for o in own],
            [o.quant_min for o in own],
            [o.quant_max for o in own],
            [o.symmetric for o in own],
            [o.scale_rule for o in own],
            [o.power_of_two for o in own],
            [o.encoded_options for o in own],
        )
        _refuse_contradictions(names, ranges)
        solutions.update(zip(names, map(Solution, ranges, scales, zero_points), strict=True))
    return solutions


def _refuse_contradictions(names: list[str], ranges: list[Tensor]) -> None:
    """The op raises for a statistic that no data makes, but on a device that is not the CPU it
    cannot look without waiting: the range is NaN there, and seen here."""
    if not ranges or not bool(torch.cat([r.flatten() for r in ranges]).isnan().any()):
        return
    broken = [n for n, r in zip(names, ranges, strict=True) if bool(r.isnan().any())]
    raise ValueError(
        f"solve: expected extrema, tally and counts to hold together, got others in {shown(broken)}"
    )


def has_range(chosen: Mapping[str, Quantizer]) -> dict[str, bool]:
    """Whether each quantizer has a range; one transfer per device."""
    flags: dict[str, bool] = {}
    by_device: dict[torch.device, list[str]] = {}
    for name, quantizer in chosen.items():
        by_device.setdefault(quantizer.solved.device, []).append(name)
    for names in by_device.values():
        read: Tensor = torch.cat([chosen[name].solved for name in names])
        flags.update(zip(names, map(bool, read.tolist()), strict=True))
    return flags


def findings(solved: Mapping[str, tuple[Observer, Tensor]]) -> list[str]:
    """Non-finite data, dead tensors and clipped negatives, one line per quantizer and kind.

    Args:
        solved: observer and range [C,2] by name of the quantizer.
    """
    notes: list[str] = []
    for name, (observer, range_) in solved.items():
        if observer.statistic == "none":
            continue
        label = label_of(name)
        extrema, tally = observer.extrema.cpu(), observer.tally.sum(0).tolist()
        if tally[3] or tally[4]:
            notes.append(f"  {label}: {tally[3]} infinite and {tally[4]} NaN values were left out")
        one_sided = observer.symmetric and observer.quant_min >= 0
        dead = dead_channels(range_.cpu(), one_sided)
        if dead:
            where = "" if len(range_) == 1 else f" in {listed(dead)} of {len(range_)} channels"
            notes.append(f"  {label}: nothing to scale{where}, scale 1")
        if one_sided and bool((extrema[:, 0] < 0).any()):
            least = float(extrema[:, 0].min())
            notes.append(f"  {label}: negative values, down to {least:g}, clip to 0")
    return notes


def dead_channels(range_: Tensor, one_sided: bool) -> list[int]:
    """Channels of a range [C,2] that hold nothing to scale."""
    alive = range_[:, 1] > 0 if one_sided else (range_ != 0).any(1)
    dead: list[int] = torch.nonzero(~alive).flatten().tolist()
    return dead


def listed(channels: list[int]) -> str:
    """The first channels, for a message."""
    more = ", ..." if len(channels) > _SHOWN else ""
    return "[" + ", ".join(map(str, channels[:_SHOWN])) + more + "]"
