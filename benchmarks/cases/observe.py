"""Filling a statistic: extrema, per channel, histogram; ops against ops, modules too."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import distributions
import torch_ext
from case import MI, NONE, Case, Ceiling, Goals, Job, Missing, Peer, Run, expect, goals
from torch_ext import ops

KI64 = 64 << 10
PEER_BINS = 2048
MANTISSA_BITS, OCTAVES = 10, 16

MIN_MAX = goals((16 * MI, 1, 1.25, 1.5), (16 * MI, 2, 1.05, 1.2))
# Torch's aminmax of 1 Mi values takes less than twice as long as reading them, and that of rows 7
# (16 Mi) to 16 times (1 Mi), so what is aimed for there is a share of the ceiling, not a ratio.
READ = goals((MI, 1, 0.80, 0.95), (16 * MI, 1, 0.80, 0.95), (16 * MI, 2, 0.80, 0.95))
READ_ROWS = goals((MI, 1, 0.80, 0.95), (16 * MI, 1, 0.80, 0.95))
HISTOGRAM = goals((MI, 1, 4, 8), (16 * MI, 1, 4, 8))


def ao_observer(name: str, **arguments: object) -> Any:
    """A new observer of torch.ao, which Torch says it will move to another package."""
    try:
        from torch.ao.quantization import observer
    except ImportError as error:
        raise Missing("this Torch has no torch.ao.quantization") from error
    return getattr(observer, name)(**arguments)


class Statistic:
    """The three tensors that ``observe_`` fills."""

    def __init__(self, channels: int = 1, histogram: bool = False) -> None:
        bins = (OCTAVES, 1 << MANTISSA_BITS) if histogram else (0, 0)
        self.extrema = torch.tensor([[float("inf"), float("-inf")]]).repeat(channels, 1)
        self.tally = torch.zeros(channels, 5, dtype=torch.int64)
        self.counts = torch.zeros(channels, 2, *bins, dtype=torch.int64)

    def observing(self, x: Tensor, ch_axis: int = -1) -> Run:
        """A call that adds x."""
        return functools.partial(
            ops.observe_, x, self.extrema, self.tally, self.counts, ch_axis=ch_axis
        )


def min_max(size: int) -> Job:
    x, statistic = distributions.gauss(size), Statistic()
    run = statistic.observing(x)

    def check() -> None:
        run()
        low, high = torch.aminmax(x)
        expect(statistic.extrema.tolist() == [[low.item(), high.item()]], "extrema")

    aminmax = Peer("torch.aminmax", functools.partial(torch.aminmax, x), MIN_MAX)
    return Job(run, (aminmax,), ceiling=Ceiling("read", x, READ), check=check)


def min_max_module(size: int) -> Job:
    x = distributions.gauss(size)
    ours, theirs = torch_ext.Observer("min_max"), ao_observer("MinMaxObserver")
    peer = Peer("ao MinMaxObserver", functools.partial(theirs, x), goals((KI64, 1, 3, 6)))
    return Job(functools.partial(ours, x), (peer,), ceiling=Ceiling("read", x))


def _check_rows(run: Run, statistic: Statistic, x: Tensor, dim: int) -> Run:
    def check() -> None:
        run()
        low, high = torch.aminmax(x, dim=dim)
        expect(torch.equal(statistic.extrema, torch.stack([low, high], 1)), "extrema")

    return check


def rows(length: int, size: int) -> Job:
    x = distributions.gauss(size // length * length).view(-1, length)
    statistic = Statistic(len(x))
    run = statistic.observing(x, 0)
    aminmax = Peer("torch.aminmax(dim=1)", functools.partial(torch.aminmax, x, dim=1))
    composed = Peer(
        "amin(1), amax(1)",
        lambda: (torch.amin(x, 1), torch.amax(x, 1)),
        goals((16 * MI, 1, 1.7, 2.2)) if length == 4096 else NONE,
    )
    check = _check_rows(run, statistic, x, 1)
    return Job(run, (aminmax,), composed, Ceiling("read", x, READ_ROWS), check)


def rows_module(length: int, size: int) -> Job:
    x = distributions.gauss(size // length * length).view(-1, length)
    ours = torch_ext.Observer(
        "min_max", qscheme=torch.per_channel_symmetric, ch_axis=0, channel_len=len(x)
    )
    theirs = ao_observer("PerChannelMinMaxObserver", ch_axis=0)
    peer = Peer("ao PerChannelMinMaxObserver", functools.partial(theirs, x))
    return Job(functools.partial(ours, x), (peer,), ceiling=Ceiling("read", x))


def innermost(size: int) -> Job:
    x = distributions.gauss(size).view(-1, 4096)
    statistic = Statistic(4096)
    run = statistic.observing(x, 1)
    aminmax = functools.partial(torch.aminmax, x, dim=0)
    peer = Peer("torch.aminmax(dim=0)", aminmax, goals((MI, 1, 8, 25)))
    composed = Peer("amin(0), amax(0)", lambda: (torch.amin(x, 0), torch.amax(x, 0)))
    check = _check_rows(run, statistic, x, 0)
    return Job(run, (peer,), composed, Ceiling("read", x), check)


def composed_histogram(x: Tensor) -> Run:
    """Counts of |x| in 2048 bins, the range known: vectorised ops into reused memory."""
    scale = PEER_BINS / x.abs().max().item()
    magnitude, index = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int32)

    def run() -> Tensor:
        torch.abs(x, out=magnitude)
        magnitude.mul_(scale)
        index.copy_(magnitude).clamp_(max=PEER_BINS - 1)
        return torch.bincount(index, minlength=PEER_BINS)

    return run


def histogram(size: int) -> Job:
    x, statistic = distributions.gauss(size), Statistic(histogram=True)
    run = statistic.observing(x)
    low, high = (bound.item() for bound in torch.aminmax(x))
    histc = functools.partial(torch.histc, x, PEER_BINS, min=low, max=high)

    def check() -> None:
        before = int(statistic.counts.sum())
        run()
        outside = int((x.abs() < 2.0 ** (2 - OCTAVES + 1)).sum())  # may be below the window
        added = int(statistic.counts.sum()) - before
        expect(size - outside <= added <= size and int(histc().sum()) == size, "values counted")

    return Job(
        run,
        (Peer("torch.histc, range given", histc, HISTOGRAM),),
        Peer("bincount", composed_histogram(x), goals((16 * MI, 1, 3, 4.4))),
        Ceiling("read", x),
        check,
    )


def histogram_module(size: int) -> Job:
    x = distributions.gauss(size)
    ours, theirs = torch_ext.Observer("percentile"), ao_observer("HistogramObserver")
    peer = Peer("ao HistogramObserver", functools.partial(theirs, x), HISTOGRAM)
    return Job(functools.partial(ours, x), (peer,), ceiling=Ceiling("read", x))


def histogram_of(name: str, size: int) -> Job:
    """Ours on other data against ours on Gaussian data: no data may be slow."""
    x, normal = distributions.DISTRIBUTIONS[name](size), distributions.gauss(size)
    run = Statistic(histogram=True).observing(x)
    limits: Goals = goals(*((n, t, 0.6, 0.8) for n in (MI, 16 * MI) for t in (1, 2)))
    peer = Peer("ours on gauss", Statistic(histogram=True).observing(normal), limits)
    return Job(run, (peer,), ceiling=Ceiling("read", x))


def histogram_bf16(size: int) -> Job:
    x = distributions.gauss(size)
    run = Statistic(histogram=True).observing(x.bfloat16())
    peer = Peer("ours on float32", Statistic(histogram=True).observing(x))
    return Job(run, (peer,), ceiling=Ceiling("read", x.bfloat16()))


def second_thread(size: int) -> Job:
    x = distributions.gauss(size)
    two, one = Statistic(histogram=True).observing(x), Statistic(histogram=True).observing(x)

    def on(threads: int, run: Run) -> Run:
        def call() -> None:
            torch.set_num_threads(threads)
            run()
            torch.set_num_threads(2)

        return call

    limits = goals((MI, 2, 1.6, 1.95), (16 * MI, 2, 1.6, 1.95))
    return Job(on(2, two), (Peer("ours on 1 thread", on(1, one), limits),))


CASES = (
    Case("observe/min_max", min_max),
    Case("observe/min_max module", min_max_module),
    Case("observe/min_max rows of 4096", functools.partial(rows, 4096)),
    Case("observe/min_max rows of 1152", functools.partial(rows, 1152)),
    Case("observe/min_max rows module", functools.partial(rows_module, 4096)),
    Case("observe/min_max 4096 innermost", innermost),
    Case("observe/histogram", histogram),
    Case("observe/histogram module", histogram_module),
    *(
        Case(f"observe/histogram of {name}", functools.partial(histogram_of, name))
        for name in distributions.DISTRIBUTIONS
    ),
    Case("observe/histogram bfloat16", histogram_bf16),
    Case("observe/histogram 2nd thread", second_thread, threads=(2,)),
)
