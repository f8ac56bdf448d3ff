"""Quantizers of the arguments of a module's call: of a layer's input, of a model's inputs.

The module gets a subclass of its class, whose forward quantizes the arguments and then calls the
original forward. A hook would do the same, but ``torch.compile`` runs the hooks of a compiled
module outside of its graph and would compile another graph for them in each state. Hooks would
also keep torch's Transformer layers off their fused path in FLOAT, where they round differently.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_ext.prepare.module_classes import (
    Forward,
    MakeClass,
    Undo,
    class_with_forward,
)
from torch_ext.prepare.quantizable_modules import Reads
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.transition import INPUTS

# Annotations of arguments that get no quantizer.
_NOT_TENSORS = (int, float, bool, str, "int", "float", "bool", "str")
# A tensor, and what a quantizer made of it.
Seen = list[tuple[Tensor, Tensor]]


class InputQuantizers(nn.ModuleDict):
    """The quantizers of the arguments of a module's forward, by :func:`key_for` of the argument.

    Args:
        positional: the arguments that can be passed by position, in order.
        rest: the name of the ``*args`` argument, if there is one.
        pair: whether nothing is quantized unless all arguments are floating tensors: a product
            or a sum with a number is none of two values.
    """

    def __init__(self, positional: tuple[str, ...], rest: str | None, pair: bool = False) -> None:
        super().__init__()
        self.positional_arguments = positional
        self.rest_argument = rest
        self.pair = pair

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
    name, host = end_of(root, 0)
    if problem := host_problem(root, name, host, "first"):
        raise ValueError(
            f"{who}: cannot quantize the inputs, as {problem}; pass input_qconfig=None "
            "and put a torch_ext.QuantStub() first"
        )
    return name, host


def end_of(root: nn.Module, position: int) -> tuple[str, nn.Module]:
    """The root's name and itself; of a Sequential, those of its first (0) or last (-1) step."""
    name, host = "", root
    while type(host).forward is nn.Sequential.forward and host._modules:
        # With a step that is there twice under each of its names, which named_children() has not.
        step, host = list(host._modules.items())[position]  # type: ignore[assignment]
        name = f"{name}.{step}" if name else step
    return name, host


def host_problem(root: nn.Module, name: str, host: nn.Module, which: str) -> str:
    """Why a module cannot have quantizers of its arguments or results; empty if it can."""
    if "forward" in vars(host):
        return "its forward is an attribute of the instance"
    if isinstance(host, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return f'"{name}" is a container that may run each of its children'
    names = [n for n, m in root.named_modules(remove_duplicate=False) if m is host]
    return f"its {which} step is used at several places: {', '.join(names)}" if names[1:] else ""


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


def read_arguments(who: str, name: str, module: nn.Module, reads: Reads) -> dict[str, bool]:
    """The arguments that a module reads quantized, and whether their quantizers may see no data.

    That may happen to the second operand if it is the first again, and to both beside a number.

    Raises:
        ValueError: the forward cannot be replaced, or takes no such argument.
    """
    problem = ""
    arguments = list(input_arguments(module))
    if reads is Reads.FIRST:
        kinds = inspect.signature(module.forward).parameters.values()
        arguments = [p.name for p in kinds if p.kind is not p.VAR_KEYWORD][:1]
    if "forward" in vars(module):
        problem = "an attribute of the instance"
    elif not arguments:
        problem = "one without arguments"
    if problem:
        raise ValueError(
            f'{who}: expected the forward of "{name}" to be a method that takes its input, got '
            f"{problem}; give the module qconfig=None"
        )
    return {argument: i > 0 or reads is Reads.PAIR for i, argument in enumerate(arguments)}


def add_inputs(host: nn.Module, quantizers: Mapping[str, FakeQuantize], pair: bool = False) -> Undo:
    """Adds the quantizers as a child without calling them; returns the function that undoes it."""
    parameters = inspect.signature(host.forward).parameters.values()
    positional = tuple(
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    inputs = InputQuantizers(positional, rest, pair)
    for argument, quantizer in quantizers.items():
        inputs[key_for(argument)] = quantizer
    inputs.train(host.training)
    host.add_module(INPUTS, inputs)
    return lambda: delattr(host, INPUTS)


def class_with_inputs(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward quantizes the arguments and then calls that of ``base``."""
    return derived_class(base, class_with_inputs, _forward_with_inputs)


def _forward_with_inputs(base: type[nn.Module]) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        new_args, new_kwargs = quantized_arguments(self, args, kwargs)
        return base.forward(self, *new_args, **new_kwargs)

    return forward


_DERIVED: dict[tuple[type[nn.Module], MakeClass], type[nn.Module]] = {}


def derived_class(
    base: type[nn.Module], make_class: MakeClass, make_forward: Callable[..., Forward]
) -> type[nn.Module]:
    """The subclass of ``base`` with the forward that is made of it; modules of a class share it."""
    known = _DERIVED.get((base, make_class))
    if known is not None:
        return known
    forward = functools.wraps(base.forward)(make_forward(base))
    made = class_with_forward(base, forward, make_class, prefix="")
    if base.__module__ != parametrize.__name__:  # such a class is one module's own
        _DERIVED[base, make_class] = made
    return made


def quantized_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the module's :class:`InputQuantizers` make of its arguments.

    A tensor that comes several times goes through one quantizer, once.
    """
    inputs = module._modules[INPUTS]
    assert isinstance(inputs, InputQuantizers)
    if all_idle(inputs.values()) or (inputs.pair and not _all_floating((*args, *kwargs.values()))):
        return args, kwargs
    seen: Seen = []
    new_args = tuple(
        value if (key := inputs.key_at(i)) is None else _through(inputs[key], value, seen)
        for i, value in enumerate(args)
    )
    new_kwargs = {
        name: value if (key := inputs.key_of(name)) is None else _through(inputs[key], value, seen)
        for name, value in kwargs.items()
    }
    return new_args, new_kwargs


def all_idle(quantizers: Iterable[Any]) -> bool:
    """Whether no quantizer observes or quantizes now."""
    return all(quantizer.idle for quantizer in quantizers)


def made_before(value: Tensor, seen: Seen) -> Tensor | None:
    """What a quantizer made of the tensor before in this call, if one did."""
    for before, made in seen:
        if before is value:
            return made
    return None


def quantized_once(quantizer: Any, value: Tensor, seen: Seen) -> Tensor:
    """What the quantizer makes of a tensor, or what was made of it before in this call."""
    made = made_before(value, seen)
    if made is None:
        made = quantizer(value)
        seen.append((value, made))
    return made


def _all_floating(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _through(quantizer: Any, value: Any, seen: Seen) -> Any:
    """Quantizes the floating tensors in a value; lists, tuples and dicts are copied."""
    if isinstance(value, Tensor):
        return quantized_once(quantizer, value, seen) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_through(quantizer, entry, seen) for entry in value)
    if type(value) is dict:
        return {key: _through(quantizer, entry, seen) for key, entry in value.items()}
    return value
