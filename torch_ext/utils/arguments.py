"""Checks of arguments, and the arguments of a model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

_MAX_SHOWN = 200  # characters of a value in a message
_MAX_ENTRIES = 6  # of a list or mapping in a message


def bounded(value: object) -> str:
    """A value as text for a message, of bounded length.

    That is its ``repr``, cut to 200 characters. Of a tensor it is the dtype and shape, of a module
    the class, because their ``repr`` is long.
    """
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} of shape {list(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a module {type(value).__name__}"
    text = repr(value)
    if len(text) <= _MAX_SHOWN:
        return text
    return f"{text[:_MAX_SHOWN]}... ({type(value).__name__})"


def parse_flag(who: str, name: str, value: object) -> bool:
    """Returns ``value``, the argument ``name`` of ``who``; raises TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: expected {name} to be True or False, got {bounded(value)}")
    return value


def check_callable(who: str, name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is None or callable."""
    if value is not None and not callable(value):
        raise TypeError(f"{who}: expected {name} to be a function or None, got {bounded(value)}")


def parse_integer(who: str, name: str, value: object, low: int, high: int) -> int:
    """Returns ``value``, the argument ``name`` of ``who``.

    Raises:
        TypeError: ``value`` is not an int, or is a bool.
        ValueError: ``value`` is outside ``low`` to ``high``, both included.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who}: expected {name} to be an integer, got {bounded(value)}")
    if not low <= value <= high:
        raise ValueError(f"{who}: expected {name} to be between {low} and {high}, got {value}")
    return value


def split_arguments(
    who: str, example_inputs: Any, name: str = "example_inputs"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments.

    A tensor is the only argument, a tuple or list holds positional ones, a mapping those by name.
    Raises TypeError for anything else.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise TypeError(
        f"{who}: expected {name} to be a tensor, a tuple of arguments or a mapping of "
        f"keyword arguments, got {bounded(example_inputs)}"
    )


def bound_arguments(
    who: str, model: nn.Module, example_inputs: Any, name: str = "example_inputs"
) -> dict[str, Any]:
    """Binds example inputs to the parameters of the model's forward.

    Args:
        who: the function that errors name.
        model: the module whose ``forward`` has the signature.
        example_inputs: one tensor (the first argument), a tuple or list of positional arguments,
            or a mapping of keyword arguments.
        name: what errors call them.

    Returns:
        Values by parameter name. Parameters left at their defaults are not included.

    Raises:
        TypeError: ``example_inputs`` is of another type, or does not fit the signature.
    """
    args, kwargs = split_arguments(who, example_inputs, name)
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(
            f"{who}: expected {name} to be the arguments of "
            f"{type(model).__name__}.forward, got others: {error}"
        ) from error


def structure(value: object) -> str:
    """An argument of a forward for a message that compares two: kinds and sizes, no numbers."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dim()} dimensions"
    if value is None or isinstance(value, (bool, str)):
        return repr(value)[:_MAX_SHOWN]
    if isinstance(value, Mapping):
        entries = [f"{key}: {structure(value[key])}" for key in list(value)[:_MAX_ENTRIES]]
        return f"a mapping of {len(value)} ({', '.join(entries)})"
    if isinstance(value, (tuple, list)):
        entries = [structure(entry) for entry in value[:_MAX_ENTRIES]]
        return f"a {type(value).__name__} of {len(value)} ({', '.join(entries)})"
    return f"a {type(value).__name__}"


class Structures:
    """The arguments of the examples, as :func:`structure` describes them, for messages."""

    def __init__(self, forward: Any, examples: Iterable[Mapping[str, Any]]) -> None:
        """``examples``: values by argument of ``forward``; those left at their defaults are out."""
        parameters = inspect.signature(forward).parameters
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        rest, more = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        self._positional = [name for name, kind in kinds.items() if kind not in (rest, more)]
        self._rest = next((name for name, kind in kinds.items() if kind is rest), "")
        self._more = next((name for name, kind in kinds.items() if kind is more), "")
        self._left_out = {}
        for name, parameter in parameters.items():
            default = () if name == self._rest else {} if name == self._more else parameter.default
            no_default = default is parameter.empty
            self._left_out[name] = "left out" if no_default else structure(default)
        self._seen: dict[str, dict[str, None]] = {name: {} for name in parameters}
        for example in examples:
            for name, text in self._described(example).items():
                self._seen[name][text] = None

    def _described(self, values: Mapping[str, Any]) -> dict[str, str]:
        return {
            name: structure(values[name]) if name in values else text
            for name, text in self._left_out.items()
        }

    def differences(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """What no example has of a call's arguments; empty if there is nothing."""
        values: dict[str, Any] = dict(zip(self._positional, args, strict=False))
        if self._rest:
            values[self._rest] = args[len(self._positional) :]
        more = {name: value for name, value in kwargs.items() if name not in self._left_out}
        values |= {name: value for name, value in kwargs.items() if name in self._left_out}
        if self._more:
            values[self._more] = more
        return "; ".join(
            f'the argument "{name}" is {text}, in the example {" or ".join(self._seen[name])}'
            for name, text in self._described(values).items()
            if text not in self._seen[name]
        )


def parse_fraction(who: str, name: str, value: object) -> float:
    """A number from 0 to 1; raises TypeError or ValueError, naming ``who`` and the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{who}: expected {name} to be a number, got {bounded(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{who}: expected {name} to be between 0 and 1, got {value}")
    return float(value)
