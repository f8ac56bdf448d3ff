"""No size may be slow: observing at many sizes, each beside Torch and beside the size before it.

Times are per value. The peer "ours on N" does the same with the size before: its ratio is what a
value costs there over what it costs here, and below 1/1.5 it is a step upwards that is not met.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import distributions
from case import Case, Ceiling, Goals, Job, Peer, Run, expect, goals
from cases.observe import PEER_BINS, Statistic

KI, MI = 1 << 10, 1 << 20
NO_STEP: Goals = goals((0, 1, 1 / 1.5, 1 / 1.25))
NO_LOSS: Goals = goals((0, 1, 1, 2))

# Powers of two, and the sizes at which observing changes its way.
LIMITS = (1 * KI, 16 * KI, 64 * KI, 256 * KI)
SIZES = sorted(
    {1 << p for p in range(10, 25)} | {n - 1 for n in LIMITS[1:]} | {n + 1 for n in LIMITS}
)
HALF_SIZES = (16 * KI, 64 * KI - 1, 64 * KI, 256 * KI - 1, 256 * KI, MI)
LENGTHS = (1, 2, 3, 4, 7, 8, 9, 12, 16, 17, 24, 32, 33, 48, 49, 64, 65, 100, 128, 256, 1024, 1025)
LENGTHS += (4095, 4096, 4097)
WEIGHTS = ((32, 9), (512, 9), (128, 25), (64, 147), (256, 1152))
CHANNELS = (1, 2, 3, 4, 8, 15, 16, 17, 32, 64, 100, 128, 129, 255, 256, 257, 1024, 1025, 4096)


def _extrema(statistic: Statistic, run: Run, low_high: Callable[[], tuple[Tensor, Tensor]]) -> Run:
    def check() -> None:
        run()
        want = torch.stack(low_high(), -1).view(-1, 2)
        expect(torch.equal(statistic.extrema, want.float()), "extrema")

    return check


class MinMax:
    """Per tensor."""

    dtype = torch.float32

    def __init__(self, size: int) -> None:
        self.values = size
        x, statistic = distributions.gauss(size).to(self.dtype), Statistic()
        self.ceiling = Ceiling("read", x)
        self.ours = statistic.observing(x)
        self.peer = Peer("torch.aminmax", functools.partial(torch.aminmax, x))
        self.check = _extrema(statistic, self.ours, functools.partial(torch.aminmax, x))


class MinMaxBfloat16(MinMax):
    dtype = torch.bfloat16


class Histogram:
    """Per tensor, beside a histogram that is given the range."""

    dtype = torch.float32

    def __init__(self, size: int) -> None:
        self.values = size
        x, statistic = distributions.gauss(size), Statistic(histogram=True)
        low, high = (bound.item() for bound in torch.aminmax(x))
        histc = functools.partial(torch.histc, x, PEER_BINS, min=low, max=high)
        own = x.to(self.dtype)
        self.ours, self.ceiling = statistic.observing(own), Ceiling("read", own)
        self.peer = Peer("torch.histc of float32", histc)

        def check() -> None:
            before = int(statistic.tally[0, 0])
            self.ours()
            expect(int(statistic.tally[0, 0]) - before == size == int(histc().sum()), "values")

        self.check = check


class HistogramBfloat16(Histogram):
    dtype = torch.bfloat16


class HistogramFloat16(Histogram):
    dtype = torch.float16


class _Channels:
    """Values in channels along ``ch_axis``, 1 Mi in all where none are given."""

    ch_axis: int
    ceiling = None

    def __init__(self, inner: int, x: Tensor | None = None) -> None:
        if x is None:
            x = distributions.gauss(MI // inner * inner).view(-1, inner)
        self.values = x.numel()
        statistic = Statistic(x.shape[self.ch_axis])
        self.ours = statistic.observing(x, self.ch_axis)
        aminmax = functools.partial(torch.aminmax, x, dim=1 - self.ch_axis)
        self.peer = Peer(f"torch.aminmax(dim={1 - self.ch_axis})", aminmax)
        self.check = _extrema(statistic, self.ours, aminmax)


class Rows(_Channels):
    ch_axis = 0


class Adjacent(_Channels):
    ch_axis = 1


Kind = Callable[[int], MinMax | Histogram | _Channels]


def _weight(channels: int, inner: int, _: int) -> Job:
    """A layer's weight is small, so what a call costs counts."""
    weight = Rows(inner, distributions.gauss(channels * inner).view(channels, inner))
    peer = Peer(weight.peer.name, weight.peer.run, NO_LOSS)
    return Job(weight.ours, (peer,), check=weight.check)


def _job(kind: Kind, size: int, before: int | None, _: int) -> Job:
    here = kind(size)
    peers = [Peer(here.peer.name, here.peer.run, items=here.values)]
    if before is not None:
        smaller = kind(before)
        peers.append(Peer(f"ours on {before}", smaller.ours, NO_STEP, items=smaller.values))
    return Job(here.ours, tuple(peers), ceiling=here.ceiling, check=here.check, items=here.values)


def _cases(what: str, kind: Kind, sizes: Sequence[int]) -> Iterator[Case]:
    before: Iterable[int | None] = (None, *sizes)
    for size, previous in zip(sizes, before, strict=False):
        build = functools.partial(_job, kind, size, previous)
        yield Case(f"sizes/{what} {size}", build, sized=False, threads=(1,))


CASES = (
    *_cases("min_max of", MinMax, SIZES),
    *_cases("histogram of", Histogram, SIZES),
    *_cases("histogram bfloat16 of", HistogramBfloat16, HALF_SIZES),
    *_cases("histogram float16 of", HistogramFloat16, HALF_SIZES),
    *_cases("min_max bfloat16 of", MinMaxBfloat16, HALF_SIZES),
    *_cases("min_max rows of", Rows, LENGTHS),
    *_cases("min_max innermost", Adjacent, CHANNELS),
    *(
        Case(
            f"sizes/min_max weight {channels}x{inner}",
            functools.partial(_weight, channels, inner),
            sized=False,
            threads=(1,),
        )
        for channels, inner in WEIGHTS
    ),
)
