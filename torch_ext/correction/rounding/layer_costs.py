"""Sums over the data of what errors of a layer's weight cost, and what it should compute."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_ext.correction.rounding.layer_rows import LayerRows
from torch_ext.correction.walk.layer_walk import LayerCall

_PIECE = 1 << 22  # values that are unfolded at a time
_CONSTANT = 1e-10  # an input whose variance is a smaller share of its power is constant


class LayerCosts:
    """The Hessian of a layer, from all calls of it; and, if asked, its wanted outputs.

    For each call, at most ``positions`` of its output's are read, chosen at random by a seed: the
    same at each run over the data.

    Attributes:
        hessian: [groups, inputs, inputs] float64, the sum of the outer products of the inputs.
        wanted: [groups, rows, inputs] float64, of the wanted outputs with the inputs; None if
            ``want`` was not called.
        count: of the positions read.
    """

    def __init__(self, name: str, positions: int, seed: int) -> None:
        self._name = name
        self._positions = positions
        self._seed = seed
        self._outputs: list[Tensor] = []  # of the float model, by call
        self._next = 0
        self.hessian: Tensor | None = None
        self.wanted: Tensor | None = None
        self.rows: LayerRows | None = None
        self.count = 0
        self._input_sum: Tensor | None = None  # [groups, inputs]
        self._wanted_sum: Tensor | None = None  # [groups, rows]

    def want(self, call: LayerCall) -> None:
        """Keeps what a call of the float model computes, without its bias."""
        rows = _rows(call)
        made = call.of(call.input, call.weight, None)
        chosen = self._chosen(rows.positions(made), len(self._outputs), made.device)
        self._outputs.append(rows.outputs(made, chosen).clone())

    def add(self, call: LayerCall) -> None:
        """Adds the inputs of a call of the quantized model; the same call as ``want`` was given."""
        rows = self.rows = _rows(call)
        wanted = self._outputs[self._next] if self._outputs else None
        count = rows.positions(call.output)
        chosen = self._chosen(count, self._next, call.input.device)
        self._next += 1
        begin = 0
        for values in _pieces(rows, call.input, chosen, count):
            inputs = values.double()
            if self.hessian is None:
                groups, _, size = inputs.shape
                self.hessian = inputs.new_zeros(groups, size, size)
            self.hessian.baddbmm_(inputs.mT, inputs)
            self._input_sum = _added(self._input_sum, inputs.sum(1))
            self.count += inputs.shape[1]
            if wanted is not None:
                outputs = wanted[:, begin : begin + inputs.shape[1]].double()
                self.wanted = _added(self.wanted, outputs.mT @ inputs)
                self._wanted_sum = _added(self._wanted_sum, outputs.sum(1))
            begin += inputs.shape[1]

    def sums(self, centred: bool) -> tuple[Tensor, Tensor | None]:
        """Hessian and wanted outputs; if centred, of what has no mean, which a bias takes up."""
        assert self.hessian is not None
        if not centred:
            return self.hessian, self.wanted
        mean = self._mean()
        hessian = self.hessian - self.count * mean.unsqueeze(-1) * mean.unsqueeze(-2)
        # Where an input is as good as constant, what is left is rounding.
        power = self.hessian.diagonal(dim1=-2, dim2=-1)
        moves = (hessian.diagonal(dim1=-2, dim2=-1) > _CONSTANT * power).double()
        hessian *= moves.unsqueeze(-1) * moves.unsqueeze(-2)
        if self.wanted is None or self._wanted_sum is None:
            return hessian, None
        wanted = self.wanted - self._wanted_sum.unsqueeze(-1) * mean.unsqueeze(-2)
        return hessian, wanted * moves.unsqueeze(-2)

    def shift(self, before: Tensor, after: Tensor) -> Tensor:
        """What a bias needs more for the wanted mean of each row's outputs, [channels] float64.

        Args:
            before: the weight, [groups, rows, inputs], as the layer's function read it; it makes
                what is wanted if ``want`` was not called.
            after: the same of the weight that it reads from now on.
        """
        mean = self._mean().unsqueeze(-1)
        made = (after.double() @ mean).squeeze(-1)
        if self._wanted_sum is None:
            return ((before.double() @ mean).squeeze(-1) - made).flatten()
        return (self._wanted_sum / self.count - made).flatten()

    def _mean(self) -> Tensor:
        assert self._input_sum is not None
        return self._input_sum / self.count

    def _chosen(self, count: int, call: int, device: torch.device) -> Tensor | None:
        """The positions that are read, in ascending order; None: all."""
        if count <= self._positions:
            return None
        seed = zlib.crc32(f"{self._seed} {self._name} {call}".encode())
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(count, generator=generator)[: self._positions]
        return chosen.sort().values.to(device)


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def _rows(call: LayerCall) -> LayerRows:
    return LayerRows.of(call.function, call.weight, call.options, call.named_options)


def _pieces(rows: LayerRows, x: Tensor, chosen: Tensor | None, count: int) -> Iterator[Tensor]:
    """The unfolded input in pieces of positions, in their order."""
    if count == 0:
        return
    view = rows.of_input(x)
    size = max(1, _PIECE // max(1, view[(0,) * rows.position_axes].numel()))
    for begin in range(0, count, size):
        some = torch.arange(begin, min(begin + size, count), device=x.device)
        yield rows.values(view, some if chosen is None else chosen[begin : begin + size])
        if chosen is not None and begin + size >= len(chosen):
            return
