"""The GPU's cases of solving: whole models and KL searches in one call, against the own CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distributions
import torch_ext
from case import KI, NONE, Case, Goal, Goals, Job, Missing, Peer, Run, expect
from gpu.cases import QUANT_MAX, QUANT_MIN
from gpu.inputs import Statistic
from torch_ext import ops

QUANTIZERS = 100
CPU_THREADS = 2
BINS, LEVELS = 2048, 128
PERCENTILE = 99.99

# Of cases with an input of their own.
OWN_CPU: Goals = {(0, 0): Goal(20, 100)}
ONNXRUNTIME: Goals = {(0, 0): Goal(5000, 50000)}


def activations(device: torch.device, count: int) -> list[Tensor]:
    """Normal, rectified and heavy-tailed ones at several scales; on the CPU first, so that any
    device solves the same."""
    kinds = (distributions.gauss, distributions.relu, distributions.laplace)
    made = [kinds[i % 3](64 * KI, seed=i).mul_(0.1 * 1.05**i) for i in range(count)]
    return [x.to(device) for x in made]


def on_two_threads(run: Run) -> Run:
    def call() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(CPU_THREADS)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return call


def whole_model(rule: str, limits: Goals, device: torch.device, _: int) -> Job:
    """Ranges, scales and zero points of 100 quantizers by one call; time per quantizer."""

    def solving(where: torch.device) -> Callable[[], Any]:
        statistics = []
        for x in activations(where, QUANTIZERS):
            statistic = Statistic(where, histogram=True)
            statistic.observing(x)()
            statistics.append(statistic)
        return functools.partial(
            ops.solve_many,
            [rule] * QUANTIZERS,
            [s.extrema for s in statistics],
            [s.tally for s in statistics],
            [s.counts for s in statistics],
            [QUANT_MIN] * QUANTIZERS,
            [QUANT_MAX] * QUANTIZERS,
            [True] * QUANTIZERS,
        )

    ours, theirs = solving(device), solving(torch.device("cpu"))

    def check() -> None:
        ranges, want = ours()[0], theirs()[0]
        same = all(torch.equal(r.cpu(), w) for r, w in zip(ranges, want, strict=True))
        expect(same, "ranges, bit for bit")

    peer = Peer(f"ours on the CPU, {CPU_THREADS} threads", on_two_threads(theirs), limits)
    return Job(ours, (peer,), check=check, items=QUANTIZERS)


def linear_histograms(device: torch.device) -> tuple[Tensor, Tensor]:
    """Signed histograms of 100 activations and their bin widths."""
    counts, widths = [], []
    for x in activations(torch.device("cpu"), QUANTIZERS):
        bound = x.abs().max().item()
        counts.append(torch.histc(x, BINS, min=-bound, max=bound).long())
        widths.append(2 * bound / BINS)
    return torch.stack(counts).to(device), torch.tensor(widths, dtype=torch.float64, device=device)


def onnxruntime_search(counts: Tensor, width: float) -> Run:
    try:
        from onnxruntime.quantization.calibrate import (  # type: ignore[import-untyped]
            HistogramCollector,
        )
    except ImportError as error:
        raise Missing("onnxruntime is not installed") from error
    bound = width * BINS / 2
    edges = np.linspace(-bound, bound, BINS + 1, dtype=np.float32)
    histogram = (counts.cpu().numpy(), edges, np.float32(-bound), np.float32(bound))
    collector = HistogramCollector("entropy", True, BINS, LEVELS, PERCENTILE, "same")
    run: Run = functools.partial(collector.get_entropy_threshold, histogram, LEVELS)
    return run


def kl(variant: str, device: torch.device, _: int) -> Job:
    """100 searches of linear histograms by one call. ONNX Runtime does one of them."""
    counts, widths = linear_histograms(device)
    here = (counts.cpu(), widths.cpu())
    ours = functools.partial(ops.kl_threshold, counts, widths, LEVELS, variant)
    theirs = functools.partial(ops.kl_threshold, *here, LEVELS, variant)
    own = Peer(f"ours on the CPU, {CPU_THREADS} threads", on_two_threads(theirs), OWN_CPU)
    peers = [own]
    if variant == "onnxruntime":
        search = onnxruntime_search(counts[0], widths[0].item())
        peers.append(Peer("onnxruntime, Python", search, ONNXRUNTIME, items=1))

    def check() -> None:
        for mine, want in zip(ours(), theirs(), strict=True):
            expect(torch.equal(mine.cpu(), want), "bins kept and thresholds, bit for bit")

    return Job(ours, tuple(peers), check=check, items=QUANTIZERS)


def cases(device: torch.device) -> list[Case]:
    found = []
    for rule in torch_ext.observers():
        if torch_ext._C.observer_info(rule)["statistic"] != "histogram":
            continue
        limits = OWN_CPU if rule == "kl" else NONE
        build = functools.partial(whole_model, rule, limits, device)
        found.append(Case(f"solve/{QUANTIZERS} quantizers {rule}", build, sized=False))
    for variant in ("slides", "onnxruntime"):
        name = f"kl/{variant} {BINS} bins {LEVELS} levels"
        found.append(Case(name, functools.partial(kl, variant, device), sized=False))
    return found
