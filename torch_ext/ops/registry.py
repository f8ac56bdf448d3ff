"""Look-ups in the native registry, and rule options encoded as the numbers that ops take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch_ext import _C
from torch_ext.ops.registry_names import Rule
from torch_ext.utils.text import joined

OptionValue = float | str
Options = Mapping[str, OptionValue] | Sequence[float]


def rule_names() -> tuple[Rule, ...]:
    """The rules, in the registry's order."""
    return _C.observers()


def observer_info(rule: str) -> _C.ObserverInfo:
    """The registry's entry of a rule: kind, statistic, most bits of its grid, options.

    Raises:
        ValueError: no such rule; the message lists the known ones.
    """
    if not isinstance(rule, str) or rule not in _C.observers():
        raise ValueError(f"unknown observer {_quoted(rule)}; known: {joined(_C.observers())}")
    return _C.observer_info(rule)


def fake_quant_info(method: str) -> _C.FakeQuantInfo:
    """The registry's entry of a fake-quant method: whether and what it learns, and its start.

    Raises:
        ValueError: no such method; the message lists the known ones.
    """
    if not isinstance(method, str) or method not in _C.fake_quants():
        raise ValueError(f"unknown fake-quant {_quoted(method)}; known: {joined(_C.fake_quants())}")
    return _C.fake_quant_info(method)


def _quoted(name: object) -> str:
    return f'"{name}"' if isinstance(name, str) else repr(name)


def encode_options(rule: str, options: Options) -> list[float]:
    """Encodes a rule's options as an op takes them: numbers, in the order of the rule's table.

    Args:
        rule: a rule of the registry.
        options: values by name, defaults for those left out; or all values in the order of the
            table, choices as names or as indices. An empty sequence means the defaults.

    Returns:
        One number per option; a choice (``kl``'s ``variant``) as its index.

    Raises:
        ValueError: an unknown rule, option or choice, a value out of bounds, or a sequence of
            another length.
        TypeError: a value that is no number, or for a choice no text.
    """
    table = observer_info(rule)["options"]
    if not isinstance(options, Mapping):
        if len(options) not in (0, len(table)):
            raise ValueError(
                f"{rule}: expected options to be {len(table)} numbers, got {len(options)}"
            )
        given: Sequence[OptionValue] = options or [row["default"] for row in table]
        return [_encode(rule, row, value, True) for row, value in zip(table, given, strict=True)]
    names = [row["name"] for row in table]
    for name in options:
        if name not in names:
            raise ValueError(f"{rule}: unknown option {_quoted(name)}; known: {joined(names)}")
    return [_encode(rule, row, options.get(row["name"], row["default"])) for row in table]


def _encode(rule: str, row: _C.OptionInfo, value: OptionValue, encoded: bool = False) -> float:
    """Encodes one value; with ``encoded`` a choice may also be given as its index."""
    name, choices = row["name"], row["choices"]
    if choices and isinstance(value, str):
        if value not in choices:
            raise ValueError(f"{rule}: unknown {name} {_quoted(value)}; known: {joined(choices)}")
        return float(choices.index(value))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or (choices and not encoded):
        want = "one of " + joined(choices) if choices else "a number"
        raise TypeError(f"{rule}: expected {name} to be {want}, got {value!r}")
    assert isinstance(value, (int, float))
    low, high = row["minimum"], row["maximum"]
    if not low <= value <= high:
        raise ValueError(f"{rule}: expected {name} to be between {low:g} and {high:g}, got {value}")
    return float(value)
