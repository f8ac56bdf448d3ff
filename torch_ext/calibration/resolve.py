"""Solves quantizers again without data: by another rule, or with other options."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_ext.calibration.change_grid import changed_grids
from torch_ext.ops.registry import OptionValue, observer_info
from torch_ext.ops.registry_names import Rule
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import Pattern, PreparedModel
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.solve import solve_quantizers
from torch_ext.utils.arguments import parse_flag
from torch_ext.utils.backends import Backend, backend_grids
from torch_ext.utils.text import joined, shown

_WHO = "resolve"


def resolve(
    model: nn.Module,
    activation_observer: Rule | None = None,
    weight_observer: Rule | None = None,
    pattern: Pattern | None = None,
    *,
    backend: Backend | None = None,
    reduce_range: bool = False,
    **options: OptionValue,
) -> None:
    """Solves quantizers again without data, by another rule or with other options.

    Activations are solved from the statistics of their observers, weights from the weights::

        resolve(model, activation_observer="percentile", percentile=99.9)
        resolve(model, weight_observer="mse")
        resolve(model, percentile=99.99)          # keeps the rules
        resolve(model, backend="tensorrt")        # keeps them, on the grids of another engine

    A rule that reads a histogram (``percentile``, ``kl``, ...) needs one: calibrate with such a
    rule, or with ``histogram=True`` in ``activation_qkwargs`` of the qconfig. Quantizers that saw
    no data, and those whose qconfig gives a scale (``fixed_scale``) or makes it ``dynamic``, are
    left as they are; so are weights that :func:`reconstruct` rounded, unless a ``weight_observer``
    is given.

    Args:
        model: a prepared and calibrated model, wrapped or not.
        activation_observer: the new rule of activations. If only one of the two rules is given,
            the quantizers of the other side are left as they are; with neither, all keep their
            rules.
        weight_observer: the new rule of weights.
        pattern: names of quantizers, as in :func:`set_fake_quantize`; by default, all.
        backend: the engine whose grids the quantizers get, as in :func:`get_default_qconfig`: the
            statistic of a calibration does not depend on the grid. By default grids stay. Both
            sides change, unless one rule alone is given.
        reduce_range: with a backend, weights of 7 bits.
        **options: options of the rules. Each goes to the quantizers whose rule has it. Where the
            rule stays, options that are not given stay too; otherwise they take their defaults.

    Raises:
        TypeError: ``model`` is no module, or an option has a wrong type.
        ValueError: the model has no quantizers, none saw data, the pattern matches none, a rule, an
            option or a backend is unknown, a value is out of range, or the histogram is missing; by
            name, for quantizers that cannot change to the backend's grid: per channel where it is
            per tensor, with a learned or given scale, with a range but no statistic.
        RuntimeError: a weight has no finite value, or a rule does not accept the grid or these
            options together.

    If it raises, nothing has changed.
    """
    prepared = PreparedModel(_WHO, model)
    grids: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if backend is not None:
        sides = _sides(activation_observer, weight_observer)
        chosen = {n: q for n, q in prepared.select(pattern).items() if q.transient in sides}
        wanted = backend_grids(_WHO, backend, reduce_range)
        grids = changed_grids(_WHO, backend, wanted, chosen)
    elif parse_flag(_WHO, "reduce_range", reduce_range):
        raise ValueError(f"{_WHO}: expected a backend with reduce_range=True, got None")
    with grids:
        _apply(
            prepared,
            plan_resolve(prepared, activation_observer, weight_observer, pattern, **options),
        )


class ResolvePlan(NamedTuple):
    """What a checked call of :func:`resolve` will do, by name of the quantizer."""

    chosen: dict[str, FakeQuantize]
    rules: dict[str, Rule]
    settings: dict[str, dict[str, Any]]  # the options of each rule


def plan_resolve(
    prepared: PreparedModel,
    activation_observer: Rule | None = None,
    weight_observer: Rule | None = None,
    pattern: Pattern | None = None,
    **options: OptionValue,
) -> ResolvePlan:
    """Checks a call of :func:`resolve` without changing anything.

    Raises TypeError, ValueError or RuntimeError as :func:`resolve` does.
    """
    selected = prepared.select(pattern)
    wanted = {False: activation_observer, True: weight_observer}
    sides = _sides(activation_observer, weight_observer)
    chosen = {
        name: q
        for name, q in selected.items()
        if q.transient in sides and _has_data(q) and (weight_observer or not q.holds_range)
    }
    if not chosen:
        dynamic = all(q.rangeless for q in selected.values() if q.transient in sides)
        advice = "as their scales are dynamic" if dynamic else "calibrate first"
        raise ValueError(f"{_WHO}: expected quantizers that saw data, found none; {advice}")

    rules = {name: wanted[q.transient] or q.observer.name for name, q in chosen.items()}
    settings = {name: _options(q, rules[name], options) for name, q in chosen.items()}
    for option in options:
        if not any(option in _known(rule) for rule in rules.values()):
            known = {name: None for rule in rules.values() for name in _known(rule)}
            raise ValueError(
                f'{_WHO}: unknown option "{option}" of {joined(dict.fromkeys(rules.values()))}; '
                f"known: {joined(known)}"
            )
    _check(chosen, rules, settings)
    return ResolvePlan(chosen, rules, settings)


def _sides(activation_observer: Rule | None, weight_observer: Rule | None) -> set[bool]:
    """The sides that rules are given for, True for weights; with neither, both."""
    given = {False: activation_observer, True: weight_observer}
    return {side for side, rule in given.items() if rule is not None} or {False, True}


def _has_data(quantizer: FakeQuantize) -> bool:
    return quantizer.transient or quantizer.observer.saw_data


def _known(rule: str) -> list[str]:
    return [row["name"] for row in observer_info(rule)["options"]]


def _options(
    quantizer: FakeQuantize, rule: str, given: Mapping[str, OptionValue]
) -> dict[str, Any]:
    """The options for ``rule``: those given, and, if the rule stays, its present ones."""
    known = _known(rule)
    kept = quantizer.observer.options if rule == quantizer.observer.name else {}
    return kept | {name: value for name, value in given.items() if name in known}


def _check(
    chosen: Mapping[str, FakeQuantize],
    rules: Mapping[str, Rule],
    settings: Mapping[str, Mapping[str, OptionValue]],
) -> None:
    """Raises for a rule whose histogram is missing, and for options or grids that do not fit it."""
    lacking = [
        name
        for name, quantizer in chosen.items()
        if observer_info(rules[name])["statistic"] == "histogram"
        and not (quantizer.transient or quantizer.observer.has_histogram)
    ]
    if lacking:
        raise ValueError(
            f"{_WHO}: {rules[lacking[0]]} reads a histogram, but none was kept for "
            f"{shown(lacking)}; calibrate with such a rule, or with histogram=True in the qconfig"
        )
    for name, quantizer in chosen.items():
        try:
            quantizer.observer.check_rule(rules[name], **settings[name])
        except (ValueError, TypeError, RuntimeError) as error:
            raise type(error)(f"{_WHO}: {name}: {error}") from error


def _apply(prepared: PreparedModel, plan: ResolvePlan) -> None:
    """Sets the rules and solves; puts the previous rules back if that raises."""
    before: dict[Observer, tuple[Rule, dict[str, OptionValue]]] = {
        q.observer: (q.observer.name, q.observer.options) for q in plan.chosen.values()
    }
    try:
        for name, quantizer in plan.chosen.items():
            quantizer.observer.set_rule(plan.rules[name], **plan.settings[name])
        solutions = solve_quantizers(plan.chosen, prepared.read_weight)
        if solutions.unobserved:
            names = shown([f"{name} ({why})" for name, why in solutions.unobserved.items()])
            chosen = [plan.chosen[name] for name in solutions.unobserved]
            advice = ""
            if any(q.transient and prepared.read_weight(q) is None for q in chosen):
                advice = (
                    "; a weight is solved from the model that has it: resolve that, or give "
                    "activation_observer alone"
                )
            raise RuntimeError(
                f"{_WHO}: expected finite values to solve from, got none for {names}{advice}"
            )
    except BaseException:
        for observer, (rule, options) in before.items():
            observer.set_rule(rule, **options)
        raise
    with torch.no_grad():
        solutions.commit()
