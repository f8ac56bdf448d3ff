"""Torch's functions as a function mode meets them: their names, and those that are run opened."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.prepare.insertion.operations import DROPOUTS, PLANNED

# What a mode is handed where Python's operators or attributes stand, by the name in the table.
_PYTHON = {
    "__getitem__": "getitem",
    "__rsub__": "sub",
    "__rdiv__": "div",
    "__rtruediv__": "div",
    "__rpow__": "pow",
}
_PREFIXES = ("", "r", "i")
# What torch.nn.functional's function calls, which is all that a mode sees.
_INNER = {"_grouped_mm": "grouped_mm"}
_ATTRIBUTES = {"T": "t", "mT": "transpose", "H": "t", "mH": "transpose"}

# Strict export hands these to a mode where eager code and torch.compile hand a tensor's method.
_OPERATORS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    operator.mul: "mul",
    operator.imul: "mul",
    operator.matmul: "matmul",
    operator.imatmul: "matmul",
}


def plain_name(function: Callable[..., Any]) -> str:
    """Torch's name of a function, a method or what an operator calls: ``add`` for all of them."""
    if function in _OPERATORS:
        return _OPERATORS[function]
    name = getattr(function, "__name__", "")
    if name == "__get__":
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        return _ATTRIBUTES.get(attribute, attribute)
    if name in _PYTHON:
        return _PYTHON[name]
    if name.startswith("__"):
        inner = name.strip("_")
        return next((n for n in ("add", "mul", "matmul") if inner in (n, f"r{n}", f"i{n}")), inner)
    if name in _INNER:
        return _INNER[name]
    return name if name.startswith("_") else name.rstrip("_")


def is_torchs(function: Callable[..., Any]) -> bool:
    """Whether a function is torch's; those of others that take part in the protocol are not."""
    home = getattr(function, "__module__", None) or "torch"
    return home.partition(".")[0] in ("torch", "_operator", "builtins")


def _spellings() -> dict[Any, str]:
    found = dict(_OPERATORS)
    for name in (*PLANNED, *DROPOUTS):
        dunders = [f"__{prefix}{name}__" for prefix in _PREFIXES]
        for home in (torch, Tensor, F, torch._C._nn):
            for spelling in (name, f"{name}_", *dunders):
                function = getattr(home, spelling, None)
                # Methods that are written in Python are not found by identity while compiling.
                if callable(function) and getattr(function, "__module__", "") != "torch._tensor":
                    found[function] = name
    found.update({getattr(torch, inner): name for inner, name in _INNER.items()})
    return found


# Every spelling of a function that may have a site. By the object: torch.compile cannot look up
# the ``__name__`` of a method.
SITE_NAMES = _spellings()

# These make a tensor of numbers, or of another's shape alone.
_MAKERS = ("arange", "linspace", "full", "zeros", "ones", "empty", "eye", "tensor", "scalar_tensor")
MAKERS = {
    function: True
    for home in (torch, Tensor)
    for name in _MAKERS
    for spelling in (name, f"{name}_like", f"new_{name}")
    if (function := getattr(home, spelling, None)) is not None
}

# Tensor's methods that are written in Python. They call ``super()``, which torch.compile cannot
# trace from a mode, so while compiling they are called as methods.
PYTHON_METHODS = {
    name: name
    for name, function in vars(Tensor).items()
    if isinstance(function, types.FunctionType) and not name.startswith("__")
}
PYTHON_FUNCTIONS = {
    function: name
    for home in (torch, F)
    for name in PYTHON_METHODS
    if isinstance(function := getattr(home, name, None), types.FunctionType)
}


def with_globals(function: Any, scope: dict[str, Any]) -> Any:
    """A copy of a Python function that finds ``scope`` among its module's names."""
    names = {**function.__globals__, **scope}
    names.pop("__name__", None)  # by which torch.compile would look in the module itself instead
    made = types.FunctionType(
        function.__code__,
        names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _no(*_: Any) -> bool:
    return False


def _check_mask(mask: Tensor, src_len: int, batch: int) -> None:
    # Its message is made by a closure, which torch.compile cannot trace from a mode.
    if not torch.compiler.is_compiling():
        F._check_key_padding_mask(mask, src_len, batch)  # type: ignore[attr-defined]


def _opened(function: Any) -> Any:
    """The same code that does not hand itself to a mode: its body runs under the mode."""
    asking = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope: dict[str, Any] = dict.fromkeys(asking, _no)
    return with_globals(function, scope | {"_check_key_padding_mask": _check_mask})


OPENED = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}


def _layer_by_layer(forward: Any) -> Any:
    """The same code without torch's fused inference paths, which call no layer."""
    replaced = types.ModuleType("torch")
    replaced.__dict__.update(torch.__dict__)
    mha = types.SimpleNamespace(get_fastpath_enabled=_no)
    replaced.backends = types.SimpleNamespace(mha=mha)  # type: ignore[attr-defined]
    return with_globals(forward, {"torch": replaced})


_ENCODER = _layer_by_layer(nn.TransformerEncoder.forward)


class _WithoutNorm:
    """A TransformerEncoder as its forward sees it, without the norm at its end."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder
        self.norm = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)


def _encoder(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """The forward of a TransformerEncoder without nested tensors; zeros where these give zeros."""
    out: Tensor = _ENCODER(_WithoutNorm(self), src, mask, src_key_padding_mask, is_causal)
    if src_key_padding_mask is not None and mask is None and _nests(self, src):
        padding = src_key_padding_mask
        padding = padding if padding.dtype is torch.bool else padding != 0
        aligned = torch._nested_tensor_from_mask_left_aligned
        if not getattr(self, "mask_check", True) or aligned(src, padding.logical_not()):
            out = out.masked_fill(padding.unsqueeze(-1), 0.0)
    return out if self.norm is None else self.norm(out)


def _nests(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether torch's forward makes the input nested, if its masks let it."""
    first: Any = encoder.layers[0]
    if first.training or src.dim() != 3 or not getattr(encoder, "use_nested_tensor", False):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(src.device.type):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in first.parameters()):
        return False
    return torch.backends.mha.get_fastpath_enabled()


LAYER_BY_LAYER: dict[Any, Any] = {
    nn.TransformerEncoder.forward: _encoder,
    **{
        forward: _layer_by_layer(forward)
        for forward in (nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward)
    },
}
