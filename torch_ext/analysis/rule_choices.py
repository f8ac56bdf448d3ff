"""Rules with options to choose among: what a caller lists, or the usual ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch_ext import _C
from torch_ext.ops.registry import OptionValue, encode_options, observer_info
from torch_ext.ops.registry_names import Rule
from torch_ext.utils.arguments import bounded

Candidates = Sequence[Rule] | Mapping[Rule, Mapping[str, OptionValue | Sequence[OptionValue]]]

# Rules that are told their range: their defaults say nothing about the data.
_TOLD = ("fixed_scale", "clip")

# Rules whose option is worth more than one try.
_USUAL: Mapping[Rule, Mapping[str, Sequence[OptionValue]]] = {
    "percentile": {"percentile": (99.9, 99.99, 99.999)},
    "clip_std": {"std_scale": (3.0, 4.0, 6.0)},
}


@dataclass(frozen=True)
class Choice:
    """A rule with values for all its options."""

    rule: Rule
    options: Mapping[str, OptionValue]

    def __str__(self) -> str:
        values = ", ".join(
            value if isinstance(value, str) else f"{value:g}" for value in self.options.values()
        )
        return f"{self.rule}({values})" if values else self.rule


def rules_that_look() -> list[Rule]:
    """The rules that find a range in the data, instead of being told one."""
    return [rule for rule in _C.observers() if rule not in _TOLD]


def choice(rule: Rule, options: Mapping[str, OptionValue]) -> Choice:
    """With the defaults of the options that are not given; refuses unknown names and values."""
    encode_options(rule, options)
    defaults = {row["name"]: row["default"] for row in observer_info(rule)["options"]}
    return Choice(rule, defaults | dict(options))


def parse_candidates(who: str, name: str, given: Candidates) -> list[Choice]:
    """Every combination of the options' values, each once."""
    want = "names of rules, or a mapping of names to options"
    if isinstance(given, str) or not isinstance(given, (Sequence, Mapping)):
        raise TypeError(f"{who}: expected {name} to be {want}, got {bounded(given)}")
    if not given:
        raise ValueError(f"{who}: expected {name} to be {want}, got none")
    table = given if isinstance(given, Mapping) else {rule: {} for rule in given}
    found: dict[str, Choice] = {}
    for rule, options in table.items():
        if not isinstance(options, Mapping):
            raise TypeError(
                f"{who}: expected {name}[{rule!r}] to be a mapping of options, got "
                f"{bounded(options)}"
            )
        values = [v if isinstance(v, (list, tuple)) else [v] for v in options.values()]
        for combination in itertools.product(*values):
            made = choice(rule, dict(zip(options, combination, strict=True)))
            found[str(made)] = made
    if not found:
        raise ValueError(
            f"{who}: expected every option of {name} to have a value, got an empty list"
        )
    return list(found.values())


def usual_candidates(refuse: Callable[[Choice], object]) -> list[Choice]:
    """The rules that look at the data with their usual options, less those that `refuse` raises
    for: a rule may want a histogram, or fewer bits. Raises the last refusal where none is left.
    """
    found: list[Choice] = []
    refusal: Exception | None = None
    table = {rule: _USUAL.get(rule, {}) for rule in rules_that_look()}
    for one in parse_candidates("usual_candidates", "rules", table):
        try:
            refuse(one)
        except (ValueError, RuntimeError) as error:
            refusal = error
        else:
            found.append(one)
    if refusal is not None and not found:
        raise refusal
    return found
