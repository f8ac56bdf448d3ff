"""Calibration and training on many processes: merges statistics and averages ranges."""

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
    """Merges the statistics of all ranks, or averages their ranges. Every rank has to call it.

    In CALIBRATION, each statistic becomes bit for bit that of a single process which saw the data
    of all ranks, however it was distributed; a rank may have seen nothing. Call it once, after the
    data and before leaving CALIBRATION::

        calibrate(model, shard_of_this_rank, state="calibration")
        sync_observers(model)
        set_fake_quantize(model, "validation")         # solves the same on every rank

    In QAT, each range becomes the mean of the ranks' ranges; call it after every step. If the
    ranges were equal before the step, that is the moving average of the mean of the ranks' batch
    ranges. A rank whose quantizer has no range yet is left out of the mean. Methods that learn
    their range (``lsq``, ``pact``) have their learned parameters averaged. Synchronised gradients
    keep these equal anyway, unless each rank initialised them from its own first batch.

    Quantizers in other states are left as they are, and so are those of weights, which are the
    same on every rank.

    The collectives do not depend on the number of quantizers: one MAX of three integers, to compare
    the models; in CALIBRATION one MAX (extrema, int32) and one SUM (counts, int64) of a flat
    tensor; in QAT one SUM (float64). They run on the statistics' device if the group has a backend
    for it.

    Args:
        model: a prepared model, wrapped or not.
        group: the process group of the ranks that take part; by default, all.

    Raises:
        TypeError: ``model`` is no module, or ``group`` no process group.
        ValueError: the models of the ranks differ in names, shapes, rules, options or states, a
            model has no quantizers, or this process is not in the group.
        RuntimeError: there is no process group; no quantizer is in CALIBRATION or QAT; another rank
            raised, or did not call this within the group's timeout; ``DistributedDataParallel``
            broadcasts statistics, see :func:`keep_statistics_local`; or a statistic is synchronised
            already, so that its data would count once for each rank. :func:`reset_statistics` or a
            new :func:`calibrate` starts over.

    If one rank raises, all do, and nothing is changed.
    """
    ranks = Ranks(_WHO, group)
    quantizers: Quantizers = {}
    facts: dict[str, dict[str, Any]] = {}
    problem = None
    try:
        quantizers = _with_data_of_this_rank(PreparedModel(_WHO, model).quantizers)
        facts = {name: _facts(ranks, quantizer) for name, quantizer in quantizers.items()}
        _check(model, quantizers)
    except Exception as error:  # `agree` raises it, after telling the ranks that wait
        problem = error
    devices = [quantizer.solved.device for quantizer in quantizers.values()]
    ranks.agree(facts, problem, (devices or [torch.device("cpu")])[0])
    accumulating = [q.observer for q in quantizers.values() if q.state.value in ACCUMULATE]
    following = [q for q in quantizers.values() if q.state.value in FOLLOW]
    # Everything that can raise runs before the first change.
    commits: list[Commit] = []
    if accumulating:
        commits.append(_merge(ranks, accumulating))
    if following:
        commits.append(_average(ranks, following))
    for commit in commits:
        commit()


def keep_statistics_local(model: M) -> M:
    """Excludes the observers' statistics from the buffers that DistributedDataParallel broadcasts.

    By default it copies all buffers of rank 0 to the other ranks in every forward, which overwrites
    what those have observed. Pass the module that is about to be wrapped::

        model = DistributedDataParallel(keep_statistics_local(model))

    All other buffers, ranges and scales among them, are still broadcast.

    Args:
        model: a prepared model that is not wrapped yet.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no quantizers, or contains a ``DistributedDataParallel``.
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
    """The quantizers to synchronise: not those of weights, nor those with a given scale."""
    return {name: quantizer for name, quantizer in quantizers.items() if quantizer.accumulates_data}


def _facts(ranks: Ranks, quantizer: FakeQuantize) -> dict[str, Any]:
    """What has to be equal on all ranks."""
    device = ranks.collective_device(quantizer.solved.device)
    return {**spec_of(quantizer), "state": quantizer.state.value, "device": device.type}


def _check(model: nn.Module, quantizers: Quantizers) -> None:
    """Raises RuntimeError for states, and for statistics, that cannot be synchronised."""
    states = dict.fromkeys(quantizer.state.value for quantizer in quantizers.values())
    if quantizers and not any(state in ACCUMULATE | FOLLOW for state in states):
        raise RuntimeError(
            f"{_WHO}: expected quantizers to be in CALIBRATION or QAT, got {', '.join(states)} for "
            f"{shown(list(quantizers))}; ranges are solved when CALIBRATION is left: pass "
            'state="calibration" to calibrate, and leave CALIBRATION after this call'
        )
    observers = {n: q.observer for n, q in quantizers.items() if q.state.value in ACCUMULATE}
    if synced := [name for name, observer in observers.items() if observer.synced]:
        raise RuntimeError(
            f"{_WHO}: expected statistics of this rank's data alone, got some that hold all ranks' "
            f"already: {shown(synced)}; call reset_statistics, or calibrate again"
        )
    broadcast = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers
        for buffer in module.modules_buffers
    }
    if lost := [name for name, observer in observers.items() if id(observer.tally) in broadcast]:
        raise RuntimeError(
            f"{_WHO}: expected DistributedDataParallel to leave statistics alone, got one that "
            f"overwrites them with rank 0's: {shown(lost)}; wrap keep_statistics_local(model)"
        )


def _merge(ranks: Ranks, observers: list[Observer]) -> Commit:
    """Merges the statistics of all ranks; the observers change when the result is called."""
    device = ranks.collective_device(observers[0].extrema.device)
    keys = torch.cat([_keys(observer.extrema).to(device) for observer in observers])
    all_extrema = _extrema(ranks.reduce_(keys, dist.ReduceOp.MAX))
    extrema = torch.split(all_extrema, [len(observer.extrema) for observer in observers])

    sizes = [size for o in observers for size in (o.tally.numel(), o.counts.numel())]
    flat = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    parts = torch.split(flat, sizes)
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    for observer, common, (tally, counts) in zip(observers, extrema, pairs, strict=True):
        local_tally, local_counts = _in_common_window(observer, common.to(observer.extrema.device))
        tally.copy_(local_tally.flatten())
        counts.copy_(local_counts.flatten())
    ranks.reduce_(flat, dist.ReduceOp.SUM)

    def commit() -> None:
        for observer, common, (tally, counts) in zip(observers, extrema, pairs, strict=True):
            observer.extrema.copy_(common)
            observer.tally.copy_(tally.view_as(observer.tally))
            observer.counts.copy_(counts.view_as(observer.counts))
            observer.synced = True

    return commit


def _keys(extrema: Tensor) -> Tensor:
    """int32 [C,2] of extrema float32 [C,2]: ~key of the minimum, key of the maximum.

    Keys are integers in the order of the floats, as `key_of` in csrc/core/histogram.h. A MAX of
    these pairs gives the minimum and the maximum. It is exact, whereas a MAX of floats may flush
    subnormals to zero and may return either of +0 and -0.
    """
    keys = _key_bits(extrema.view(torch.int32))
    return torch.stack([~keys[:, 0], keys[:, 1]], 1)


def _extrema(keys: Tensor) -> Tensor:
    """The inverse of `_keys`."""
    return _key_bits(torch.stack([~keys[:, 0], keys[:, 1]], 1)).view(torch.float32)


def _key_bits(bits: Tensor) -> Tensor:
    """Maps the bits of floats to their keys; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _in_common_window(observer: Observer, extrema: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of tally and counts, with the histogram's window where `extrema` [C,2] put it.

    Merging an empty statistic that has these extrema moves the window; the counts of octaves that
    fall out of it move to the tally's tiny values. An octave keeps its slot when the window moves,
    so the counts of all ranks can be added slot by slot afterwards.
    """
    tally, counts = observer.tally.clone(), observer.counts.clone()
    no_counts = (torch.zeros_like(tally), torch.zeros_like(counts))
    ops.merge_(observer.extrema.clone(), tally, counts, extrema, *no_counts)
    return tally, counts


def _average(ranks: Ranks, quantizers: list[FakeQuantize]) -> Commit:
    """Averages the ranges that the ranks have; quantizers change when the result is called."""
    device = ranks.collective_device(quantizers[0].solved.device)
    parts = []
    for quantizer in quantizers:
        weight = quantizer.solved.double()
        values = quantizer.shared_values().detach().double()
        # The values of a rank without a range are no numbers to average, and may be NaN.
        values = torch.where(weight > 0, values, torch.zeros_like(values))
        parts.append(torch.cat([values, weight]).to(device))
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
