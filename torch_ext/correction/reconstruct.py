"""Rounds the weights of a calibrated model so that its layers compute what they did before."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torch_ext.correction.biases.bias_place import parameter_names, reads_own_bias
from torch_ext.correction.biases.mean_place import MeanPlace, mean_places
from torch_ext.correction.rounding.layer_costs import LayerCosts
from torch_ext.correction.rounding.round_by_adaround import round_by_adaround, uneven
from torch_ext.correction.rounding.round_by_gptq import round_by_gptq
from torch_ext.correction.rounding.row_problem import RowProblem, fitted_target
from torch_ext.correction.rounding.weight_grid import WeightGrid, unreachable
from torch_ext.correction.walk.layer_checkpoint import LayerCheckpoint
from torch_ext.correction.walk.layer_walk import LayerCall, LayerWalk
from torch_ext.files.measurements import fingerprint
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.find import Pattern, PreparedModel, WeightSource
from torch_ext.quantizers.solve import Solution
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import bounded, parse_flag, parse_integer
from torch_ext.utils.batches import Forward
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import text_table

_WHO = "reconstruct"
ReconstructionMethod = Literal["gptq", "adaround"]
Target = Literal["float", "quantized"]
_KEPT = 1 << 26  # values of layers' outputs in float that are kept at a time, 256 MiB


@dataclass(frozen=True)
class ReconstructedLayer:
    """One layer of a :class:`Reconstruction`.

    Errors are squared errors that the rounding makes in the layer's output, relative to the sum of
    squares of that; of a layer whose bias changes too, both without their mean.
    """

    #: The layer's name.
    name: str
    #: The error of rounding each value to the nearest of the grid.
    before: float
    #: The error of the weight that the layer has now.
    after: float
    #: The share of the values that are not the nearest.
    changed: float
    #: The largest change of its bias, or of its norm's mean; 0 where neither changes.
    shift: float


@dataclass(frozen=True)
class Reconstruction:
    """The result of :func:`reconstruct`; as text, a table."""

    #: One per layer, in the order of execution.
    layers: tuple[ReconstructedLayer, ...]
    #: The name of each quantized weight's module that was left as it was, and why.
    left: dict[str, str]
    #: The method.
    method: ReconstructionMethod

    def __str__(self) -> str:
        header = ["layer", "nearest", self.method, "changed", "largest shift"]
        rows = [
            [
                row.name,
                f"{row.before:.3g}",
                f"{row.after:.3g}",
                f"{row.changed:.1%}",
                f"{row.shift:.3g}",
            ]
            for row in self.layers
        ]
        title = "relative squared error that the rounding of weights makes in a layer's output"
        left = [f"\nleft as it was: {name} ({why})" for name, why in self.left.items()]
        return f"{title}\n{text_table(header, rows)}{''.join(left)}"


def reconstruct(
    model: nn.Module,
    data: Any,
    method: ReconstructionMethod = "gptq",
    *,
    pattern: Pattern | None = None,
    target: Target = "float",
    bias: bool = True,
    damping: float = 0.1,
    activation_order: bool = True,
    iterations: int = 1000,
    positions: int = 100_000,
    seed: int = 0,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    checkpoint: PathLike | None = None,
) -> Reconstruction:
    """Rounds weights so that each layer's output keeps near what it was, without labels.

    One layer after the other, in the order of execution, reads what the quantized model, with the
    layers before it rounded, makes of the data. What an error of its weight costs is then a
    quadratic form, and instead of to the nearest value, weights are rounded to those of the same
    grid that cost less: by ``"gptq"``, where later inputs of a layer make up for the errors of
    earlier ones (Frantar et al. 2022), or by ``"adaround"``, which learns for each value whether it
    is rounded down or up (Nagel et al. 2020), and keeps ``"gptq"``'s rounding of the rows that it
    does not better. No row of a weight costs more than by rounding to nearest. Most useful with few
    bits, and best after the ranges of weights were solved by ``"mse"``::

        calibrate(model, batches)
        resolve(model, weight_observer="mse")
        print(reconstruct(model, batches))

    What rounding does to the mean of a layer's output costs nothing: the layer's bias takes it up,
    with the mean of the errors of the layers before it, and only what inputs and outputs have
    beside their means counts. For a layer without a bias that a norm is folded into
    (``fold_batch_norms=True``) the norm's ``running_mean`` does it. A layer with neither keeps its
    mean as it comes out; so does one whose bias is another layer's too, or whose forward does not
    read its bias as it is. No parameter is added.

    The weights themselves become the rounded ones, so the model in FLOAT computes something else
    afterwards. Their quantizers hold the range that they have: it stays in every state, in
    ``state_dict``, files and exports, until ``resolve`` is given a ``weight_observer``. Training
    goes on from the rounded weights.

    Time: each layer needs the data run as far as the layer; if the data is a single batch, one run
    serves all layers. Of each layer a matrix of inputs times inputs, in float64, is summed and
    factored. Memory: three such matrices and, with the target ``"float"``, outputs of layers at the
    positions read, up to 256 MiB at a time.

    Args:
        model: prepared and calibrated.
        data: batches as ``calibrate`` takes them, which can be run over again (a list, a DataLoader
            without shuffling). Some dozens of images are enough; no labels are read.
        method: ``"gptq"`` or ``"adaround"``.
        pattern: of quantizers, as in ``set_fake_quantize``: those of the weights to round.
        target: what a layer is to compute: what it computes in the float model (``"float"``), which
            makes up for errors of the layers before it too, or what the unrounded weight makes of
            its present inputs (``"quantized"``).
        bias: whether the means of outputs go to where they ought to be, as above.
        damping: a share of the mean of the matrix's diagonal that is added to it, above 0: the
            more, the closer weights stay to what they were. To the share comes the number of a
            layer's inputs over that of the positions read: a matrix of few positions fits these
            instead of what the model will see. So does one of few images, which are alike within:
            then 0.1 does better on others than the 0.01 of the literature, which has many.
        activation_order: begin with the inputs of most power.
        iterations: adaround: steps of its optimizer, at least 1.
        positions: at most so many positions of each layer's output are read, in all; at random.
        seed: of that choice.
        forward, device, progress: as in ``calibrate``.
        checkpoint: a file that keeps the layers that are finished, from which an interrupted call
            goes on; removed at the end.

    Returns:
        The errors of each layer before and after, and what was left out.

    Raises:
        TypeError: ``model`` is no module, or an argument is of a wrong kind.
        ValueError: an unknown method, target or pattern; a value out of bounds; no layer to round;
            data that is empty, not finite, too little for a layer, or not the same the second time;
            a weight that other modules share, or whose dtype cannot hold the grid; a checkpoint of
            another run.
        RuntimeError: quantizers without a range.

    If it raises or is interrupted, the model is as it was before. Weights on CUDA are rounded on
    the CPU by ``"gptq"``.
    """
    prepared = PreparedModel(_WHO, model)
    options = _Options(method, target, bias, damping, activation_order, iterations, positions, seed)
    walk = LayerWalk(prepared, data, pattern=pattern, forward=forward, device=device)
    run = _Rounds(walk, options)
    with _restored_on_error(run), walk.guarded():
        run.begin()
        about = fingerprint(prepared, pattern, vars(options), walk.digests)
        file = LayerCheckpoint(_WHO, checkpoint, about)
        run.take(file)
        left = [name for name in walk.order if name not in run.done]
        for _ in progress_bar(run.round(left, file), len(left), _WHO, progress):
            pass
        held = {name: run.grids[name].solution() for name in run.done}
    run.hold(held)
    file.finish()
    rows = [run.row(name) for name in walk.order]
    return Reconstruction(tuple(rows), walk.left, method)


class _Options:
    """The checked arguments; ``vars`` gives them as values that JSON holds."""

    def __init__(
        self,
        method: ReconstructionMethod,
        target: Target,
        bias: bool,
        damping: float,
        activation_order: bool,
        iterations: int,
        positions: int,
        seed: int,
    ) -> None:
        for name, given, kind in (
            ("method", method, ReconstructionMethod),
            ("target", target, Target),
        ):
            if given not in get_args(kind):
                known = " or ".join(f'"{one}"' for one in get_args(kind))
                raise ValueError(f"{_WHO}: expected {name} to be {known}, got {bounded(given)}")
        if isinstance(damping, bool) or not isinstance(damping, (int, float)):
            raise TypeError(f"{_WHO}: expected damping to be a number, got {bounded(damping)}")
        if not 0 < damping <= 1000:
            raise ValueError(f"{_WHO}: expected damping to be above 0, got {damping}")
        self.method: ReconstructionMethod = method
        self.target: Target = target
        self.bias = parse_flag(_WHO, "bias", bias)
        self.damping = float(damping)
        self.activation_order = parse_flag(_WHO, "activation_order", activation_order)
        self.iterations = parse_integer(_WHO, "iterations", iterations, 1, 10**7)
        self.positions = parse_integer(_WHO, "positions", positions, 1, 2**31 - 1)
        self.seed = parse_integer(_WHO, "seed", seed, 0, 2**63 - 1)


class _Rounds:
    """The rounding of one call; everything happens within the walk's guard."""

    def __init__(self, walk: LayerWalk, options: _Options) -> None:
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
                f"{_WHO}: expected weights that can be rounded, got none: "
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
                    f"{_WHO}: expected weights of one module each, got one that is "
                    f"{' and '.join(shared)}; leave it out by pattern"
                )
            if not bool(grid.stored.isfinite().all()):
                raise ValueError(f"{_WHO}: expected {name}.weight to be finite, got NaN or inf")

    def _look(self, call: LayerCall) -> None:
        self._calls[call.name] += 1
        channels = call.output.shape[call.ch_axis]
        size = (call.output.numel() // max(1, channels), channels)
        self._sizes.setdefault(call.name, []).append(size)
        if call.name in self._places and not reads_own_bias(call):
            del self._places[call.name]
        if not bool(call.input.isfinite().all()):
            raise ValueError(
                f"{_WHO}: expected what {call.name} reads to be finite, got NaN or inf in batch "
                f"{self.walk.batch}"
            )

    def take(self, file: LayerCheckpoint) -> None:
        """Stores the weights that a checkpoint has."""
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
        problem = self._problem(name, costs)
        values = round_by_gptq(problem, self.options.activation_order)
        if self.options.method == "adaround":
            # Rows that gptq, whose values are not bound to the two neighbours, rounds better stay.
            observer = self.grids[name].quantizer.observer
            ends = (observer.quant_min, observer.quant_max)
            learned = round_by_adaround(problem, ends, self.options.iterations)
            values = problem.better(learned, values)
        power = max(float(problem.power().sum()), torch.finfo(torch.float64).tiny)
        before, after = (float(problem.cost(v).sum()) / power for v in (problem.nearest, values))
        changed = float((values != problem.nearest).double().mean())
        assert costs.rows is not None
        grid, rows = self.grids[name], costs.rows
        if name in self._places:
            factor = rows.of_weight(grid.factor()).double()
            self._move(name, costs.shift(problem.weight / factor, values / factor))
        self._store(name, rows.to_weight(values, grid.weight().shape))
        self.done[name] = (before, after, changed)

    def _problem(self, name: str, costs: LayerCosts) -> RowProblem:
        grid, rows = self.grids[name], costs.rows
        if rows is None or costs.hessian is None:
            raise ValueError(f"{_WHO}: expected data for {name}, got empty batches")
        centred = name in self._places
        hessian, wanted = costs.centred() if centred else (costs.hessian, costs.wanted)
        damping = self.options.damping + hessian.shape[-1] / costs.count
        weight = rows.of_weight(grid.weight())
        if weight.dtype not in (torch.float32, torch.float64):
            weight = weight.float()
        scale, zero_point = (rows.of_weight(t) for t in grid.qparams())
        target = weight.double()
        if wanted is not None:
            # The outputs are of the weight that the layer has; the quantizer's has norms folded in.
            factor = rows.of_weight(grid.factor()).double()
            target = fitted_target(weight, hessian, wanted * factor, damping)
        nearest = rows.of_weight(grid.nearest()).to(weight.dtype)
        return RowProblem(weight, target, nearest, scale, zero_point, grid.text, hessian, damping)

    def _store(self, name: str, values: Tensor) -> None:
        grid = self.grids[name]
        self.floats.append((grid.stored, grid.stored.detach().clone()))
        if not grid.store(values):
            raise ValueError(
                f"{_WHO}: expected {name}.weight to be of a dtype that holds its grid's values, "
                f"got {grid.stored.dtype} for {grid.text}; convert the model "
                "to float32, or leave the layer out by pattern"
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

    def row(self, name: str) -> ReconstructedLayer:
        shift = self.shifts.get(name)
        largest = 0.0 if shift is None else float(shift.abs().max())
        return ReconstructedLayer(name, *self.done[name], largest)

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


@contextlib.contextmanager
def _restored_on_error(run: _Rounds) -> Iterator[None]:
    try:
        yield
    except BaseException:
        run.restore()
        raise
