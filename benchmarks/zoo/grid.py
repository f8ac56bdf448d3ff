"""Counts the convolutions, linear layers and products that read what is on a quantizer's grid.

It knows nothing of plans: it looks at the operands themselves, while the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Name of a function -> positions of its activations, and of its weight if it has one.
_CONVOLUTIONS = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
_OPERANDS: dict[str, tuple[tuple[int, ...], int | None]] = {
    **dict.fromkeys([*_CONVOLUTIONS, "linear"], ((0,), 1)),
    "deform_conv2d": ((0,), 1),
    "bilinear": ((0, 1), 2),
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), ((0, 1), None)),
    "__rmatmul__": ((0, 1), None),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), ((1, 2), None)),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), ((0, 1), None)),
    "scaled_dot_product_attention": ((0, 1, 2), None),
    "multi_head_attention_forward": ((0, 1, 2), None),
}
_NAMES = {
    "input": 0,
    "weight": 1,
    "other": 1,
    "mat1": 1,
    "mat2": 2,
    "batch1": 1,
    "batch2": 2,
    "query": 0,
    "key": 1,
    "value": 2,
}
# Values that are looked at: first, of an operand, and of each output channel. Where a few dozen
# numbers are whole multiples of a scale, bit for bit, the others are.
_PROBES, _MOST, _OF_CHANNEL = 64, 4096, 64


class Call:
    """One call of a function: whether each operand is on a grid, and what the operands were."""

    def __init__(self, name: str, operands: list[Tensor], on_grid: list[bool]) -> None:
        self.name = name
        weighted = _OPERANDS.get(name, ((), None))[1] is not None
        self.constant = [] if weighted else [operand.detach().clone() for operand in operands]
        self.on_grid = on_grid


class GridCount(TorchFunctionMode):
    """Notes each call; ``scales``: those of all quantizers, per tensor or per channel.

    Dropouts pass their input on, so that a run in train mode keeps values on their grids.
    """

    def __init__(self, scales: list[Tensor]) -> None:
        super().__init__()
        self._one = torch.stack([s.flatten()[0] for s in scales if s.numel() == 1] or [_NONE])
        self._several = [s.flatten() for s in scales if s.numel() > 1]
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"):
            return args[0].clone()
        if name == "einsum":
            given = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
            if len(given) > 1:
                self._note(name, [(x, False) for x in given])
        elif name in _OPERANDS:
            activations, weight = _OPERANDS[name]
            places = {**dict(enumerate(args)), **_by_place(name, kwargs)}
            found = [(places[i], False) for i in activations]
            if weight is not None:
                found.append((places[weight], True))
            self._note(name, found)
        return func(*args, **kwargs)

    def _note(self, name: str, operands: list[tuple[Tensor, bool]]) -> None:
        known = [x for x, _ in operands]
        if all(x.is_floating_point() for x in known):
            self.calls.append(Call(name, known, [self._on_grid(x, w) for x, w in operands]))

    def _on_grid(self, x: Tensor, weight: bool) -> bool:
        x = x.detach()
        values = x.flatten()[:: max(1, x.numel() // _MOST)]
        values = values[values != 0]
        if not values.numel():
            return True
        probe = values[:: max(1, values.numel() // _PROBES)]
        fits = _whole(probe, self._one[:, None]).all(dim=1) & (self._one > 0)
        for scale in self._one[fits]:
            if bool(_whole(values, scale).all()):
                return True
        if not weight and x.dim() != 2:
            return False
        return any(self._by_channel(x, axis) for axis in (0, 1)) or (weight and self._in_groups(x))

    def _by_channel(self, x: Tensor, axis: int) -> bool:
        """Whether each slice has its own scale, all of them one after the other in a quantizer's.

        A part of a weight, such as the query's of a fused projection, has a part of its scales.
        """
        rows = x.shape[axis]
        x = x.movedim(axis, 0).reshape(rows, -1)
        x = x[:, :: max(1, x.shape[1] // _OF_CHANNEL)]
        probe = x[0]
        for scale in self._several:
            if len(scale) < rows:
                continue
            step = math.gcd(len(scale), rows)
            starts = scale[: len(scale) - rows + 1 : step]
            for i in _whole(probe, starts[:, None]).all(dim=1).nonzero().flatten().tolist():
                part = scale[i * step : i * step + rows]
                if bool(_whole(x, part[:, None]).all()):
                    return True
        return False

    def _in_groups(self, x: Tensor) -> bool:
        """A transposed convolution's weight has a scale for each of its outputs, groups apart."""
        if x.dim() < 3:
            return False
        for scale in self._several:
            if len(scale) % x.shape[1] == 0 and x.shape[0] % (len(scale) // x.shape[1]) == 0:
                groups = len(scale) // x.shape[1]
                split = x.reshape(groups, -1, *x.shape[1:])
                shaped = scale.view(groups, 1, x.shape[1], *([1] * (x.dim() - 2)))
                probe = split[:1, :1]
                if bool(_whole(probe, shaped[:1]).all()) and bool(_whole(split, shaped).all()):
                    return True
        return False


_NONE = torch.zeros(())


def _by_place(name: str, kwargs: Mapping[str, Any]) -> dict[int, Any]:
    shift = dict(_NAMES)
    if name in ("matmul", "mm", "bmm"):
        shift["mat2"] = 1
    return {shift[key]: value for key, value in kwargs.items() if key in shift}


def _whole(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round() * scale == x


def all_on_grid(calls: list[Call]) -> bool:
    return all(all(call.on_grid) for call in calls)


def shares(first: list[Call], second: list[Call]) -> tuple[int, int, list[str]]:
    """Of calls in two runs on different inputs: how many are on a grid, of how many; the others.

    A call whose operands are the same in both runs computes constants, such as rotary angles,
    and does not count.
    """
    aligned = first is not second and [c.name for c in first] == [c.name for c in second]
    on, total, off = 0, 0, []
    for i, call in enumerate(first):
        if aligned and _is_constant(call, second[i]):
            continue
        total += 1
        good = all(call.on_grid) and (not aligned or all(second[i].on_grid))
        on += good
        if not good:
            where = [k for k, fits in enumerate(call.on_grid) if not fits]
            off.append(f"{call.name} {i}: operand {where}")
    return on, total, off


def _is_constant(call: Call, other: Call) -> bool:
    return bool(call.constant) and all(map(torch.equal, call.constant, other.constant))
