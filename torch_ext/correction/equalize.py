"""Equalizes the ranges of channels across layers, without changing what a model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_ext.calibration.restore import one_call_at_a_time, restored, restored_on_error
from torch_ext.correction.equalization.channel_changes import (
    Before,
    ChannelChanges,
    may_absorb,
)
from torch_ext.correction.equalization.channel_data import ChannelData, channel_data
from torch_ext.correction.equalization.channel_scales import ChannelScales
from torch_ext.correction.equalization.layer_weight import tensor_of
from torch_ext.correction.equalization.scale_sites import ScaleSite, ScaleSites, scale_sites
from torch_ext.correction.equalization.stale_quantizers import Seen, seen_by_quantizers
from torch_ext.prepare.batch_norms.outputs import Outputs
from torch_ext.prepare.insertion.record_runs import examples_of, record_modes
from torch_ext.prepare.module_classes import copied
from torch_ext.prepare.remove_quantizers import remove_quantizers
from torch_ext.quantizers.find import Pattern, check_model, matching_names, named_quantizers
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import (
    bounded,
    check_callable,
    parse_flag,
    parse_fraction,
    parse_integer,
    split_arguments,
)
from torch_ext.utils.batches import Forward, check_batches, default_forward, model_device
from torch_ext.utils.text import label_of, shown, text_table

_WHO = "equalize"
Clipped = Literal["keep", "scale"]
_CLIPPED: tuple[Clipped, ...] = ("keep", "scale")
_SIGMAS = 3.0  # of the normal distribution that a batch norm gives


@dataclass(frozen=True)
class EqualizationRow:
    """A value whose channels were scaled, of an :class:`Equalization`."""

    #: The layer that makes it, or the norm if none is before that.
    name: str
    #: The layers that read it.
    readers: tuple[str, ...]
    #: The number of channels.
    channels: int
    #: The least factor that a channel was divided by.
    least: float
    #: The greatest.
    most: float
    #: How much of the tensors' ranges a channel used on the mean, on both sides, 0 to 1.
    before: float
    #: The same now; per-tensor scales lose nothing where it is 1.
    after: float
    #: The number of channels of which a constant was absorbed.
    absorbed: int


@dataclass(frozen=True)
class Equalization:
    """The result of :func:`equalize`; as text, a table."""

    #: In the order of execution.
    rows: tuple[EqualizationRow, ...]
    #: The layers and norms whose results were left as they were, with the reason.
    left: dict[str, str]
    #: How often all values were visited.
    sweeps: int
    #: The largest change of the float outputs for the examples, relative to the largest output.
    float_change: float
    #: Names of quantizers that forgot their range, and have to be calibrated again.
    stale: tuple[str, ...]

    def __str__(self) -> str:
        header = ("value of", "read by", "channels", "divided by", "range used", "now", "absorbed")
        rows = [
            (
                row.name,
                shown(row.readers, 3),
                str(row.channels),
                f"{row.least:.3g} to {row.most:.3g}",
                f"{row.before:.3f}",
                f"{row.after:.3f}",
                str(row.absorbed),
            )
            for row in self.rows
        ]
        text = text_table(header, rows) if rows else "no value was scaled"
        text += f"\n{self.sweeps} sweeps, float outputs changed by {self.float_change:.2g}"
        for name, why in self.left.items():
            text += f"\nleft: {label_of(name)} ({why})"
        if self.stale:
            text += f"\ncalibrate again: {shown(self.stale, 10)}"
        return text


def equalize(
    model: nn.Module,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    *,
    pattern: Pattern | None = None,
    alpha: float = 0.5,
    iterations: int = 50,
    absorb: bool = False,
    clipped: Clipped = "keep",
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Equalization:
    """Scales channels between layers so that their weights' ranges match; changes ``model``.

    A layer's output channel may be divided by any factor, if the layers that read it multiply their
    weights by it: the model computes the same, up to rounding. The factors are those with which the
    channel's range is the same in all these weights (cross-layer equalization, Nagel et al. 2019),
    so that a scale per tensor fits all channels. Chains are visited until nothing changes.

    A run of the model on the example finds the values: between a layer and the layers that alone
    read it, also through ReLU, LeakyReLU, PReLU, pooling, concatenation and what moves values. A
    batch norm behind the layer, folded or not, has its weight and bias divided. Values that a sum,
    another activation or the caller reads stay as they are; ``left`` of the result says why.

    With ``data``, values of norms that no layer is before are scaled too (layer norms before the
    layers of a transformer): what the activations' ranges have in excess moves to the weights
    that read them (SmoothQuant, Xiao et al. 2023).

    Run it on a float model before :func:`prepare_qat`, after :func:`fuse`; or on a prepared one.
    There it sets all quantizers to FLOAT, and those whose values or weights it scaled forget range
    and statistic: calibrate again. If it scales nothing, they keep their states. The weights
    and biases that change are the model's own, so its FLOAT outputs stay, but not its float
    ``state_dict``. An optimizer's state of them is stale.

    Args:
        model: float or prepared; wrapped or not.
        example_inputs: as for :func:`prepare_qat`.
        data: batches as :func:`calibrate` takes them; run over once.
        pattern: names, possibly with ``*`` and ``?``, of the layers and norms whose results may be
            scaled, or a list of them; by default, all.
        alpha: for norms: 0 leaves a channel's range to the activations, 1 to the weights.
        iterations: how often chains are visited at most.
        absorb: also moves a constant out of channels whose values before a ReLU are never below
            it, into the biases behind the layers that read them ("high biases", section 4.1.3 of
            Nagel et al.): the least value in ``data``, else the bias of a batch norm less three
            times its weight. Float outputs then change where values are below it. Layers with
            zeros around their input are left out.
        clipped: what to do where a ReLU6 is on the way: ``"keep"`` leaves the value as it is,
            ``"scale"`` replaces it by :class:`ChannelLimits`, as its limit becomes another for each
            channel. Engines fuse a ReLU6 into a convolution, but not that. Float models only. One
            module that is called at several places cannot have the limits of all; a ReLU in the
            place of each ReLU6 has none, and changes the outputs where values reach 6.
        forward, device, progress: for ``data``, as in :func:`calibrate`.

    Returns:
        What was scaled, and what not and why.

    Raises:
        TypeError: ``model`` is no module, or an argument has another type than expected.
        ValueError: the model does not run on the example; a weight or a value in ``data`` is not
            finite; ``data`` gives no batches; an unknown name in ``pattern`` or ``clipped``.

    If it raises, the model is unchanged.
    """
    root = check_model(_WHO, model)
    quantizers = named_quantizers(root)
    alpha = parse_fraction(_WHO, "alpha", alpha)
    parse_integer(_WHO, "iterations", iterations, 1, 10_000)
    parse_flag(_WHO, "absorb", absorb)
    check_callable(_WHO, "forward", forward)
    if clipped not in _CLIPPED:
        raise ValueError(
            f"{_WHO}: expected clipped to be {' or '.join(_CLIPPED)}, got {bounded(clipped)}"
        )
    if clipped == "scale" and quantizers:
        raise ValueError(
            f'{_WHO}: expected a float model with clipped="scale", got one that is prepared '
            "already; equalize before prepare_qat"
        )
    if data is not None:
        check_batches(_WHO, "data", data)
    where = model_device(_WHO, root, device)
    with one_call_at_a_time(_WHO, root):
        plain = remove_quantizers(root) if quantizers else copied(_WHO, root)
        found = scale_sites(record_modes(_WHO, plain, example_inputs, lambda _: False))
        found = _chosen(found, pattern, clipped)
        _check_finite(root, found.sites)
        measured = ChannelData({}, {})
        if data is not None:
            with restored(quantizers):
                for quantizer in quantizers.values():
                    quantizer.enter(FakeQuantState.FLOAT)
                measured = channel_data(
                    _WHO, root, found.sites, data, forward or default_forward(_WHO), where, progress
                )
        given = (data is not None, alpha, iterations, example_inputs)
        run = _Equalizing(plain, found, measured, *given)
        run.verify()
        return run.carry_out(root, absorb)


class _Equalizing:
    """One call: ``plain`` is a float copy of the model."""

    def __init__(
        self,
        plain: nn.Module,
        found: ScaleSites,
        measured: ChannelData,
        has_data: bool,
        alpha: float,
        iterations: int,
        example_inputs: Any,
    ) -> None:
        self.plain, self.measured = plain, measured
        self.alpha, self.iterations = alpha, iterations
        self.examples = [split_arguments(_WHO, given) for given in examples_of(example_inputs)]
        self.sites, self.left = dict(found.sites), dict(found.left)
        for name, site in found.sites.items():
            if site.layer is None and name not in measured.largest:
                del self.sites[name]
                self.left[name] = (
                    "the data comes by no module that makes or reads its result"
                    if has_data
                    else "no layer is before it, so its channels' ranges need data"
                )

    def _solved(self, sites: Mapping[str, ScaleSite], iterations: int) -> ChannelScales:
        scales = ChannelScales(self.plain, sites, self.measured.largest)
        scales.solve(self.alpha, iterations)
        return scales

    def verify(self) -> None:
        """Leaves out what changes the outputs for the examples, in eval mode."""
        self.outputs = Outputs(_WHO, self.plain, self.examples, torch.float32)
        if not self.sites:
            return
        changes = ChannelChanges(self._solved(self.sites, self.iterations), {})
        if self.outputs.are_kept_by(changes.apply):
            return
        # Float64 is slow, and tells a wrong scaling from rounding that a deep model amplifies.
        precise = Outputs(_WHO, self.plain, self.examples, torch.float64)
        if precise.are_kept_by(changes.apply):
            return
        for name, site in list(self.sites.items()):
            changes = ChannelChanges(self._solved({name: site}, 1), {})
            if not precise.are_kept_by(changes.apply):
                del self.sites[name]
                self.left[name] = "with it scaled, the model gives other outputs"

    def carry_out(self, root: nn.Module, absorb: bool) -> Equalization:
        before = ChannelScales(self.plain, self.sites, self.measured.largest)
        scales = self._solved(self.sites, self.iterations)
        constants = self._constants(scales) if absorb else {}
        changes = ChannelChanges(scales, constants)
        values = changes.values(root)
        _check_scaled(root, values)
        change = self.outputs.difference(changes.apply) if self.sites else 0.0
        stale = _carry_out(root, changes, values, self.examples) if self.sites else []
        rows = []
        for name, site in self.sites.items():
            factors, constant = scales.by_site[name], constants.get(name)
            rows.append(
                EqualizationRow(
                    name,
                    tuple(read.layer.name for read in site.reads),
                    site.channels,
                    float(factors.min()),
                    float(factors.max()),
                    before.precision(name),
                    scales.precision(name),
                    0 if constant is None else int((constant > 0).sum()),
                )
            )
        return Equalization(tuple(rows), self.left, scales.sweeps, change, tuple(stale))

    def _constants(self, scales: ChannelScales) -> dict[str, Tensor]:
        """What can be taken from each channel of values before a ReLU, once they are divided."""
        found = {}
        for name, site in self.sites.items():
            least = self.measured.least.get(name)
            if least is None and site.norm:
                weight, bias = (tensor_of(self.plain, vector) for vector in site.vectors)
                assert weight is not None
                assert bias is not None
                least = bias.double() - _SIGMAS * weight.double().abs()
            if least is None or not may_absorb(self.plain, site):
                continue
            constant = (least.detach() / scales.by_site[name]).clamp(min=0.0)
            if bool((constant > 0).any()):
                found[name] = constant
        return found


def _carry_out(
    root: nn.Module, changes: ChannelChanges, values: Mapping[str, Tensor], examples: list[Any]
) -> list[str]:
    """Changes the model; returns the names of the quantizers that forgot their range by it."""
    quantizers = named_quantizers(root)
    before: Seen | None = seen_by_quantizers(_WHO, root, examples) if quantizers else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored_on_error(quantizers))
        undo: Before = changes.apply(root, values)
        try:
            if before is None:
                return []
            stale = before.differing(seen_by_quantizers(_WHO, root, examples))
            for name, quantizer in quantizers.items():
                quantizer.enter(FakeQuantState.FLOAT)
                if name in stale:
                    quantizer.reset_parameters()
            return stale
        except BaseException:
            undo.restore()
            raise


def _chosen(found: ScaleSites, pattern: Pattern | None, clipped: Clipped) -> ScaleSites:
    """The sites that match, and may be scaled."""
    known = [*found.sites, *found.left]
    matching = set(matching_names(_WHO, known, pattern, "layer or norm"))
    sites = {name: site for name, site in found.sites.items() if name in matching}
    left = {name: why for name, why in found.left.items() if name in matching}
    for name, site in list(sites.items()):
        if site.clips and clipped == "keep":
            limits = ", ".join(f"{module} clips at {c.limit:g}" for module, c in site.clips.items())
            left[name] = f'{limits}; clipped="scale" gives each channel a limit of its own'
            del sites[name]
    return ScaleSites(sites, left)


def _check_finite(root: nn.Module, sites: Mapping[str, ScaleSite]) -> None:
    for site in sites.values():
        names = [read.layer.weight for read in site.reads]
        names += [*site.vectors] + ([site.layer.weight] if site.layer else [])
        for name in names:
            tensor = tensor_of(root, name)
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(f"{_WHO}: expected finite weights, got others in {name}")


def _check_scaled(root: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        tensor = tensor_of(root, name)
        made = value if tensor is None else value.to(tensor.dtype)
        if not bool(made.isfinite().all()):
            raise ValueError(
                f"{_WHO}: expected channels whose scaled values are finite, got others in {name}; "
                "leave the layer out by pattern"
            )
