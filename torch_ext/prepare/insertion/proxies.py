"""What stands for values while a forward is traced."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

Tracer = Any  # of tracer.py, which imports this module

_ATTENTION = nn.functional.multi_head_attention_forward


class Value(fx.Proxy):
    """A proxy that answers with the example's value where Python needs one."""

    tracer: Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what isinstance sees
        value = self.tracer.value(self)
        return Tensor if isinstance(value, Tensor) else type(value)

    def __getattr__(self, name: str) -> Attribute:
        if not hasattr(self.tracer.value(self), name):
            raise AttributeError(name)
        return Attribute(self, name)

    def __len__(self) -> int:
        return int(self.tracer.length(self))

    def __iter__(self) -> Iterator[Any]:
        items: Iterator[Any] = self.tracer.iter(self)
        return items

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __contains__(self, key: Any) -> bool:
        if not isinstance(self.tracer.value(self), Mapping):
            return any(one is key or one == key for one in self)
        return key in self.tracer.value(self)

    def __index__(self) -> int:
        return operator.index(self.tracer.decided(self))

    def __int__(self) -> int:
        return int(self.tracer.decided(self))

    def __float__(self) -> float:
        return float(self.tracer.decided(self))


class Attribute(fx.proxy.Attribute, Value):
    """``x.shape``, ``x.view``: a node of its own only where it is not called."""


class Factories(TorchFunctionMode):
    """Records tensors that a forward makes of nothing, which a trace would take for constants."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.tracer.evaluating:
            return func(*args, **kwargs)
        if func is _ATTENTION:  # its linear layers and products are wanted, not the whole
            with self, _looked_into():
                return func(*args, **kwargs)
        if _has_proxy((args, kwargs)):
            return func(*args, **kwargs)
        with self.tracer.evaluation():
            made = func(*args, **kwargs)
        if not isinstance(made, Tensor):
            return made
        return self.tracer.create_proxy("call_function", func, args, kwargs)


def _has_proxy(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_has_proxy, value))
    if type(value) is dict:
        return any(map(_has_proxy, value.values()))
    return issubclass(type(value), fx.Proxy)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Functions that are marked by ``torch.fx.wrap`` are traced, instead of being recorded."""
    marked: dict[Any, Any] = getattr(fx._symbolic_trace, "_wrapped_fns_to_patch", {})
    before = dict(marked)
    marked.clear()
    try:
        yield
    finally:
        marked.update(before)


@contextlib.contextmanager
def _looked_into() -> Iterator[None]:
    """torch.nn.functional's own Python functions run on proxies, instead of being recorded."""
    home: Any = nn.functional
    before = home.has_torch_function
    home.has_torch_function = lambda _: False
    try:
        yield
    finally:
        home.has_torch_function = before
