"""Estimates the statistics of batch norms again, from the quantized model."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.correction.walk.channel_sums import ChannelSums
from torch_ext.correction.walk.layer_checkpoint import LayerCheckpoint
from torch_ext.correction.walk.norm_walk import NormCall, NormWalk
from torch_ext.correction.walk.outputs import FloatOutputs
from torch_ext.files.measurements import fingerprint
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import Pattern, PreparedModel, WeightSource, clean_name, select
from torch_ext.quantizers.folded_weight import FoldedWeight
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.batches import Forward
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import shown, text_table

_WHO = "recalibrate_norms"
_FEWEST = 2  # values of a channel, which a variance needs


@dataclass(frozen=True)
class NormRow:
    """One batch norm of a :class:`NormRecalibration`."""

    #: The norm's name.
    name: str
    #: The number of its channels.
    channels: int
    #: The largest change of a mean, in the standard deviations that the norm had.
    shift: float
    #: The least new variance, divided by the one that the channel had.
    least_ratio: float
    #: The greatest one.
    greatest_ratio: float


@dataclass(frozen=True)
class NormRecalibration:
    """The result of :func:`recalibrate_norms`; ``str()`` gives a table."""

    #: One per norm, in the order of their execution.
    rows: tuple[NormRow, ...]
    #: Names of the norms that the data does not come by; they keep their statistics.
    left: tuple[str, ...]
    #: The squared error of the model's outputs before, relative to the sum of squares of the float
    #: model's.
    before: float
    #: The same with the new statistics.
    after: float

    def __str__(self) -> str:
        text = (
            f"{len(self.rows)} norms; relative squared error of the outputs {self.before:.4g}, "
            f"with new statistics {self.after:.4g}\n"
        )
        header = ("norm", "channels", "largest shift of a mean", "new variance of the old one")
        rows = [
            [
                row.name,
                str(row.channels),
                f"{row.shift:.4g} deviations",
                f"{row.least_ratio:.4g} to {row.greatest_ratio:.4g}",
            ]
            for row in self.rows
        ]
        text += text_table(header, rows)
        return text + (f"\nnot called: {shown(self.left)}" if self.left else "")


def recalibrate_norms(
    model: nn.Module,
    data: Any,
    *,
    pattern: Pattern | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    checkpoint: PathLike | None = None,
) -> NormRecalibration:
    """Gives batch norms the mean and variance of what they read in the quantized model.

    A norm normalizes by the statistics of the float model; quantized layers before it make values
    of another mean and variance. In the order of their execution each norm gets the mean and the
    variance, with N - 1, of each channel over all data and positions, as it reads them with all
    quantizers on and the norms before it recalibrated. They are exact: batch sizes do not matter,
    as they would in train mode::

        calibrate(model, batches)
        print(torch_ext.recalibrate_norms(model, batches))

    A model whose norms :func:`fuse` has folded has none; :func:`correct_bias` corrects means there.
    Norms that stay beside their layer, also those of ``fold_batch_norms=True``, are recalibrated;
    the ranges of weights that are quantized with one folded are solved again, but for those that
    are learned, given or frozen (``averaging_constant=0``), which stay. Recalibrate before
    :func:`reconstruct`, whose rounded weights are on the grid of one factor only. The model in
    FLOAT computes with the new statistics too. ``num_batches_tracked`` stays.

    The data is run three times as a whole, and once for each norm as far as the norm; a single
    batch is run once for all. It should have hundreds of samples: few give other statistics than
    those of the data at large.

    Args:
        model: calibrated.
        data: batches as ``calibrate`` takes them, which can be run over again.
        pattern: names of norms, which may contain ``*`` and ``?``, or a list of them; by default
            all.
        forward, device: as in ``calibrate``.
        progress: whether to show a progress bar; by default if standard error is a terminal.
        checkpoint: a file that keeps the statistics so far, as in :func:`correct_bias`.

    Returns:
        What changed, by norm, and the error of the outputs before and after.

    Raises:
        TypeError: ``model`` is no module, or data cannot be run over again.
        ValueError: the model has no quantizers, or no batch norm with running statistics; the data
            is empty, gives a channel a single value, or gives other batches the second time; a
            norm's inputs are not finite; a checkpoint of another run.
        RuntimeError: a quantizer has no range, or one that is held (by :func:`reconstruct`) is of a
            weight that is quantized with a chosen norm folded.

    If it raises, the model is as it was.
    """
    prepared = PreparedModel(_WHO, model)
    norms = select(_WHO, _norms(prepared.root), pattern, kind="norm")
    folded = _folded(prepared)
    _check_none_held(norms, folded)
    walk = NormWalk(prepared, data, norms, forward=forward, device=device)
    with walk.guarded():
        run = _NormRun(walk, folded)
        run.measure()
        about = fingerprint(prepared, walk.digests, walk.order)
        kept = LayerCheckpoint(_WHO, checkpoint, about)
        with _restored_statistics(norms.values()):
            run.recalibrate(kept, progress)
    kept.finish()
    for name in walk.order:
        _refresh(prepared, folded.get(name, {}))
    before, after = (error.value for error in run.errors)
    return NormRecalibration(tuple(run.rows), tuple(walk.left), before, after)


def _norms(root: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms with running statistics; raises ValueError if there are none."""
    found = {
        clean_name(name): module
        for name, module in root.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_var, Tensor)
    }
    if not found:
        raise ValueError(
            f"{_WHO}: expected model to have batch norms with running statistics, got none: fuse "
            "folds them into weights for good; correct_bias corrects the means then, and "
            "prepare_qat(fold_batch_norms=True) quantizes as folded while norms stay"
        )
    return found


def _folded(prepared: PreparedModel) -> dict[str, dict[str, FakeQuantize]]:
    """By the name of a norm, the quantizers of weights that are quantized with it folded."""
    names = {quantizer: name for name, quantizer in prepared.quantizers.items()}
    found: dict[str, dict[str, FakeQuantize]] = {}
    for quantizer, source in prepared.weights.items():
        steps = source.chain if isinstance(source, WeightSource) else ()
        for step in steps:
            if isinstance(step, FoldedWeight):
                found.setdefault(step.norm_name, {})[names[quantizer]] = quantizer
    return found


def _check_none_held(norms: Iterable[str], folded: dict[str, dict[str, FakeQuantize]]) -> None:
    """Raises RuntimeError for norms whose new factor would take a rounded weight off its grid."""
    held = [n for n in norms if any(q.holds_range for q in folded.get(n, {}).values())]
    if held:
        raise RuntimeError(
            f"{_WHO}: expected norms whose layer's weight was not rounded by reconstruct, got "
            f"{shown(held)}; recalibrate before reconstruct, or leave them out by pattern"
        )


def _refresh(prepared: PreparedModel, quantizers: dict[str, FakeQuantize]) -> None:
    """Solves ranges of weights whose norm has changed, of those that are in VALIDATION."""
    validating = FakeQuantState.VALIDATION
    prepared.refresh_weights({n: q for n, q in quantizers.items() if q.state is validating})


class _NormRun:
    """The measurements and changes of one call."""

    def __init__(self, walk: NormWalk, folded: dict[str, dict[str, FakeQuantize]]) -> None:
        self.walk = walk
        self.folded = folded
        self.rows: list[NormRow] = []
        self.outputs = FloatOutputs()
        self.errors = [self.outputs.compared() for _ in range(2)]

    def measure(self) -> None:
        """The outputs of the float model and of the model as it is; finds what cannot be done."""
        walk = self.walk
        for state, output in (
            (FakeQuantState.FLOAT, self.outputs.keep),
            (FakeQuantState.VALIDATION, self.errors[0].add),
        ):
            sums = ChannelSums()
            walk.enter(state)
            walk.run(functools.partial(_add, sums), output)
            if few := [name for name in walk.order if sums.counts.get(name, 0) < _FEWEST]:
                raise ValueError(
                    f"{_WHO}: expected data to give each channel {_FEWEST} values or more, got "
                    f"{sums.counts.get(few[0], 0)} in {shown(few)}; pass hundreds"
                )
            if wrong := sums.not_finite():
                raise ValueError(
                    f"{_WHO}: expected norms to read finite values in {state.name}, got infinite "
                    f"or NaN ones in {shown(wrong)}; look at the data and the weights"
                )

    def recalibrate(self, kept: LayerCheckpoint, progress: bool | None) -> None:
        """Changes the norms one after the other, and measures the outputs again."""
        walk, sums = self.walk, ChannelSums()

        def take(name: str, mean: Tensor, variance: Tensor) -> None:
            self.rows.append(_row(name, walk.norms[name], mean, variance))
            _set(walk.norms[name], mean, variance)
            _refresh(walk.prepared, self.folded.get(name, {}))

        def finish(name: str) -> None:
            found = {"mean": sums.mean(name), "variance": sums.variance(name)}
            take(name, **found)
            kept.put(name, found)

        done = []
        for name in walk.order:
            like = walk.norms[name].running_mean.double()  # type: ignore[union-attr]
            if (known := kept.get(name, {"mean": like, "variance": like})) is None:
                break
            take(name, **known)
            done.append(name)
        left = walk.order[len(done) :]
        steps = walk.sequentially(left, functools.partial(_add, sums), finish)
        count = len(walk.order)
        for _ in progress_bar(itertools.chain(done, steps), count, _WHO, progress):
            pass
        walk.run(output=self.errors[1].add)


def _add(sums: ChannelSums, call: NormCall) -> None:
    sums.add(call.name, call.input, 1)


def _row(name: str, norm: _BatchNorm, mean: Tensor, variance: Tensor) -> NormRow:
    old_mean, old_variance = norm.running_mean, norm.running_var
    assert old_mean is not None
    assert old_variance is not None
    before = old_variance.double() + norm.eps
    shift = (mean - old_mean).abs() / before.sqrt()
    ratio = (variance + norm.eps) / before
    return NormRow(name, len(mean), float(shift.max()), float(ratio.min()), float(ratio.max()))


@torch.no_grad()
def _set(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


@contextlib.contextmanager
def _restored_statistics(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Gives the norms their statistics back if the body raises."""
    before = [
        (norm, norm.running_mean.clone(), norm.running_var.clone())  # type: ignore[union-attr]
        for norm in norms
    ]
    try:
        yield
    except BaseException:
        for norm, mean, variance in before:
            _set(norm, mean, variance)
        raise
