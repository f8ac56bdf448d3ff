"""Setting and reading the state of a model's quantizers."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_ext import ops
from torch_ext._findings import Found, findings
from torch_ext._states import FOLLOW, QUANTIZE, FakeQuantState, parse_state
from torch_ext._walk import require_quantizers, weight_sources
from torch_ext.fake_quant import FakeQuantize, Solution, WeightSolution
from torch_ext.learned import LearnedFakeQuantize
from torch_ext.utils.text import shown

__all__ = ["FakeQuantState", "fake_quantize_states", "reset_statistics", "set_fake_quantize"]

_WHO = "set_fake_quantize"
Pattern = str | Sequence[str]


class QuantizationWarning(UserWarning):
    """Quantizers whose data or range deserves a look, by name."""


def set_fake_quantize(
    model: nn.Module,
    state: FakeQuantState | str,
    pattern: Pattern | None = None,
    allow_unobserved: bool = False,
) -> None:
    """Sets the state of the model's quantizers, whatever ``train()`` and ``eval()`` say.

    Leaving CALIBRATION solves every observer, activations from their statistics in one call and
    weights from the weights, and refuses when a quantizer saw no data. VALIDATION refuses when a
    quantizer has no range. A refused change changes nothing.

    Statistics go on from where they are when CALIBRATION is entered again;
    :func:`reset_statistics` forgets them.

    Args:
        state: a :class:`FakeQuantState` or its value, such as ``"qat"``.
        pattern: names of quantizers, with ``*`` and ``?``, or a list of such; None is all.
        allow_unobserved: let quantizers without data be: they pass through in VALIDATION, and in
            QAT their first batch sets the range.
    """
    target = parse_state(_WHO, state)
    found = require_quantizers(_WHO, model)
    for name, quantizer in found.items():
        quantizer.label = name
    chosen = select(_WHO, found, pattern)
    _refuse_unusable(chosen, target)
    leaving = {
        name: quantizer
        for name, quantizer in chosen.items()
        if quantizer.state is FakeQuantState.CALIBRATION
        and target is not FakeQuantState.CALIBRATION
    }
    solved = solve(model, leaving)
    _refuse_unobserved(solved.unobserved, allow_unobserved)
    without = _without_range(chosen, solved) if target is FakeQuantState.VALIDATION else set()
    _refuse_without_range([n for n in without if not (allow_unobserved or _may_pass(chosen[n]))])

    solved.commit()
    for name, quantizer in chosen.items():
        if allow_unobserved and (name in solved.unobserved or name in without):
            quantizer.unobserved_allowed = True
        quantizer.enter(target, pass_through=name in without)
    if notes := [*solved.notes(), *_idle_inputs(without, chosen)]:
        warnings.warn("\n".join([f"{_WHO}:", *notes]), QuantizationWarning, stacklevel=2)


FakeQuantize.set_state = staticmethod(set_fake_quantize)


def fake_quantize_states(model: nn.Module) -> dict[str, FakeQuantState]:
    """The state of every quantizer, by name."""
    found = require_quantizers("fake_quantize_states", model)
    return {name: quantizer.state for name, quantizer in found.items()}


def reset_statistics(model: nn.Module, pattern: Pattern | None = None) -> None:
    """Forgets what the observers saw; ranges stay."""
    found = require_quantizers("reset_statistics", model)
    for quantizer in select("reset_statistics", found, pattern).values():
        quantizer.observer.reset_()


def select(
    who: str, found: Mapping[str, FakeQuantize], pattern: Pattern | None
) -> dict[str, FakeQuantize]:
    """The quantizers that a pattern names; every pattern has to name one."""
    if pattern is None:
        return dict(found)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    for one in patterns:
        if not isinstance(one, str):
            raise TypeError(f"{who}: expected pattern to be text, got {one!r}")
        if not any(fnmatch.fnmatchcase(name, one) for name in found):
            raise ValueError(
                f'{who}: no quantizer matches pattern "{one}"; known: {shown(list(found))}'
            )
    if not patterns:
        raise ValueError(f"{who}: expected pattern to name quantizers, got an empty list")
    return {
        name: quantizer
        for name, quantizer in found.items()
        if any(fnmatch.fnmatchcase(name, one) for one in patterns)
    }


class Solved:
    """Ranges found for a set of quantizers, before any of them is taken."""

    def __init__(self) -> None:
        self.quantizers: dict[str, FakeQuantize] = {}
        self.solutions: dict[str, Solution] = {}
        self.weights: dict[str, WeightSolution] = {}
        self.unobserved: dict[str, str] = {}

    @torch.no_grad()
    def commit(self) -> None:
        for name, weight in self.weights.items():
            self.quantizers[name].observer.extrema.copy_(weight.extrema)
            self.quantizers[name].observer.tally.copy_(weight.tally)
        for name, solution in self.solutions.items():
            self.quantizers[name].take_(solution)

    def notes(self) -> list[str]:
        return findings(
            {
                name: Found(self.quantizers[name], solution.range)
                for name, solution in self.solutions.items()
            }
        )


def solve(model: nn.Module, chosen: Mapping[str, FakeQuantize]) -> Solved:
    """Solves quantizers without changing them; those with nothing to solve are named."""
    out = Solved()
    out.quantizers = dict(chosen)
    sources = weight_sources(model) if any(q.transient for q in chosen.values()) else {}
    seen = _finite_counts(chosen)
    ready: dict[str, FakeQuantize] = {}
    for name, quantizer in chosen.items():
        if quantizer.transient:
            source = sources.get(quantizer)
            if source is None:
                out.unobserved[name] = "it reads a weight, but is no parametrization of one"
                continue
            out.weights[name] = found = quantizer.solve_weight(source.read())
            if found.solution is None:
                out.unobserved[name] = "the weight has no finite value"
            else:
                out.solutions[name] = found.solution
        elif quantizer.observer.statistic == "none" or seen[name][0] > 0:
            ready[name] = quantizer
        elif not quantizer.optional or seen[name][1] > 0:
            out.unobserved[name] = "only non-finite values" if seen[name][1] else ""
    out.solutions.update(solve_observers(ready))
    return out


def _finite_counts(chosen: Mapping[str, FakeQuantize]) -> dict[str, tuple[int, int]]:
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


def solve_observers(chosen: Mapping[str, FakeQuantize]) -> dict[str, Solution]:
    """Solves statistics, all those of a device in one call."""
    by_device: dict[torch.device, list[str]] = {}
    for name, quantizer in chosen.items():
        by_device.setdefault(quantizer.solved.device, []).append(name)
    found: dict[str, Solution] = {}
    for names in by_device.values():
        observers = [chosen[name].observer for name in names]
        ranges, scales, zero_points = ops.solve_many(
            [o.name for o in observers],
            [o.extrema for o in observers],
            [o.tally for o in observers],
            [o.counts for o in observers],
            [o.quant_min for o in observers],
            [o.quant_max for o in observers],
            [o.symmetric for o in observers],
            [o.scale_rule for o in observers],
            [o.power_of_two for o in observers],
            [o.encoded_options for o in observers],
        )
        _refuse_contradictions(names, ranges)
        solutions = map(Solution, ranges, scales, zero_points)
        found.update(zip(names, solutions, strict=True))
    return found


def _refuse_contradictions(names: list[str], ranges: list[Tensor]) -> None:
    """The op refuses a statistic that no data makes, but on a device that is not the CPU it cannot
    look without waiting: the range is NaN there, and seen here."""
    if not ranges or not bool(torch.cat([r.flatten() for r in ranges]).isnan().any()):
        return
    broken = [n for n, r in zip(names, ranges, strict=True) if bool(r.isnan().any())]
    raise ValueError(
        f"solve: expected extrema, tally and counts to hold together, got others in {shown(broken)}"
    )


def has_range(chosen: Mapping[str, FakeQuantize]) -> dict[str, bool]:
    """Whether each quantizer has a range; one transfer per device."""
    flags: dict[str, bool] = {}
    by_device: dict[torch.device, list[str]] = {}
    for name, quantizer in chosen.items():
        by_device.setdefault(quantizer.solved.device, []).append(name)
    for names in by_device.values():
        read: Tensor = torch.cat([chosen[name].solved for name in names])
        flags.update(zip(names, map(bool, read.tolist()), strict=True))
    return flags


def _without_range(chosen: Mapping[str, FakeQuantize], solved: Solved) -> set[str]:
    flags = has_range(chosen)
    return {n for n in chosen if not flags[n] and n not in solved.solutions}


def _may_pass(quantizer: FakeQuantize) -> bool:
    return quantizer.optional or quantizer.unobserved_allowed


def _refuse_unobserved(unobserved: Mapping[str, str], allowed: bool) -> None:
    if unobserved and not allowed:
        names = [f"{n} ({why})" if why else n for n, why in unobserved.items()]
        raise RuntimeError(
            f"{_WHO}: expected every quantizer to have seen data, got none for "
            f"{shown(names, 1000)}; run data through them, or pass allow_unobserved=True"
        )


def _refuse_without_range(names: list[str]) -> None:
    if names:
        raise RuntimeError(
            f"{_WHO}: expected every quantizer to have a range for VALIDATION, got none for "
            f"{shown(sorted(names), 1000)}; calibrate, train or load_observer_params first, or "
            "pass allow_unobserved=True"
        )


def _refuse_unusable(chosen: Mapping[str, FakeQuantize], target: FakeQuantState) -> None:
    """Learned parameters that nothing can be quantized with, or that no start would reach."""
    learned = {n: q for n, q in chosen.items() if isinstance(q, LearnedFakeQuantize)}
    if target.value in QUANTIZE:
        for quantizer in learned.values():
            quantizer.check_finite()
    if target.value in FOLLOW:
        starting = {n: q for n, q in learned.items() if q.starts_from_data and q.sharded}
        flags = has_range(starting)
        if names := [n for n in starting if not flags[n]]:
            raise RuntimeError(
                f"{_WHO}: expected quantizers to have a range before fully_shard, got none for "
                f"{shown(names)}: a first batch would set the scale of one rank's shard alone; "
                "calibrate or load_observer_params first"
            )


def _idle_inputs(without: set[str], chosen: Mapping[str, FakeQuantize]) -> list[str]:
    idle = sorted(n for n in without if chosen[n].optional and not chosen[n].unobserved_allowed)
    return [f"  inputs that saw no floating tensor pass through: {shown(idle)}"] if idle else []
