"""Attaches quantizers to the inputs of a model.

The model gets a subclass of its class, whose forward quantizes the arguments and then calls the
original forward. A hook would do the same, but ``torch.compile`` runs the hooks of a compiled
module outside of its graph and would compile another graph for them in each state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_ext.prepare.module_classes import Undo, class_with_forward, swap_class
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import INPUTS

# Annotations of arguments that get no quantizer.
_NOT_TENSORS = (int, float, bool, str, "int", "float", "bool", "str")


class InputQuantizers(nn.ModuleDict):
    """The quantizers of the arguments of a module's forward, by :func:`key_for` of the argument.

    Args:
        positional: the arguments that can be passed by position, in order.
        rest: the name of the ``*args`` argument, if there is one.
    """

    def __init__(self, positional: tuple[str, ...], rest: str | None) -> None:
        super().__init__()
        self.positional_arguments = positional
        self.rest_argument = rest

    def key_of(self, argument: str) -> str | None:
        """The key of an argument's quantizer; None if it has none."""
        key = key_for(argument)
        return key if key in self else None

    def key_at(self, position: int) -> str | None:
        """The key of the quantizer of a positional argument; None if it has none."""
        if position < len(self.positional_arguments):
            return self.key_of(self.positional_arguments[position])
        return self.key_of(self.rest_argument) if self.rest_argument else None


def key_for(argument: str) -> str:
    """The key for an argument's quantizer: its name, or ``values_`` for ``values``."""
    # A child cannot have the name of a method of its parent: `values`, `float`, ...
    return f"{argument}_" if hasattr(nn.ModuleDict, argument) else argument


def input_host(who: str, root: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module that get the input quantizers as a child.

    That is the root, or the first step of a Sequential, because a Sequential calls every child.

    Raises:
        ValueError: that module cannot have such a child; the message says why.
    """
    name, host = "", root
    while type(host).forward is nn.Sequential.forward and len(list(host.children())) > 0:
        step, host = next(host.named_children())
        name = f"{name}.{step}" if name else step
    names = [n for n, m in root.named_modules(remove_duplicate=False) if m is host]
    problem = ""
    if "forward" in vars(host):
        problem = "its forward is an attribute of the instance"
    elif isinstance(host, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        problem = f'"{name}" is a container that may run each of its children'
    elif len(names) > 1:
        problem = f"its first step is used at several places: {', '.join(names)}"
    if problem:
        raise ValueError(
            f"{who}: cannot quantize the inputs, as {problem}; pass input_qconfig=None "
            "and put a torch_ext.QuantStub() first"
        )
    return name, host


def input_arguments(host: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a module's forward that get a quantizer, by name.

    Those are all without a default value, unless annotated as numbers, bools or text.
    """
    return {
        name: parameter
        for name, parameter in inspect.signature(host.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and parameter.annotation not in _NOT_TENSORS
    }


def attach_inputs(host: nn.Module, quantizers: Mapping[str, FakeQuantize]) -> Undo:
    """Adds the quantizers and swaps the class; returns the function that undoes it."""
    remove = add_inputs(host, quantizers)
    swap_back = swap_class(host, class_with_inputs)

    def undo() -> None:
        swap_back()
        remove()

    return undo


def add_inputs(host: nn.Module, quantizers: Mapping[str, FakeQuantize]) -> Undo:
    """Adds the quantizers as a child without calling them; returns the function that undoes it."""
    parameters = inspect.signature(host.forward).parameters.values()
    positional = tuple(
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    inputs = InputQuantizers(positional, rest)
    for argument, quantizer in quantizers.items():
        inputs[key_for(argument)] = quantizer
    inputs.train(host.training)
    host.add_module(INPUTS, inputs)
    return lambda: delattr(host, INPUTS)


def class_with_inputs(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward quantizes the arguments and then calls that of ``base``."""
    return _class_with_inputs(base)  # type: ignore[arg-type]


@functools.cache  # so that models of one class share the subclass
def _class_with_inputs(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        new_args, new_kwargs = _quantize(self, args, kwargs)
        return base.forward(self, *new_args, **new_kwargs)

    return class_with_forward(base, forward, class_with_inputs)


def _quantize(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = module.input_quantizers
    assert isinstance(inputs, InputQuantizers)
    new_args = tuple(
        value if (key := inputs.key_at(i)) is None else through(inputs[key], value)
        for i, value in enumerate(args)
    )
    new_kwargs = {
        name: value if (key := inputs.key_of(name)) is None else through(inputs[key], value)
        for name, value in kwargs.items()
    }
    return new_args, new_kwargs


def through(quantizer: Any, value: Any) -> Any:
    """Quantizes the floating tensors in a value; lists, tuples and dicts are copied."""
    if isinstance(value, Tensor):
        return quantizer(value) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(through(quantizer, entry) for entry in value)
    if type(value) is dict:
        return {key: through(quantizer, entry) for key, entry in value.items()}
    return value
