"""Solving again without data: another rule, or other options, on the statistics that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_ext.ops.registry import OptionValue, observer_info
from torch_ext.ops.registry_names import Rule
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import Pattern, PreparedModel
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.solve import solve_quantizers
from torch_ext.utils.text import joined, shown

_WHO = "resolve"


def resolve(
    model: nn.Module,
    activation_observer: Rule | None = None,
    weight_observer: Rule | None = None,
    pattern: Pattern | None = None,
    **options: OptionValue,
) -> None:
    """Gives quantizers a rule and its options, and solves them anew from what was observed.

    Activations are solved from their statistics, weights from the weights. An option goes to the
    side whose rule has it::

        resolve(model, activation_observer="percentile", percentile=99.9)
        resolve(model, weight_observer="mse")
        resolve(model, percentile=99.99)          # the rule stays

    A rule that reads a histogram needs one: calibrate with such a rule (``percentile``, ``kl``,
    ...) or with ``histogram=True`` among the keys of the qconfig. Quantizers that saw no data, and
    those with a given scale (``fixed_scale``) in the qconfig, are left as they are.
    Refused: nothing changes.
    """
    prepared = PreparedModel(_WHO, model)
    _apply(
        prepared, plan_resolve(prepared, activation_observer, weight_observer, pattern, **options)
    )


class ResolvePlan(NamedTuple):
    """What a call of :func:`resolve` would do, checked; by name of the quantizer."""

    chosen: dict[str, FakeQuantize]
    rules: dict[str, Rule]
    settings: dict[str, dict[str, Any]]


def plan_resolve(
    prepared: PreparedModel,
    activation_observer: Rule | None = None,
    weight_observer: Rule | None = None,
    pattern: Pattern | None = None,
    **options: OptionValue,
) -> ResolvePlan:
    """Raises what :func:`resolve` would refuse; changes nothing."""
    selected = prepared.select(pattern)
    wanted = {False: activation_observer, True: weight_observer}
    if activation_observer is None and weight_observer is None:
        sides = {False, True}
    else:
        sides = {side for side, rule in wanted.items() if rule is not None}
    chosen = {name: q for name, q in selected.items() if q.transient in sides and _has_data(q)}
    if not chosen:
        raise ValueError(f"{_WHO}: expected quantizers that saw data, found none; calibrate first")

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


def _has_data(quantizer: FakeQuantize) -> bool:
    return quantizer.transient or quantizer.observer.saw_data


def _known(rule: str) -> list[str]:
    return [row["name"] for row in observer_info(rule)["options"]]


def _options(
    quantizer: FakeQuantize, rule: str, given: Mapping[str, OptionValue]
) -> dict[str, Any]:
    """The given options that the rule has; where the rule stays, those it had are the defaults."""
    known = _known(rule)
    kept = quantizer.observer.options if rule == quantizer.observer.name else {}
    return kept | {name: value for name, value in given.items() if name in known}


def _check(
    chosen: Mapping[str, FakeQuantize],
    rules: Mapping[str, Rule],
    settings: Mapping[str, Mapping[str, OptionValue]],
) -> None:
    without = [
        name
        for name, quantizer in chosen.items()
        if observer_info(rules[name])["statistic"] == "histogram"
        and not (quantizer.transient or quantizer.observer.has_histogram)
    ]
    if without:
        raise ValueError(
            f"{_WHO}: {rules[without[0]]} reads a histogram, but none was kept for "
            f"{shown(without)}; calibrate with such a rule, or with histogram=True in the qconfig"
        )
    for name, quantizer in chosen.items():
        try:
            quantizer.observer.check_rule(rules[name], **settings[name])
        except (ValueError, TypeError, RuntimeError) as error:
            raise type(error)(f"{_WHO}: {name}: {error}") from error


def _apply(prepared: PreparedModel, plan: ResolvePlan) -> None:
    before: dict[Observer, tuple[Rule, dict[str, OptionValue]]] = {
        q.observer: (q.observer.name, q.observer.options) for q in plan.chosen.values()
    }
    try:
        for name, quantizer in plan.chosen.items():
            quantizer.observer.set_rule(plan.rules[name], **plan.settings[name])
        solutions = solve_quantizers(plan.chosen, prepared.read_weight)
        if solutions.unobserved:
            names = shown([f"{name} ({why})" for name, why in solutions.unobserved.items()])
            raise RuntimeError(f"{_WHO}: nothing to solve from: {names}")
    except BaseException:
        for observer, (rule, options) in before.items():
            observer.set_rule(rule, **options)
        raise
    with torch.no_grad():
        solutions.commit()
