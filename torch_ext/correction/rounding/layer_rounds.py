"""Rounds a model's layers one after the other, each for what the rounded ones before it make."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_ext.correction.biases.bias_place import parameter_names, reads_own_bias
from torch_ext.correction.biases.mean_place import MeanPlace, mean_places
from torch_ext.correction.rounding.layer_costs import LayerCosts
from torch_ext.correction.rounding.layer_rows import LayerRows
from torch_ext.correction.rounding.round_by_adaround import round_by_adaround, uneven
from torch_ext.correction.rounding.round_by_gptq import round_by_gptq
from torch_ext.correction.rounding.rounding_options import RoundingOptions
from torch_ext.correction.rounding.row_problem import RowProblem, fitted_target
from torch_ext.correction.rounding.weight_grid import WeightGrid, unreachable
from torch_ext.correction.walk.layer_checkpoint import LayerCheckpoint
from torch_ext.correction.walk.layer_walk import LayerCall, LayerWalk
from torch_ext.quantizers.find import WeightSource
from torch_ext.quantizers.solve import Solution
from torch_ext.quantizers.state_table import FakeQuantState

_KEPT = 1 << 26  # values of layers' outputs in float that are kept at a time, 256 MiB


class LayerRounds:
    """The rounding of one call; everything happens within the walk's guard."""

    def __init__(self, walk: LayerWalk, options: RoundingOptions) -> None:
        """Leaves out weights that cannot be rounded; ValueError if there is no other."""
        self._who = walk.who
        self.walk = walk
        self.options = options
        self.grids: dict[str, WeightGrid] = {}
        # Stored weights and what holds means that changed, and their values before.
        self.floats: list[tuple[Tensor, Tensor]] = []
        # By name of a layer that is rounded: its errors before and after, and the share changed.
        self.done: dict[str, tuple[float, float, float]] = {}
        self.shifts: dict[str, Tensor] = {}  # what their means were moved by, if they have a place
        self._places: dict[str, MeanPlace] = {}
        self._calls: Counter[str] = Counter()
        self._sizes: dict[str, list[tuple[int, int]]] = {}  # positions and channels of each call
        self._kept: Counter[str] = Counter()  # values of a layer's outputs at the positions read
        for name in list(walk.names):
            layer = walk.layers[name]
            why = unreachable(layer.source)
            if layer.quantizer.is_dynamic:
                why = "the scales of its groups follow its values, so there is no grid to round to"
            if options.method == "adaround":
                why = why or uneven(layer.quantizer)
            if why:
                walk.leave(name, why)
        if not walk.names:
            raise ValueError(
                f"{self._who}: expected weights that can be rounded, got none: "
                + "; ".join(f"{name}: {why}" for name, why in walk.left.items())
            )

    def begin(self) -> None:
        """Finds order and grids; raises for data and weights that cannot be used."""
        if self.options.bias:
            self._places = mean_places(self.walk.prepared.root, self.walk.layers)
        self.walk.run(self._look)
        for name, sizes in self._sizes.items():
            positions = self._positions(name)
            self._kept[name] = sum(min(count, positions) * channels for count, channels in sizes)
        owners = parameter_names(self.walk.prepared.root)
        for name in self.walk.order:
            layer = self.walk.layers[name]
            assert isinstance(layer.source, WeightSource)
            grid = self.grids[name] = WeightGrid(layer.source, layer.quantizer)
            if len(shared := owners[id(grid.stored)]) > 1:
                raise ValueError(
                    f"{self._who}: expected weights of one module each, got one that is "
                    f"{' and '.join(shared)}; leave it out by pattern"
                )
            if not bool(grid.stored.isfinite().all()):
                raise ValueError(
                    f"{self._who}: expected {name}.weight to be finite, got NaN or inf"
                )

    def _look(self, call: LayerCall) -> None:
        self._calls[call.name] += 1
        channels = call.output.shape[call.ch_axis]
        size = (call.output.numel() // max(1, channels), channels)
        self._sizes.setdefault(call.name, []).append(size)
        if call.name in self._places and not reads_own_bias(call):
            del self._places[call.name]
        if not bool(call.input.isfinite().all()):
            raise ValueError(
                f"{self._who}: expected what {call.name} reads to be finite, got NaN or inf in "
                f"batch {self.walk.batch}"
            )

    def take(self, file: LayerCheckpoint) -> None:
        """Stores the weights and the means that a checkpoint has."""
        for name in self.walk.order:
            found = file.get(name, self._kept_of(name))
            if found is not None:
                self._store(name, found["values"])
                if name in self._places:
                    self._move(name, found["shift"])
                before, after, changed = found["numbers"].tolist()
                self.done[name] = (before, after, changed)

    def _kept_of(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint keeps of a layer."""
        values = self.grids[name].nearest()
        if values.dtype != torch.float64:
            values = values.float()
        numbers = self.done.get(name, (0.0, 0.0, 0.0))
        kept = {"values": values, "numbers": torch.tensor(numbers, dtype=torch.float64)}
        if name in self._places:
            none = torch.zeros_like(self._places[name].values, dtype=torch.float64)
            kept["shift"] = self.shifts.get(name, none)
        return kept

    def round(self, names: list[str], file: LayerCheckpoint) -> Iterator[str]:
        """Rounds layers one after the other, and writes each to the checkpoint; gives its name."""
        for some in self._portions(names):
            costs = {
                name: LayerCosts(name, self._positions(name), self.options.seed) for name in some
            }
            if self.options.target == "float":
                with self._floating():
                    self.walk.run(functools.partial(_want, costs))

            def finish(name: str, costs: dict[str, LayerCosts] = costs) -> None:
                self._finish(name, costs.pop(name))
                file.put(name, self._kept_of(name))

            def add(call: LayerCall, costs: dict[str, LayerCosts] = costs) -> None:
                costs[call.name].add(call)

            yield from self.walk.sequentially(some, add, finish)

    def _positions(self, name: str) -> int:
        """How many positions are read of each call of a layer."""
        return max(1, self.options.positions // self._calls[name])

    def _portions(self, names: list[str]) -> Iterator[list[str]]:
        """The layers in their order, as many at a time as may keep their outputs in float."""
        some: list[str] = []
        kept = 0
        for name in names:
            size = self._kept[name]
            if some and kept + size > _KEPT:
                yield some
                some, kept = [], 0
            some.append(name)
            kept += size
        if some:
            yield some

    def _finish(self, name: str, costs: LayerCosts) -> None:
        grid, rows = self.grids[name], costs.rows
        if rows is None or costs.hessian is None:
            raise ValueError(f"{self._who}: expected data for {name}, got empty batches")
        # The layer computes with its weight; the quantizer's has norms folded in.
        factor = rows.of_weight(grid.factor()).double()
        problem = self._problem(name, costs, rows, factor)
        values = round_by_gptq(problem, self.options.activation_order)
        if self.options.method == "adaround":
            # Rows that gptq, whose values are not bound to the two neighbours, rounds better stay.
            observer = grid.quantizer.observer
            ends = (observer.quant_min, observer.quant_max)
            learned = round_by_adaround(problem, ends, self.options.iterations)
            values = problem.better(learned, values)
        power = max(float(problem.power().sum()), torch.finfo(torch.float64).tiny)
        before, after = (float(problem.cost(v).sum()) / power for v in (problem.nearest, values))
        changed = float((values != problem.nearest).double().mean())
        if name in self._places:
            self._move(name, costs.shift(problem.weight / factor, values / factor))
        self._store(name, rows.to_weight(values, grid.weight().shape))
        self.done[name] = (before, after, changed)

    def _problem(self, name: str, costs: LayerCosts, rows: LayerRows, factor: Tensor) -> RowProblem:
        grid = self.grids[name]
        hessian, wanted = costs.sums(centred=name in self._places)
        damping = self.options.damping + hessian.shape[-1] / costs.count
        weight = rows.of_weight(grid.weight())
        if weight.dtype not in (torch.float32, torch.float64):
            weight = weight.float()
        scale, zero_point = (rows.of_weight(t) for t in grid.qparams())
        target = weight.double()
        if wanted is not None:
            target = fitted_target(weight, hessian, wanted * factor, damping)
        nearest = rows.of_weight(grid.nearest()).to(weight.dtype)
        return RowProblem(weight, target, nearest, scale, zero_point, grid.text, hessian, damping)

    def _store(self, name: str, values: Tensor) -> None:
        grid = self.grids[name]
        self.floats.append((grid.stored, grid.stored.detach().clone()))
        if not grid.store(values):
            raise ValueError(
                f"{self._who}: expected {name}.weight to be of a dtype that holds its grid's "
                f"values, got {grid.stored.dtype} for {grid.text}; convert the model to float32, "
                "or leave the layer out by pattern"
            )

    def _move(self, name: str, shift: Tensor) -> None:
        place = self._places[name]
        self.floats.append((place.values, place.values.detach().clone()))
        place.add(shift)
        self.shifts[name] = shift

    @contextlib.contextmanager
    def _floating(self) -> Iterator[None]:
        """The model in FLOAT, with the weights and biases that there were."""
        rounded = [(parameter, parameter.detach().clone()) for parameter, _ in self.floats]
        self.restore()
        self.walk.enter(FakeQuantState.FLOAT)
        try:
            yield
        finally:
            _write(rounded)
            self.walk.enter(FakeQuantState.VALIDATION)

    def restore(self) -> None:
        """Stores the weights and biases that there were."""
        _write(self.floats)

    def largest_shift(self, name: str) -> float:
        """The largest change of a layer's means."""
        return float(self.shifts[name].abs().max()) if name in self.shifts else 0.0

    def hold(self, solutions: dict[str, Solution]) -> None:
        """Gives the quantizers of the rounded weights the ranges they are rounded for, to hold."""
        for name, solution in solutions.items():
            self.grids[name].hold(solution)


@torch.no_grad()
def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)


def _want(costs: dict[str, LayerCosts], call: LayerCall) -> None:
    if call.name in costs:
        costs[call.name].want(call)
