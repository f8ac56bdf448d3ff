"""Rounds the weights of a calibrated model so that its layers compute what they did before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_ext.correction.rounding.layer_rounds import LayerRounds
from torch_ext.correction.rounding.rounding_options import (
    ReconstructionMethod,
    RoundingOptions,
    Target,
)
from torch_ext.correction.walk.layer_checkpoint import LayerCheckpoint
from torch_ext.correction.walk.layer_walk import LayerWalk
from torch_ext.files.measurements import fingerprint
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.find import Pattern, PreparedModel
from torch_ext.utils.batches import Forward
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import text_table

_WHO = "reconstruct"


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
    factored. Memory: four such matrices and, with the target ``"float"``, outputs of layers at the
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
    options = RoundingOptions(
        _WHO, method, target, bias, damping, activation_order, iterations, positions, seed
    )
    walk = LayerWalk(prepared, data, pattern=pattern, forward=forward, device=device)
    run = LayerRounds(walk, options)
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
    rows = [
        ReconstructedLayer(name, *run.done[name], run.largest_shift(name)) for name in walk.order
    ]
    return Reconstruction(tuple(rows), walk.left, method)


@contextlib.contextmanager
def _restored_on_error(run: LayerRounds) -> Iterator[None]:
    try:
        yield
    except BaseException:
        run.restore()
        raise
