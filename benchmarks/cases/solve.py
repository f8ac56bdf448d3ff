"""From data or statistics to ranges: rules end to end, KL searches, the solve of a whole model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import distributions
import native
import torch_ext
from case import KI, MI, Case, Ceiling, Goal, Goals, Job, Missing, Peer, expect, goals
from cases.observe import Statistic, ao_observer
from torch_ext import ops
from torch_ext.ops.registry import encode_options

PERCENTILE = 99.99
QUANTIZERS = 100
CHANNELS = 512
SAMPLES = MI  # values behind each linear histogram

PERCENTILE_GOALS = goals((16 * MI, 1, 12, 25))
PERCENTILE_READ = goals((16 * MI, 1, 0.3, 0.6))  # against NumPy 7 times is the most possible
MOMENTS = goals((16 * MI, 1, 12, 25))
MOMENTS_COMPOSED = goals((16 * MI, 1, 3.5, 5.7))
MOMENTS_READ = goals((16 * MI, 1, 0.70, 0.90))


def one_thread(must: float, reach: float) -> Goals:
    """Goals of a case with an input of its own."""
    return {(0, 1): Goal(must, reach)}


def percentile(size: int) -> Job:
    """Peers are handed |x|, which ours computes, and find the one rank exactly."""
    x = distributions.gauss(size)
    magnitude = x.abs()
    rank = math.ceil(size * PERCENTILE / 100)

    def ours() -> Tensor:
        return ops.percentile(x, percentile=PERCENTILE)

    def check() -> None:
        exact = magnitude.kthvalue(rank).values.item()
        expect(abs(ours()[0, 1].item() / exact - 1) < 2**-10, "percentile")

    array = magnitude.numpy()
    kthvalue = functools.partial(torch.kthvalue, magnitude, rank)
    peers = [Peer("torch.kthvalue", kthvalue, PERCENTILE_GOALS)]
    if torch.get_num_threads() == 1:  # NumPy has no more
        partition = functools.partial(np.partition, array, rank - 1)
        peers.append(Peer("numpy.partition", partition))
    return Job(ours, tuple(peers), ceiling=Ceiling("read", x, PERCENTILE_READ), check=check)


def clip_std(size: int) -> Job:
    x = distributions.gauss(size)
    centred = torch.empty_like(x)

    def ours() -> Tensor:
        return ops.clip_std(x, std_scale=3.0)

    def two_passes() -> tuple[Tensor, Tensor]:
        mean = x.mean()
        torch.sub(x, mean, out=centred)
        return mean, centred.square_().mean()

    def check() -> None:
        std, mean = torch.std_mean(x.double())
        found = ours()[0, 1].item()
        expect(abs(found / (mean + 3 * std).item() - 1) < 1e-3, "mean + 3 std")

    peer = Peer("torch.std_mean", functools.partial(torch.std_mean, x), MOMENTS)
    composed = Peer("mean, centred squares", two_passes, MOMENTS_COMPOSED)
    return Job(ours, (peer,), composed, Ceiling("read", x, MOMENTS_READ), check)


def _linear(bins: int, signed: bool) -> tuple[Tensor, Tensor]:
    """A histogram of heavy-tailed data, int64 [1, bins], and its bin width, float64 [1]."""
    x = distributions.laplace(SAMPLES)
    bound = x.abs().max().item()
    low = -bound if signed else 0.0
    counts = torch.histc(x if signed else x.abs(), bins, min=low, max=bound).long()
    return counts.view(1, -1), torch.tensor([(bound - low) / bins], dtype=torch.float64)


def kl(variant: str, bins: int, levels: int, limits: Goals, _: int) -> Job:
    counts, width = _linear(bins, signed=variant == "tvm")
    ours = functools.partial(ops.kl_threshold, counts, width, levels, variant)

    def check() -> None:
        exact = native.naive_kl(variant, counts[0], levels, "double")()
        index = ours()[0]
        expect(index.item() == exact, f"bins kept: {index.item()}, {exact}")

    naive = Peer("plain C++, float32", native.naive_kl(variant, counts[0], levels), limits)
    return Job(ours, (naive,), check=check)


def kl_onnxruntime(_: int) -> Job:
    try:
        from onnxruntime.quantization.calibrate import (  # type: ignore[import-untyped]
            HistogramCollector,
        )
    except ImportError as error:
        raise Missing("onnxruntime is not installed (pip install onnxruntime)") from error
    bins, levels = 2048, 128
    counts, width = _linear(bins, signed=True)
    bound = width.item() * bins / 2
    edges = np.linspace(-bound, bound, bins + 1, dtype=np.float32)
    histogram = (counts[0].numpy(), edges, np.float32(-bound), np.float32(bound))
    collector = HistogramCollector("entropy", True, bins, levels, PERCENTILE, "same")
    ours = functools.partial(ops.kl_threshold, counts, width, levels, "onnxruntime")
    theirs = functools.partial(collector.get_entropy_threshold, histogram, levels)

    def check() -> None:
        found, threshold = ours()[1].item(), float(theirs()[1])
        expect(math.isclose(found, threshold, rel_tol=1e-5), f"threshold {found}, {threshold}")

    peer = Peer("onnxruntime, Python", theirs, one_thread(200, 600))
    return Job(ours, (peer,), check=check)


def mse(_: int) -> Job:
    x = distributions.laplace(SAMPLES)
    statistic = Statistic(histogram=True)
    statistic.observing(x)()
    grid = (-128, 127, True)
    parts = (statistic.extrema, statistic.tally, statistic.counts)
    ours = functools.partial(ops.solve, "mse", *parts, *grid)
    theirs = ao_observer("HistogramObserver", dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    theirs(x)
    limits = one_thread(5, 10)
    return Job(ours, (Peer("ao HistogramObserver search", theirs.calculate_qparams, limits),))


@functools.cache
def _model() -> tuple[Statistic, ...]:
    """Statistics of 100 activations: normal, rectified and heavy-tailed, at several scales."""

    def values() -> Iterator[Tensor]:
        kinds = (distributions.gauss, distributions.relu, distributions.laplace)
        for i in range(QUANTIZERS):
            yield kinds[i % 3](64 * KI, seed=i).mul_(0.1 * 1.05**i)

    found = []
    for x in values():
        statistic = Statistic(histogram=True)
        statistic.observing(x)()
        found.append(statistic)
    return tuple(found)


@functools.cache
def _weight() -> Statistic:
    """A weight of 512 channels, of 4096 values each, at several scales."""
    statistic = Statistic(CHANNELS)
    statistic.counts = torch.zeros(CHANNELS, 2, 12, 1 << 7, dtype=torch.int64)
    x = distributions.gauss(CHANNELS * 4096).view(CHANNELS, 4096)
    scales = 0.1 + 3 * torch.rand(CHANNELS, 1, generator=torch.Generator().manual_seed(0))
    statistic.observing(x * scales, 0)()
    return statistic


def weight(rule: str, _: int) -> Job:
    """Time per channel."""
    s = _weight()
    ours = functools.partial(ops.solve, rule, s.extrema, s.tally, s.counts, -128, 127, True)
    return Job(ours, items=CHANNELS)


def whole_model(rule: str, variant: str | None, _: int) -> Job:
    """Ranges, scales and zero points of 100 quantizers by one call; time per quantizer."""
    statistics = _model()
    n = len(statistics)
    reads = torch_ext._C.observer_info(rule)["statistic"] == "histogram"
    empty = torch.zeros(1, 2, 0, 0, dtype=torch.int64)
    options = encode_options(rule, {"variant": variant} if variant else {})
    ours = functools.partial(
        ops.solve_many,
        [rule] * n,
        [s.extrema for s in statistics],
        [s.tally for s in statistics],
        [s.counts if reads else empty for s in statistics],
        [-128] * n,
        [127] * n,
        [True] * n,
        options=[options] * n,
    )
    return Job(ours, items=n)


def _whole_models() -> Iterator[Case]:
    for rule in torch_ext.observers():
        variants: tuple[str | None, ...] = (None,)
        if rule == "kl":
            variants = torch_ext._C.observer_info(rule)["options"][0]["choices"]
        for variant in variants:
            name = f"solve/{QUANTIZERS} quantizers {rule}" + (f" {variant}" if variant else "")
            yield Case(name, functools.partial(whole_model, rule, variant), sized=False)


_KL = (
    ("slides", 2048, 128, one_thread(15, 23)),
    ("ncnn", 2048, 128, one_thread(15, 23)),
    ("ncnn", 4096, 128, one_thread(30, 41)),
    ("tvm", 8001, 255, one_thread(30, 60)),
)

CASES = (
    Case("rule/percentile end to end", percentile),
    Case("rule/clip_std end to end", clip_std),
    *(
        Case(f"kl/{v} {b} bins {n} levels", functools.partial(kl, v, b, n, g), sized=False)
        for v, b, n, g in _KL
    ),
    Case("kl/onnxruntime 2048 bins 128 levels", kl_onnxruntime, sized=False, threads=(1,)),
    Case("solve/mse of one quantizer", mse, sized=False),
    *(
        Case(f"solve/{CHANNELS} channels {rule}", functools.partial(weight, rule), sized=False)
        for rule in ("percentile", "kl", "mse", "aciq", "mix")
    ),
    *_whole_models(),
)
