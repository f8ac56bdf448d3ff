"""Attention and Transformer layers of torch, whose parts read quantized.

In eval mode and without gradients torch runs them by fused kernels that call no layer. While a
quantizer in them is active they run a copy of their forward that does without these. Attention
does not call its ``out_proj`` either, but passes its weight to a function; in a copy of that
function the product with it reads through the quantizer of ``out_proj``'s input.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.prepare.insertion.functions import LAYER_BY_LAYER, OPENED, with_globals
from torch_ext.prepare.module_calls.arguments import (
    all_idle,
    derived_class,
    quantized_arguments,
)
from torch_ext.prepare.module_classes import Forward
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.transition import INPUTS


class _Running(threading.local):
    """The quantizer that the product with ``out_proj``'s weight reads through, in this thread."""

    def __init__(self) -> None:
        # In every thread's own dict: torch.compile cannot guard a default that the class has.
        self.out_proj: Any = None


_RUNNING = _Running()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` as the copy of ``F.multi_head_attention_forward`` has it, for out_proj alone."""
    quantizer = _RUNNING.out_proj
    return F.linear(x if quantizer is None else quantizer(x), weight, bias)


def _functional() -> types.ModuleType:
    replaced = types.ModuleType("functional")
    replaced.__dict__.update(F.__dict__)
    opened = OPENED[F.multi_head_attention_forward]
    replaced.__dict__["multi_head_attention_forward"] = with_globals(opened, {"linear": _linear})
    return replaced


_LAYER_BY_LAYER = {
    **LAYER_BY_LAYER,
    nn.MultiheadAttention.forward: with_globals(
        LAYER_BY_LAYER[nn.MultiheadAttention.forward], {"F": _functional()}
    ),
}


def has_fused_path(module: nn.Module) -> bool:
    """Whether it is attention or a Transformer layer whose forward is torch's own."""
    return type(module).forward in _LAYER_BY_LAYER


def class_layer_by_layer(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass that calls layer by layer while a quantizer in it is active.

    If the module has quantizers of its arguments, it quantizes these too.
    """
    return derived_class(base, class_layer_by_layer, _forward_layer_by_layer)


def _forward_layer_by_layer(base: type[nn.Module]) -> Forward:
    layered = _LAYER_BY_LAYER[base.forward]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if all_idle(_quantizers(self)):
            return base.forward(self, *args, **kwargs)
        if INPUTS in self._modules:
            args, kwargs = quantized_arguments(self, args, kwargs)
        before = _RUNNING.out_proj
        _RUNNING.out_proj = _quantizer_of_out_proj(self)
        try:
            return layered(self, *args, **kwargs)
        finally:
            _RUNNING.out_proj = before

    return forward


def _quantizers(module: nn.Module) -> Iterator[FakeQuantize]:
    for part in module.modules():
        if isinstance(part, FakeQuantize):
            yield part


def _quantizer_of_out_proj(module: nn.Module) -> Any:
    inputs = getattr(getattr(module, "out_proj", None), INPUTS, None)
    return None if inputs is None else inputs["input"]
