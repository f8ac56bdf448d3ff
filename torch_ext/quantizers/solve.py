"""Computes ranges from statistics and weights, before any quantizer is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from torch_ext import ops
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.parts.groups import follow_rows_
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.mask_values import mask_advice, mask_fill
from torch_ext.utils.text import label_of, shown

_MAX_SHOWN = 8  # channels in a finding


class Solution(NamedTuple):
    """A range with its scale and zero point, not yet copied into a quantizer."""

    range: Tensor  # float32 [C,2]
    scale: Tensor  # float32 [C]
    zero_point: Tensor  # int32 [C]

    @classmethod
    def nothing(cls, channels: int, device: torch.device) -> Solution:
        """The solution of all-zero data: range (0,0), scale 1, zero point 0."""
        return cls(
            torch.zeros(channels, 2, dtype=torch.float32, device=device),
            torch.ones(channels, dtype=torch.float32, device=device),
            torch.zeros(channels, dtype=torch.int32, device=device),
        )


class WeightSolution(NamedTuple):
    """A weight's range and statistic."""

    solution: Solution | None  # None if no value is finite
    extrema: Tensor  # float32 [C,2]
    tally: Tensor  # int64 [C,5]


class Quantizer(Protocol):
    """The part of FakeQuantize used here, which cannot be imported: its module imports this one."""

    observer: Observer
    range: Tensor
    solved: Tensor
    optional: bool
    unobserved_allowed: bool

    @property
    def state(self) -> FakeQuantState: ...
    @property
    def rangeless(self) -> bool: ...
    @property
    def transient(self) -> bool: ...
    @property
    def keeps_range(self) -> bool: ...
    @property
    def holds_range(self) -> bool: ...
    def check_enters(self, who: str, name: str, state: FakeQuantState) -> None: ...
    def enter(self, state: FakeQuantState, *, pass_through: bool = False) -> None: ...
    def take_(self, solution: Solution) -> Self: ...
    def solve_weight(self, weight: Tensor) -> WeightSolution: ...
    def calculate_qparams(self) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def weight_solution(
    observer: Observer, weight: Tensor, follow_arguments: Mapping[str, Any]
) -> WeightSolution:
    """Computes a weight's range and statistic.

    Args:
        observer: of the weight's quantizer; it does not change.
        weight: what the quantizer reads.
        follow_arguments: the arguments of ``ops.follow_`` after ``averaging_constant``, by name.
    """
    device, channels = observer.extrema.device, observer.channel_len
    layout: dict[str, Any] = {}
    if observer.group_size is None:
        layout = {"ch_axis": observer.ch_axis, "channel_len": channels}
        layout["qscheme"] = observer.qscheme
    fresh = Observer("min_max", **layout)
    fresh.to(device)
    fresh(weight)
    if observer.statistic == "none":
        given = Solution(observer.range(), *observer.calculate_qparams())
        return WeightSolution(given, fresh.extrema, fresh.tally)
    # Written to by follow_; a channel without a finite value keeps the range (0,0).
    solution = Solution.nothing(channels, device)
    solved = torch.zeros(1, dtype=torch.uint8, device=device)  # 0: takes that of the weight
    # With the constant 0 follow_ would not take the range of a weight that is all zero.
    follow = follow_rows_ if observer.solves_in_parts else ops.follow_
    follow(observer.as_rows(weight), *solution, solved, 1.0, **follow_arguments)
    return WeightSolution(solution if bool(solved) else None, fresh.extrema, fresh.tally)


Q = TypeVar("Q", bound=Quantizer)
# Reads the weight of a quantizer; None if the quantizer is no parametrization.
ReadWeight = Callable[[Q], Tensor | None]


class Solutions:
    """The ranges computed for a set of quantizers, until :meth:`commit` copies them over."""

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        # All by quantizer name.
        self.quantizers = quantizers
        self.solved: dict[str, Solution] = {}
        self.weights: dict[str, WeightSolution] = {}
        self.unobserved: dict[str, str] = {}  # why there was nothing to solve from; may be ""

    def add_weight(self, name: str, weight: WeightSolution) -> None:
        """Adds a weight's statistic, and its range or why there is none."""
        self.weights[name] = weight
        if weight.solution is None:
            self.unobserved[name] = "the weight has no finite value"
        else:
            self.solved[name] = weight.solution

    def update(self, other: Solutions) -> None:
        """Adds the ranges computed for other quantizers."""
        self.quantizers = {**self.quantizers, **other.quantizers}
        self.solved.update(other.solved)
        self.weights.update(other.weights)
        self.unobserved.update(other.unobserved)

    @torch.no_grad()
    def commit(self) -> None:
        """Copies the ranges into the quantizers, and weights' statistics into their observers."""
        for name, weight in self.weights.items():
            observer = self.quantizers[name].observer
            observer.extrema.copy_(weight.extrema)
            observer.tally.copy_(weight.tally)
        for name, solution in self.solved.items():
            self.quantizers[name].take_(solution)

    def findings(self) -> list[str]:
        """Non-finite data, dead channels and clipped negatives; see :func:`findings`."""
        return findings(
            {
                name: (self.quantizers[name].observer, solution.range)
                for name, solution in self.solved.items()
            }
        )


def solve_quantizers(chosen: Mapping[str, Q], read_weight: ReadWeight[Q]) -> Solutions:
    """Solves quantizers without changing them.

    Activations are solved from their statistics, weights from what ``read_weight`` returns.
    Quantizers without data are listed in ``Solutions.unobserved``, unless they are optional.
    """
    solutions = Solutions(chosen)
    counts = _finite_counts(chosen)
    ready: dict[str, Observer] = {}
    for name, quantizer in chosen.items():
        finite, non_finite = counts[name]
        if quantizer.transient:
            weight = read_weight(quantizer)
            if weight is None:
                solutions.unobserved[name] = "a weight quantizer, but no parametrization"
                continue
            solutions.add_weight(name, quantizer.solve_weight(weight))
        elif quantizer.observer.statistic == "none" or finite > 0:
            ready[name] = quantizer.observer
        elif not quantizer.optional or non_finite > 0:
            solutions.unobserved[name] = "only non-finite values" if non_finite else ""
    solutions.solved.update(solve_observers(ready))
    return solutions


def solve_weights(chosen: Mapping[str, Q], read_weight: ReadWeight[Q]) -> Solutions:
    """Solves the weight quantizers among ``chosen`` from the weights that are there now.

    Left out are quantizers that have a range and keep it (``keeps_range``), and those for which
    ``read_weight`` returns None, whose weight is not known. Weights without a finite value are
    listed in ``Solutions.unobserved``.
    """
    weights = {name: quantizer for name, quantizer in chosen.items() if quantizer.transient}
    flags = has_range(weights)
    return _solve_present(
        {name: q for name, q in weights.items() if not (flags[name] and q.keeps_range)}, read_weight
    )


def _solve_present(weights: Mapping[str, Q], read_weight: ReadWeight[Q]) -> Solutions:
    """Solves weights whose quantizers do not keep the range that they may have."""
    solutions = Solutions(weights)
    for name, quantizer in weights.items():
        weight = read_weight(quantizer)
        if weight is not None:
            solutions.add_weight(name, quantizer.solve_weight(weight))
    return solutions


def refresh_weights(chosen: Mapping[str, Q], read_weight: ReadWeight[Q]) -> dict[str, str]:
    """Solves again the ranges of weights that have one and do not keep it.

    The weight may have changed since: by an optimizer, an average of weights, pruning, loading.
    What writes ranges to a file calls this first.

    Returns:
        Names of the weights without a finite value, whose range has not changed, with the reason.
    """
    moving = {name: q for name, q in chosen.items() if q.transient and not q.keeps_range}
    flags = has_range(moving)
    solutions = _solve_present({n: q for n, q in moving.items() if flags[n]}, read_weight)
    solutions.commit()
    return solutions.unobserved


def _finite_counts(chosen: Mapping[str, Quantizer]) -> dict[str, tuple[int, int]]:
    """The numbers of finite and non-finite values of each statistic; one transfer per device."""
    tallies = {name: quantizer.observer.tally for name, quantizer in chosen.items()}
    counts: dict[str, tuple[int, int]] = {}
    for names in _by_device(tallies):
        sums = torch.stack([tallies[name].sum(0) for name in names]).tolist()
        for name, (finite, _, _, inf, nan) in zip(names, sums, strict=True):
            counts[name] = (finite, inf + nan)
    return counts


def solve_observers(observers: Mapping[str, Observer]) -> dict[str, Solution]:
    """Solves the observers' statistics, in one call per device.

    Raises:
        RuntimeError: tensors of a statistic contradict each other. On a GPU the message names the
            quantizers.
    """
    solutions: dict[str, Solution] = {}
    for names in _by_device({name: observer.extrema for name, observer in observers.items()}):
        on_device = [observers[name] for name in names]
        ranges, scales, zero_points = ops.solve_many(
            [observer.name for observer in on_device],
            [observer.extrema for observer in on_device],
            [observer.tally for observer in on_device],
            [observer.counts for observer in on_device],
            options=[observer.encoded_options for observer in on_device],
            grids=[observer.grid_text for observer in on_device],
        )
        _check_no_nan(names, ranges)
        solutions.update(zip(names, map(Solution, ranges, scales, zero_points), strict=True))
    return solutions


def _check_no_nan(names: list[str], ranges: list[Tensor]) -> None:
    """Raises RuntimeError for contradictory statistics on a GPU.

    On the CPU the op itself raises. On a GPU that would need a host sync: the range is NaN instead.
    """
    if not ranges or not bool(torch.cat([range_.flatten() for range_ in ranges]).isnan().any()):
        return
    broken = [
        name for name, range_ in zip(names, ranges, strict=True) if bool(range_.isnan().any())
    ]
    raise RuntimeError(
        "solve: expected extrema, tally and counts to agree, got contradictory ones in "
        f"{shown(broken)}"
    )


def has_range(chosen: Mapping[str, Quantizer]) -> dict[str, bool]:
    """Whether each quantizer has a range; one transfer per device."""
    flags: dict[str, bool] = {}
    solved = {name: quantizer.solved for name, quantizer in chosen.items()}
    for names in _by_device(solved):
        values: list[int] = torch.cat([solved[name] for name in names]).tolist()
        flags.update(zip(names, map(bool, values), strict=True))
    return flags


def _by_device(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the tensors on each device, so that each is asked once."""
    found: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.device, []).append(name)
    return list(found.values())


def findings(solved: Mapping[str, tuple[Observer, Tensor]]) -> list[str]:
    """Lines for a warning: non-finite data, masks, dead channels, negative values that clip to 0.

    Args:
        solved: observer and range [C,2] by name of the quantizer.

    Returns:
        One line for each quantizer and kind of finding; then what to do about masks.
    """
    notes: list[str] = []
    masks: dict[str, None] = {}
    for name, (observer, range_) in solved.items():
        if observer.statistic == "none":
            continue
        label = label_of(name)
        extrema, tally = observer.extrema.cpu(), observer.tally.sum(0).tolist()
        if tally[3] or tally[4]:
            notes.append(f"  {label}: {tally[3]} infinite and {tally[4]} NaN values were left out")
        if tally[3] and not observer.transient:
            masks[name] = None
        if fill := mask_fill(float(extrema[:, 0].min()), float(extrema[:, 1].max())):
            notes.append(f"  {label}: its values reach {fill}, as masks do")
            masks[name] = None
        one_sided = observer.symmetric and observer.quant_min >= 0
        dead = dead_channels(range_.cpu(), one_sided)
        if dead:
            kind = "channels" if observer.group_size is None else "groups"
            where = "" if len(range_) == 1 else f" in {listed(dead)} of {len(range_)} {kind}"
            notes.append(f"  {label}: nothing to scale{where}, scale 1")
        if one_sided and bool((extrema[:, 0] < 0).any()):
            least = float(extrema[:, 0].min())
            notes.append(f"  {label}: negative values, down to {least:g}, clip to 0")
    return [*notes, mask_advice(list(masks))] if masks else notes


def dead_channels(range_: Tensor, one_sided: bool) -> list[int]:
    """The channels of a range [C,2] that are all zero; if ``one_sided``, without positive values.

    Their scale is 1.
    """
    alive = range_[:, 1] > 0 if one_sided else (range_ != 0).any(1)
    dead: list[int] = torch.nonzero(~alive).flatten().tolist()
    return dead


def listed(channels: list[int]) -> str:
    """The first channels as text for a message, such as "[0, 3, ...]"."""
    more = ", ..." if len(channels) > _MAX_SHOWN else ""
    return "[" + ", ".join(map(str, channels[:_MAX_SHOWN])) + more + "]"
