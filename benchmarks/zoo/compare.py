"""Compares outputs of any structure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[Any]:
    """``(path, class, tensor or plain value)`` of everything in an output, objects included."""
    if id(value) in seen:
        return
    inner = seen | {id(value)}
    if isinstance(value, Tensor) or value is None or isinstance(value, (int, float, str, bool)):
        yield path, type(value), value
        return
    yield path, type(value), None
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        items = vars(value).items()
    else:
        return
    for key, part in items:
        yield from leaves(part, f"{path}.{key}", inner)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for _, _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def difference(a: Any, b: Any) -> str:
    """Where two outputs differ, in classes, structure or bits; empty if nowhere."""
    first, second = list(leaves(a)), list(leaves(b))
    if [leaf[:2] for leaf in first] != [leaf[:2] for leaf in second]:
        return "structure or classes"
    for (path, _, left), (_, _, right) in zip(first, second, strict=True):
        equal = same_bits(left, right) if isinstance(left, Tensor) else left == right
        if not equal:
            return f"output{path}"
    return ""


def _floats(value: Any) -> Tensor | None:
    found = [t.detach().double().flatten() for t in tensors(value) if t.is_floating_point()]
    return torch.cat(found) if found else None


def sqnr(reference: Any, other: Any) -> float | None:
    """Signal to noise in dB over all floating outputs; None if they cannot be compared."""
    a, b = _floats(reference), _floats(other)
    if a is None or b is None or a.shape != b.shape:
        return None
    finite = a.isfinite() & b.isfinite() & (a.abs() < 1e30)
    a, b = a[finite], b[finite]
    noise, signal = float((a - b).square().sum()), float(a.square().sum())
    if signal == 0 or not a.numel():
        return None
    return 999.0 if noise == 0 else round(10 * math.log10(signal / noise), 1)
