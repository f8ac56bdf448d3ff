"""Moves the mean error of each output channel into the biases, layer by layer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torch_ext.correction.biases.bias_place import (
    add_to_bias,
    bias_keeper,
    bias_problems,
    reads_own_bias,
    restored_biases,
)
from torch_ext.correction.biases.means_of_norms import input_means, weight_shifts
from torch_ext.correction.walk.channel_sums import ChannelSums
from torch_ext.correction.walk.data_walk import not_called
from torch_ext.correction.walk.layer_checkpoint import LayerCheckpoint
from torch_ext.correction.walk.layer_walk import LayerCall, LayerWalk, WalkedLayer, find_layers
from torch_ext.correction.walk.outputs import FloatOutputs
from torch_ext.files.measurements import fingerprint
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.find import Pattern, PreparedModel
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import bounded
from torch_ext.utils.batches import Forward
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import joined, label_of, shown, text_table

_WHO = "correct_bias"
_FEWEST = 2  # values of a channel
_SHIFT = "shift"
Keep = Literal["closer", "all"]


@dataclass(frozen=True)
class BiasRow:
    """One layer of a :class:`BiasCorrection`."""

    #: The layer's name.
    name: str
    #: The number of its output channels.
    channels: int
    #: Whether it has a bias now, and had none before.
    created: bool
    #: Whether the correction was kept; without, the bias is as it was.
    kept: bool
    #: The largest change of a bias.
    shift: float
    #: The root mean square of the channels' mean errors in the model as it was, relative to that of
    #: the float layer's outputs; NaN where it was not measured.
    before: float
    #: The same in the corrected model.
    after: float


@dataclass(frozen=True)
class BiasCorrection:
    """The result of :func:`correct_bias`; ``str()`` gives a table."""

    #: One per layer that was walked, in the order of their execution.
    rows: tuple[BiasRow, ...]
    #: The name of each layer that was not corrected, and why.
    left: dict[str, str]
    #: The squared error of the model's outputs before, relative to the sum of squares of the float
    #: model's; NaN where it was not measured.
    before: float
    #: The same with the corrected biases.
    after: float

    def __str__(self) -> str:
        header = ("layer", "channels", "bias", "largest shift", "mean error", "corrected")
        rows = [
            [
                label_of(row.name),
                str(row.channels),
                "created" if row.created else "changed" if row.kept else "as it was",
                f"{row.shift:.4g}",
                f"{row.before:.4g}",
                f"{row.after:.4g}",
            ]
            for row in self.rows
        ]
        text = f"{sum(row.kept for row in self.rows)} of {len(self.rows)} layers corrected"
        if not math.isnan(self.before):
            text += f"; relative squared error of the outputs {self.before:.4g}"
            text += f", corrected {self.after:.4g}"
        text += "\n" + text_table(header, rows)
        for name, why in self.left.items():
            text += f"\nleft as it was: {label_of(name)} ({why})"
        return text


def correct_bias(
    model: nn.Module,
    data: Any = None,
    *,
    keep: Keep = "closer",
    pattern: Pattern | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    checkpoint: PathLike | None = None,
) -> BiasCorrection:
    """Adds to each bias what quantization takes from the mean of the layer's outputs.

    Rounding weights and clipping activations shifts what an output channel is on average, most
    where channels have few weights (depthwise convolutions) or weights few bits. In the order of
    their execution, for each convolution, transposed convolution and linear layer whose weight is
    quantized, the mean over all data and positions of the float model's output minus the quantized
    model's, with all corrections so far, is added to the bias of the channel::

        calibrate(model, batches)
        print(torch_ext.correct_bias(model, batches))

    A right mean of each layer does not always bring the outputs closer: where most values are one
    constant, such as the background of images, their rounding error is the mean, and moving it
    harms the others. By default a correction is therefore kept only if the squared error of the
    model's outputs on the data falls; with ``keep="all"`` all are, as in the literature. The fewer
    bits weights have, the more there is to gain.

    A layer that is called several times has one bias, and gets the mean over all its calls. A layer
    without a bias gets one, a parameter ``bias``, so ``state_dict()`` has a key more, and loads
    into models that have the bias too; after :func:`fuse` convolutions with a norm have one. The
    float model, that is the model in FLOAT, computes with the new biases too: keep a copy to
    compare with, and call this once: a second call would compare with the corrected biases. It does
    not combine with :func:`recalibrate_norms` and :func:`reconstruct` for the same reason, so
    choose one of the three; layers whose weight was reconstructed are left as they are. Quantizers
    keep their ranges, names and states.

    The data is run three times, and once for each layer, in eval mode and without gradients, all
    quantizers in VALIDATION. With ``keep="all"`` the runs for layers go as far as the layer, and of
    a single batch one run is enough for all of them. A few hundred samples, such as those of the
    calibration, are enough. The float model's outputs stay in memory.

    Without data the means come from the model: where a batch norm, and perhaps a ReLU, makes what a
    layer reads, its beta and gamma tell the mean of each input channel (those of a normal
    distribution, clipped by the ReLU), which times the rounding error of the weights is the error
    of the output (Nagel et al. 2019, section 4.2). What activations lose is not in it, and layers
    that read something else stay as they are. The norms have to be there: not after :func:`fuse`.

    Args:
        model: calibrated.
        data: batches as ``calibrate`` takes them, which can be run over again (a list, a DataLoader
            without shuffling); None computes from batch norms.
        keep: ``"closer"``, the corrections that bring the model's outputs closer to the float
            model's on the data, or ``"all"``. Without data, or without floating outputs, all.
        pattern: of quantizers, as in ``set_fake_quantize``: layers whose weight's quantizer
            matches; by default all.
        forward, device: as in ``calibrate``.
        progress: whether to show a progress bar; by default if standard error is a terminal.
        checkpoint: a file that keeps the corrections so far, for a run that is interrupted. The
            model has to be as it was before to the bit, and so has the data. The file is deleted at
            the end.

    Returns:
        What changed, by layer, with the error before and after.

    Raises:
        TypeError: ``model`` is no module, or data cannot be run over again.
        ValueError: the model has no quantizers, or none of a layer's weight; an unknown ``keep``;
            two layers share a bias; the data is empty, gives a channel a single value, or gives
            other batches the second time; a layer's outputs are not finite; a checkpoint of another
            run; without data, no batch norm tells what a layer reads.
        RuntimeError: a quantizer has no range; or a layer does not read the bias that it got.

    If it raises, the model is as it was.
    """
    prepared = PreparedModel(_WHO, model)
    if keep not in get_args(Keep):
        raise ValueError(f"{_WHO}: unknown keep {bounded(keep)}; known: {joined(get_args(Keep))}")
    if data is None:
        _check_without_data(forward=forward, device=device, checkpoint=checkpoint)
        return _without_data(prepared, pattern)
    walk = LayerWalk(prepared, data, pattern=pattern, forward=forward, device=device)
    chosen, left = bias_problems(_WHO, prepared.root, walk.layers)
    with walk.guarded():
        run = _Run(walk, chosen, keep)
        run.measure()
        names = [name for name in walk.order if name in chosen and name not in run.unread]
        if not names:
            raise ValueError(
                f"{_WHO}: expected layers whose bias can be corrected, got "
                f"{_reasons(walk.left | left | run.unread)}"
            )
        about = fingerprint(prepared, walk.digests, [keep, *names])
        kept = LayerCheckpoint(_WHO, checkpoint, about)
        with restored_biases({name: walk.layers[name].module for name in names}):
            run.correct(names, kept, progress)
            rows = run.rows(names)
    kept.finish()
    before, after = (error.value for error in run.errors)
    return BiasCorrection(tuple(rows), walk.left | left | run.unread, before, after)


def _check_without_data(**arguments: object) -> None:
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(f"{_WHO}: expected data with {' and '.join(given)}, got None")


def _without_data(prepared: PreparedModel, pattern: Pattern | None) -> BiasCorrection:
    layers, left = find_layers(prepared, pattern)
    chosen, without_place = bias_problems(_WHO, prepared.root, layers)
    means, unknown = input_means(prepared.root, list(chosen))
    left |= without_place | unknown
    if not means:
        raise ValueError(
            f"{_WHO}: expected data, or layers whose input batch norms describe, got None and "
            f"{_reasons(left)}; pass data"
        )
    created = {name for name in means if chosen[name].module.bias is None}
    shifts = weight_shifts(prepared, {name: chosen[name] for name in means}, means)
    if wrong := [name for name, shift in shifts.items() if not bool(shift.isfinite().all())]:
        raise ValueError(
            f"{_WHO}: expected finite weights and batch norms, got others in {shown(wrong)} or in "
            "what makes its input; leave these out by pattern"
        )
    rows = []
    for name, shift in shifts.items():
        add_to_bias(chosen[name], shift)
        largest = float(shift.abs().max())
        rows.append(BiasRow(name, len(shift), name in created, True, largest, math.nan, math.nan))
    return BiasCorrection(tuple(rows), left, math.nan, math.nan)


class _Run:
    """The measurements and corrections of one call."""

    def __init__(self, walk: LayerWalk, chosen: Mapping[str, WalkedLayer], keep: Keep) -> None:
        self.walk = walk
        self.chosen = chosen
        self.keep = keep
        self.floating, self.before, self.after = (ChannelSums() for _ in range(3))
        self.light = ChannelSums()  # as before, summed as the runs that judge corrections do
        self.unread: dict[str, str] = {}  # layers that do not read their bias
        self.shifts: dict[str, Tensor] = {}
        self.created = {name for name, layer in chosen.items() if layer.module.bias is None}
        outputs = self.outputs = FloatOutputs()
        self.errors = [outputs.compared(), outputs.compared()]

    def measure(self) -> None:
        """The float model's means, and those of the model as it is."""
        walk = self.walk
        walk.enter(FakeQuantState.FLOAT)
        walk.run(functools.partial(_add, self.floating), self.outputs.keep)
        self._check(self.floating, "the float model")
        few = [n for n in walk.order if n in self.chosen and self.floating.counts[n] < _FEWEST]
        if few:
            raise ValueError(
                f"{_WHO}: expected data to give each channel {_FEWEST} values or more, got "
                f"{self.floating.counts[few[0]]} in {shown(few)}; pass hundreds"
            )
        walk.enter(FakeQuantState.VALIDATION)
        self.errors = [self.outputs.compared(), self.outputs.compared()]
        walk.run(self._add_before, self.errors[0].add)
        self._check(self.before, "the quantized model")

    def correct(self, names: list[str], kept: LayerCheckpoint, progress: bool | None) -> None:
        """Corrects the layers one after the other, and measures again."""
        layers = self.walk.layers
        done = []
        for name in names:
            like = {_SHIFT: self.floating.sums[name]}
            if (known := kept.get(name, like)) is None:
                break
            self.shifts[name] = known[_SHIFT]
            if self._is_kept(name):
                add_to_bias(layers[name], known[_SHIFT])
            done.append(name)
        left = names[len(done) :]
        error = self.errors[0].value
        if self.keep == "all" or math.isnan(error):
            steps = self._all(left, kept)
        else:
            steps = self._closer(left, kept, self._as_it_is(left) if done else (error, self.light))
        for _ in progress_bar(itertools.chain(done, steps), len(names), _WHO, progress):
            pass
        self.walk.run(self._add_after, self.errors[1].add)
        self._check(self.after, "the corrected model")

    def _all(self, names: list[str], kept: LayerCheckpoint) -> Iterator[str]:
        """Corrects each layer; gives its name."""
        sums = ChannelSums()

        def finish(name: str) -> None:
            shift = self.shifts[name] = self._shift(name, sums)
            add_to_bias(self.walk.layers[name], shift)
            kept.put(name, {_SHIFT: shift})

        return self.walk.sequentially(names, functools.partial(_add, sums), finish)

    def _closer(
        self, names: list[str], kept: LayerCheckpoint, now: tuple[float, ChannelSums]
    ) -> Iterator[str]:
        """Corrects each layer if the outputs' error falls by it; gives its name.

        ``now``: that error, and the layers' means. The run that judges a correction measures the
        means of the layers after it too, so no layer needs a run of its own for its mean.
        """
        for i, name in enumerate(names):
            error, sums = now
            shift = self._shift(name, sums)
            restore = bias_keeper(self.walk.layers[name].module)
            add_to_bias(self.walk.layers[name], shift)
            corrected = self._as_it_is(names[i + 1 :])
            if corrected[0] < error:
                now = corrected
            else:
                restore()
                shift = torch.zeros_like(shift)
            self.shifts[name] = shift
            kept.put(name, {_SHIFT: shift})
            yield name

    def _shift(self, name: str, sums: ChannelSums) -> Tensor:
        """What the float model's mean has more."""
        if name not in sums.counts:
            raise not_called(_WHO, name)
        return self.floating.mean(name) - sums.mean(name)

    def _as_it_is(self, names: list[str]) -> tuple[float, ChannelSums]:
        """The outputs' error of the model as it is, and what these layers make."""
        found, sums, wanted = self.outputs.compared(), ChannelSums(), {*names}

        def add(call: LayerCall) -> None:
            if call.name in wanted:
                sums.add_sums(call.name, call.output, call.ch_axis)

        self.walk.run(add if names else None, found.add)
        return found.value, sums

    def _is_kept(self, name: str) -> bool:
        return bool(self.shifts[name].any())

    def rows(self, names: list[str]) -> list[BiasRow]:
        rows = []
        for name in names:
            before, after = (self._mean_error(name, sums) for sums in (self.before, self.after))
            shift = self.shifts[name]
            largest, is_kept = float(shift.abs().max()), self._is_kept(name)
            created = is_kept and name in self.created
            rows.append(BiasRow(name, len(shift), created, is_kept, largest, before, after))
        return rows

    def _add_before(self, call: LayerCall) -> None:
        _add(self.before, call)
        self.light.add_sums(call.name, call.output, call.ch_axis)
        if call.name in self.chosen and not reads_own_bias(call):
            self.unread[call.name] = "its forward does not read its bias as it is"

    def _add_after(self, call: LayerCall) -> None:
        _add(self.after, call)
        if call.name in self.shifts and not reads_own_bias(call):
            raise RuntimeError(
                f'{_WHO}: expected "{call.name}" to read the bias that it got, got a forward that '
                "does not; leave the layer out by pattern"
            )

    def _mean_error(self, name: str, sums: ChannelSums) -> float:
        error = self._shift(name, sums).square().mean().sqrt()
        power = self.floating.power(name)
        return float(error) / power if power else math.nan

    def _check(self, sums: ChannelSums, what: str) -> None:
        if wrong := [name for name in sums.not_finite() if name in self.chosen]:
            raise ValueError(
                f"{_WHO}: expected {what} to compute finite values, got infinite or NaN ones in "
                f"{shown(wrong)}; look at the data and the weights, or leave these out by pattern"
            )


def _add(sums: ChannelSums, call: LayerCall) -> None:
    sums.add(call.name, call.output, call.ch_axis)


def _reasons(left: Mapping[str, str]) -> str:
    return shown([f"{label_of(name)} ({why})" for name, why in left.items()])
