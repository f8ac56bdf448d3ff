"""Combinations of rules and options to try: those that a caller lists, or the usual ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch_ext import _C
from torch_ext.ops.registry import OptionValue, encode_options, observer_info
from torch_ext.ops.registry_names import Rule
from torch_ext.utils.arguments import bounded

Candidates = Sequence[Rule] | Mapping[Rule, Mapping[str, OptionValue | Sequence[OptionValue]]]

# Rules whose range is given by their options, whatever the data.
_FIXED = ("fixed_scale", "clip")

# Values to try for the options of rules that depend much on them.
_USUAL: Mapping[Rule, Mapping[str, Sequence[OptionValue]]] = {
    "percentile": {"percentile": (99.9, 99.99, 99.999)},
    "clip_std": {"std_scale": (3.0, 4.0, 6.0)},
}


@dataclass(frozen=True)
class Choice:
    """A rule with values for all its options; as text ``percentile(99.9)``."""

    #: The rule's name.
    rule: Rule
    #: All its options by name.
    options: Mapping[str, OptionValue]

    def __str__(self) -> str:
        values = ", ".join(
            value if isinstance(value, str) else f"{value:g}" for value in self.options.values()
        )
        return f"{self.rule}({values})" if values else self.rule


def rules_that_look() -> list[Rule]:
    """The rules that derive a range from the data, in the registry's order."""
    return [rule for rule in _C.observers() if rule not in _FIXED]


def choice(rule: Rule, options: Mapping[str, OptionValue]) -> Choice:
    """A rule with the given options, and the defaults of the others.

    Raises ValueError for an unknown rule or option and for a value that the option does not take.
    """
    encode_options(rule, options)
    defaults = {row["name"]: row["default"] for row in observer_info(rule)["options"]}
    return Choice(rule, defaults | dict(options))


def parse_candidates(who: str, name: str, given: Candidates) -> list[Choice]:
    """Every combination of a rule and values of its options, each once.

    Args:
        who, name: the public function and its argument, for errors.
        given: names of rules; or for each rule its options, each a value or a list of values.

    Raises:
        TypeError: if `given` is of another type.
        ValueError: for unknown rules, options or values, and if there is no combination.
    """
    want = "names of rules, or a mapping of names to options"
    if isinstance(given, str) or not isinstance(given, (Sequence, Mapping)):
        raise TypeError(f"{who}: expected {name} to be {want}, got {bounded(given)}")
    if not given:
        raise ValueError(f"{who}: expected {name} to be {want}, got none")
    table = given if isinstance(given, Mapping) else {rule: {} for rule in given}
    choices: dict[str, Choice] = {}
    for rule, options in table.items():
        if not isinstance(options, Mapping):
            raise TypeError(
                f"{who}: expected {name}[{rule!r}] to be a mapping of options, got "
                f"{bounded(options)}"
            )
        values = [
            value if isinstance(value, (list, tuple)) else [value] for value in options.values()
        ]
        for combination in itertools.product(*values):
            candidate = choice(rule, dict(zip(options, combination, strict=True)))
            choices[str(candidate)] = candidate
    if not choices:
        raise ValueError(
            f"{who}: expected every option of {name} to have a value, got an empty list"
        )
    return list(choices.values())


def usual_candidates(check: Callable[[Choice], object]) -> list[Choice]:
    """The rules that look at the data, with the usual values of their options.

    Leaves out those for which `check` raises ValueError or RuntimeError, such as a rule that needs
    a histogram that was not kept, or fewer bits. If none is left, raises the last of these errors.
    """
    choices: list[Choice] = []
    last_error: Exception | None = None
    table = {rule: _USUAL.get(rule, {}) for rule in rules_that_look()}
    for candidate in parse_candidates("usual_candidates", "rules", table):
        try:
            check(candidate)
        except (ValueError, RuntimeError) as error:
            last_error = error
        else:
            choices.append(candidate)
    if last_error is not None and not choices:
        raise last_error
    return choices
