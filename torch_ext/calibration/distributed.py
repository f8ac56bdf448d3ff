"""Calibration and training on many processes: statistics and ranges that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_ext import ops
from torch_ext.calibration.process_group import Ranks
from torch_ext.files.quantizer_params import spec_of
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.state_table import ACCUMULATE, FOLLOW
from torch_ext.utils.text import shown

_WHO = "sync_observers"
M = TypeVar("M", bound=nn.Module)
Quantizers = Mapping[str, FakeQuantize]
Commit = Callable[[], None]


@torch.no_grad()
def sync_observers(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Gives every rank what all ranks observed; every rank has to call it.

    In CALIBRATION: each statistic becomes, bit for bit, the one of a single process that saw the
    data of all ranks, however it was dealt out; a rank may have seen nothing. Call it once, after
    the data and before leaving CALIBRATION::

        calibrate(model, shard_of_this_rank, state="calibration")
        sync_observers(model)
        set_fake_quantize(model, "validation")         # solves the same on every rank

    In QAT: each range becomes the mean of the ranks' ranges. Starting from equal ranges that is
    the moving average over the mean of the ranks' batches; call it after every step. Ranks whose
    quantizer has no range yet do not count. Of methods that learn their range (``lsq``,
    ``pact``) it is the mean of the learned parameters: equal on all ranks already, where
    gradients are, unless each rank began with its own first batch.

    Quantizers in another state stay as they are, and so do those of weights, which are the same
    on every rank. Collectives, whatever the number of quantizers: three numbers, to compare the
    models; in CALIBRATION one MAX (extrema, int32) and one SUM (counts, int64) of a flat tensor,
    in QAT one SUM (float64). They run on the statistics' device where the group has a backend
    for it.

    Args:
        group: the ranks that take part; None is all.

    Raises, on every rank and before anything is changed: ValueError where models differ in
    names, shapes, rules, options or states; RuntimeError where there is no process group, where
    no quantizer is in CALIBRATION or QAT, where a rank is missing, after the group's timeout, and
    where a statistic is synchronised already: its data would count once for each rank.
    ``reset_statistics`` or a new ``calibrate`` begins anew.
    """
    ranks = Ranks(_WHO, group)
    found: Quantizers = {}
    facts: dict[str, dict[str, Any]] = {}
    problem = None
    try:
        found = _with_data_of_this_rank(PreparedModel(_WHO, model).quantizers)
        facts = {name: _facts(ranks, quantizer) for name, quantizer in found.items()}
        _check(model, found)
    except Exception as error:  # the others wait: they are told before it is raised
        problem = error
    devices = [quantizer.solved.device for quantizer in found.values()]
    ranks.agree(facts, problem, (devices or [torch.device("cpu")])[0])
    accumulating = [q.observer for q in found.values() if q.state.value in ACCUMULATE]
    following = [q for q in found.values() if q.state.value in FOLLOW]
    # All that can fail comes before the first change.
    commits: list[Commit] = []
    if accumulating:
        commits.append(_merge(ranks, accumulating))
    if following:
        commits.append(_average(ranks, following))
    for commit in commits:
        commit()


def keep_statistics_local(model: M) -> M:
    """Tells DistributedDataParallel to leave the observers' statistics to each rank.

    It copies the buffers of rank 0 to all ranks at every forward otherwise, which overwrites what
    the others observed. To be called with the very module that is wrapped, before it is::

        model = DistributedDataParallel(keep_statistics_local(model))

    Ranges, scales and all that is no statistic are broadcast as before. Returns the model.
    """
    who = "keep_statistics_local"
    PreparedModel(who, model)  # raises for a model without quantizers
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{who}: expected a model that is not wrapped yet, got one inside "
            "DistributedDataParallel, which has chosen its buffers already"
        )
    names = {
        f"{name}.{buffer}".strip(".")
        for name, module in model.named_modules()
        if isinstance(module, Observer)
        for buffer, _ in module.named_buffers()
    }
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, sorted(names))
    return model


def _with_data_of_this_rank(quantizers: Quantizers) -> Quantizers:
    """Those that see data: weights are the same on every rank, and given scales see nothing."""
    return {name: quantizer for name, quantizer in quantizers.items() if quantizer.accumulates_data}


def _facts(ranks: Ranks, quantizer: FakeQuantize) -> dict[str, Any]:
    """What has to be equal on all ranks."""
    place = ranks.meeting_place(quantizer.solved.device)
    return {**spec_of(quantizer), "state": quantizer.state.value, "device": place.type}


def _check(model: nn.Module, found: Quantizers) -> None:
    states = dict.fromkeys(quantizer.state.value for quantizer in found.values())
    if found and not any(state in ACCUMULATE | FOLLOW for state in states):
        raise RuntimeError(
            f"{_WHO}: expected quantizers to be in CALIBRATION or QAT, got {', '.join(states)} for "
            f"{shown(list(found))}; a range that is solved already is not solved again: pass "
            'state="calibration" to calibrate, and leave CALIBRATION after the call'
        )
    own = {name: q.observer for name, q in found.items() if q.state.value in ACCUMULATE}
    if again := [name for name, observer in own.items() if observer.synced]:
        raise RuntimeError(
            f"{_WHO}: expected statistics of this rank's data alone, got some that hold all ranks' "
            f"already: {shown(again)}; call reset_statistics, or calibrate anew"
        )
    broadcast = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers
        for buffer in module.modules_buffers
    }
    if lost := [name for name, observer in own.items() if id(observer.tally) in broadcast]:
        raise RuntimeError(
            f"{_WHO}: expected DistributedDataParallel to leave statistics alone, got one that "
            f"overwrites them with rank 0's: {shown(lost)}; wrap keep_statistics_local(model)"
        )


def _merge(ranks: Ranks, observers: list[Observer]) -> Commit:
    """Adds up the statistics of all ranks."""
    place = ranks.meeting_place(observers[0].extrema.device)
    keys = torch.cat([_keys(observer.extrema).to(place) for observer in observers])
    found = _extrema(ranks.reduce_(keys, dist.ReduceOp.MAX))
    extrema = torch.split(found, [observer.channel_len for observer in observers])

    sizes = [size for o in observers for size in (o.tally.numel(), o.counts.numel())]
    flat = torch.empty(sum(sizes), dtype=torch.int64, device=place)
    parts = torch.split(flat, sizes)
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    for observer, common, (tally, counts) in zip(observers, extrema, pairs, strict=True):
        own_tally, own_counts = _in_common_window(observer, common.to(observer.extrema.device))
        tally.copy_(own_tally.flatten())
        counts.copy_(own_counts.flatten())
    ranks.reduce_(flat, dist.ReduceOp.SUM)

    def commit() -> None:
        for observer, common, (tally, counts) in zip(observers, extrema, pairs, strict=True):
            observer.extrema.copy_(common)
            observer.tally.copy_(tally.view_as(observer.tally))
            observer.counts.copy_(counts.view_as(observer.counts))
            observer.synced = True

    return commit


def _keys(extrema: Tensor) -> Tensor:
    """int32 [C,2], ~key of min and key of max: of both, the larger one reaches farther.

    Keys are integers that order as the floats do, as `key_of` in csrc/core/histogram.h: a MAX of
    floats may take subnormals for zeros, and either zero for the other.
    """
    keys = _key_bits(extrema.view(torch.int32))
    return torch.stack([~keys[:, 0], keys[:, 1]], 1)


def _extrema(keys: Tensor) -> Tensor:
    """The extrema float32 [C,2] of `_keys`."""
    return _key_bits(torch.stack([~keys[:, 0], keys[:, 1]], 1)).view(torch.float32)


def _key_bits(bits: Tensor) -> Tensor:
    """Bits of floats to keys, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _in_common_window(observer: Observer, extrema: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of tally and counts as they are once the data reaches as far as `extrema`.

    Merging a statistic that has these extrema and counts nothing moves the window: the octaves
    that fall out of it become tiny. Octaves keep their slots, so the counts of all ranks then add
    up slot by slot.
    """
    tally, counts = observer.tally.clone(), observer.counts.clone()
    nothing = (torch.zeros_like(tally), torch.zeros_like(counts))
    ops.merge_(observer.extrema.clone(), tally, counts, extrema, *nothing)
    return tally, counts


def _average(ranks: Ranks, quantizers: list[FakeQuantize]) -> Commit:
    """Takes the mean of the ranks' ranges, where a rank has one."""
    place = ranks.meeting_place(quantizers[0].solved.device)
    parts = []
    for quantizer in quantizers:
        weight = quantizer.solved.double()
        values = quantizer.shared_values().detach().double()
        # A rank without a range has nothing to add, whatever its values are.
        own = torch.where(weight > 0, values, torch.zeros_like(values))
        parts.append(torch.cat([own, weight]).to(place))
    sums = ranks.reduce_(torch.cat(parts), dist.ReduceOp.SUM)
    means = []
    for quantizer, part in zip(
        quantizers, torch.split(sums.cpu(), [len(part) for part in parts]), strict=True
    ):
        if part[-1] > 0:
            means.append((quantizer, (part[:-1] / part[-1]).to(quantizer.solved.device)))

    def commit() -> None:
        for quantizer, mean in means:
            quantizer.take_shared_(mean)

    return commit
