"""The GPU's cases: observing and fake-quantizing, with their peers, ceilings and goals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import distributions
import torch_ext
from case import MI, NONE, Case, Goals, Job, Missing, Peer, Run, expect, goals
from cases.observe import PEER_BINS, ao_observer
from gpu import native as gpu_native
from gpu.inputs import Statistic, inputs

SIZES = "64Ki,1Mi,64Mi,256Mi"
LARGEST = 256 * MI
SMALL, MIDDLE, LARGE = MI, 64 * MI, LARGEST
ROW = 4096
ROUNDED_OUT = 16  # values at the upper end that a bin's index in float32 may lose
QUANT_MIN, QUANT_MAX = -128, 127
GRID = f"[{QUANT_MIN},{QUANT_MAX}] symmetric"
SCALE = 0.02  # clips 1 % of Gaussian values
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16"}

native = torch.ops.torch_ext
aten = torch.ops.aten


def on_gpu(*rows: tuple[int, float, float]) -> Goals:
    """Rows of elements, must, reach."""
    return goals(*((size, 0, must, reach) for size, must, reach in rows))


MIN_MAX = {F32: on_gpu((LARGE, 1.0, 1.2)), F16: on_gpu((LARGE, 1.1, 1.5))}
MIN_MAX[BF16] = MIN_MAX[F16]
MIN_MAX_READ = on_gpu((LARGE, 0.90, 0.97))
HISTC, CUB = on_gpu((LARGE, 5, 10)), on_gpu((LARGE, 1.5, 2.5))
HISTOGRAM_READ = on_gpu((LARGE, 0.35, 0.65))
HISTOGRAM_STEP = on_gpu((SMALL, 10, 30), (MIDDLE, 5, 10))
FORWARD = {F32: on_gpu((LARGE, 1.05, 1.12)), F16: on_gpu((LARGE, 1.15, 1.3))}
FORWARD[BF16] = FORWARD[F16]
COPY = on_gpu((LARGE, 0.92, 0.97))
STEP = on_gpu((SMALL, 2, 4), (LARGE, 1.1, 1.35))
STEP_CHANNELS = on_gpu((LARGE, 1.6, 2.5))


def min_max(device: torch.device, dtype: torch.dtype, size: int) -> Job:
    given, statistic = inputs(device, size, dtype), Statistic(device)
    ours = given.calls(statistic.observing)
    aminmax = given.calls(lambda x: functools.partial(torch.aminmax, x))

    def check() -> None:
        for x in given.each:
            statistic.observing(x)()
        low, high = torch.aminmax(given.all)
        expect(statistic.extrema.tolist() == [[low.item(), high.item()]], "extrema")

    peer = Peer("torch.aminmax", aminmax, MIN_MAX[dtype])
    return Job(ours, (peer,), ceiling=given.ceiling("read", MIN_MAX_READ), check=check)


def rows(device: torch.device, size: int) -> Job:
    given = inputs(device, size)
    statistic = Statistic(device, size // ROW)
    ours = given.calls(lambda x: statistic.observing(x.view(-1, ROW), 0))
    theirs = given.calls(lambda x: functools.partial(torch.aminmax, x.view(-1, ROW), dim=1))
    return Job(ours, (Peer("torch.aminmax(dim=1)", theirs),), ceiling=given.ceiling("read"))


def histogram(device: torch.device, dtype: torch.dtype, kind: str, size: int) -> Job:
    given, statistic = inputs(device, size, dtype, kind), Statistic(device, histogram=True)
    low, high = (bound.item() for bound in torch.aminmax(given.all.float()))
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    judged = kind in ("gauss", "relu") and dtype is F32
    peers = []
    if dtype is F32:  # Torch counts no other type on a CUDA device
        histc = functools.partial(torch.histc, bins=PEER_BINS, min=low, max=high)
        run = given.calls(lambda x: functools.partial(histc, x))
        peers.append(Peer("torch.histc, range given", run, HISTC if judged else NONE))
    cub = gpu_native.cub_histogram(given.each, PEER_BINS, low, high)
    peers.append(Peer("CUB HistogramEven, range given", cub, CUB if judged else NONE))

    def check() -> None:
        before = int(statistic.tally[0, 0])
        statistic.observing(given.first)()
        expect(int(statistic.tally[0, 0]) - before == size, "values counted")
        binned = int(statistic.counts.sum() + statistic.tally[0, 1:3].sum())
        expect(binned == int(statistic.tally[0, 0]), "values in bins")
        at_the_end = int((given.first.float() >= high).sum())  # CUB leaves the upper end out
        by_cub = int(cub().sum())
        expect(size - at_the_end - ROUNDED_OUT <= by_cub <= size, "values counted by CUB")

    ceiling = given.ceiling("read", HISTOGRAM_READ if judged else NONE)
    return Job(given.calls(statistic.observing), tuple(peers), ceiling=ceiling, check=check)


def histogram_module(device: torch.device, size: int) -> Job:
    """An observer's step, Python included. Torch's waits for the device several times."""
    given = inputs(device, size)
    ours = torch_ext.Observer("percentile").to(device)
    theirs = ao_observer("HistogramObserver").to(device)
    if size > MIDDLE:
        raise Missing("torch.ao's HistogramObserver takes too much memory at this size")
    peer = Peer(
        "ao HistogramObserver",
        given.calls(lambda x: functools.partial(theirs, x)),
        HISTOGRAM_STEP,
    )
    run = given.calls(lambda x: functools.partial(ours, x))
    return Job(run, (peer,), ceiling=given.ceiling("read"))


class Setup:
    """Inputs with the qparams of both sides, per tensor or per row of 4096."""

    def __init__(
        self, device: torch.device, size: int, dtype: torch.dtype, per_channel: bool = False
    ) -> None:
        self.given = inputs(device, size, dtype)
        self.axis = 0 if per_channel else -1
        channels = size // ROW if per_channel else 1
        self.scale = torch.linspace(SCALE, 1.5 * SCALE, channels, device=device)
        self.zero_point = torch.zeros(channels, dtype=torch.int32, device=device)

    def shaped(self, x: Tensor) -> Tensor:
        return x.view(-1, ROW) if self.axis >= 0 else x

    def ours(self, x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        arguments = (self.shaped(x), self.scale, self.zero_point, GRID, self.axis)
        return functools.partial(native._fake_quant_forward, *arguments)

    def torch(self, x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        if self.axis >= 0:
            op = aten.fake_quantize_per_channel_affine_cachemask
            qparams: tuple[Any, ...] = (self.scale, self.zero_point, self.axis)
        else:
            op = aten.fake_quantize_per_tensor_affine_cachemask
            qparams = (SCALE, 0)
        return functools.partial(op, self.shaped(x), *qparams, QUANT_MIN, QUANT_MAX)


def _works(run: Run) -> bool:
    """Whether Torch has this op for the type: then it is a peer."""
    try:
        run()
    except RuntimeError:
        return False
    return True


def _nearly_all_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Torch multiplies by 1/scale where we divide: ties may fall to the other side."""
    differs = (ours - theirs).abs() > 1e-6
    return int(differs.sum()) <= max(1, ours.numel() // 500)


def forward(device: torch.device, dtype: torch.dtype, per_channel: bool, size: int) -> Job:
    """What training runs: the values, and which were clipped (1 bit each; torch: 1 byte)."""
    s = Setup(device, size, dtype, per_channel)
    ours, theirs = s.given.calls(s.ours), s.given.calls(s.torch)
    has_peer = _works(theirs)

    def check() -> None:
        if not has_peer:
            return
        mine, other = s.ours(s.given.first)(), s.torch(s.given.first)()
        expect(_nearly_all_equal(mine[0].float(), other[0].float()), "fake-quantized values")
        expect(mine[1].nbytes * 8 == other[1].nbytes, "the mask's bytes, eight times fewer")

    peer = Peer("torch, cachemask op", theirs, NONE if per_channel else FORWARD[dtype])
    ceiling = s.given.ceiling("copy", NONE if per_channel else COPY)
    return Job(ours, (peer,) if has_peer else (), ceiling=ceiling, check=check)


def backward(device: torch.device, dtype: torch.dtype, size: int) -> Job:
    s = Setup(device, size, dtype)
    _, bits = s.ours(s.given.first)()
    flags = s.given.first.abs() <= SCALE * QUANT_MAX  # one byte each, as Torch keeps them
    op = aten.fake_quantize_per_tensor_affine_cachemask_backward
    ours = s.given.calls(lambda x: functools.partial(native._fake_quant_backward, x, bits))
    theirs = s.given.calls(lambda x: functools.partial(op, x, flags))
    has_peer = _works(theirs)

    def check() -> None:
        if not has_peer:
            return
        mine = native._fake_quant_backward(s.given.first, bits)
        expect(_nearly_all_equal(mine.float(), op(s.given.first, flags).float()), "gradients")

    peers = (Peer("torch, its backward op", theirs),) if has_peer else ()
    return Job(ours, peers, ceiling=s.given.ceiling("copy"), check=check)


def step(device: torch.device, per_channel: bool, size: int) -> Job:
    """A QAT forward: the range follows the batch, the batch is fake-quantized with it."""
    s = Setup(device, size, F32, per_channel)
    channels = len(s.scale)
    bounds = torch.zeros(channels, 2, device=device)
    solved = torch.zeros(1, dtype=torch.uint8, device=device)
    on = torch.ones(1, dtype=torch.int64, device=device)
    low = torch.full((channels,), float("inf"), device=device)
    high, scale, zero_point = -low, s.scale.clone(), s.zero_point.clone()

    def ours(x: Tensor) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            follows = (bounds, s.scale, s.zero_point, solved, 0.01, "min_max")
            return native._follow_fake_quant_forward(  # type: ignore[no-any-return]
                x, *follows, GRID, ch_axis=s.axis
            )

        return run

    def theirs(x: Tensor) -> Run:
        return functools.partial(
            aten._fused_moving_avg_obs_fq_helper,
            *(x, on, on, low, high, scale, zero_point, 0.01, QUANT_MIN, QUANT_MAX),
            *(0, per_channel, True),
        )

    def check() -> None:
        x = s.shaped(s.given.first)
        ours(x)()
        theirs(x)()
        # Not the scales: for a symmetric grid Torch divides by 128 and 127, we by 127.5.
        expect(torch.allclose(bounds, torch.stack([low, high], 1)), "ranges")

    peer = Peer(
        "torch.fused_moving_avg_obs_fq",
        s.given.calls(lambda x: theirs(s.shaped(x))),
        STEP_CHANNELS if per_channel else STEP,
    )
    run = s.given.calls(lambda x: ours(s.shaped(x)))
    # Per tensor x is read twice, unless it fits the cache; a row is read once.
    return Job(
        run, (peer,), ceiling=s.given.ceiling("copy" if per_channel else "2r1w"), check=check
    )


def cases(device: torch.device) -> list[Case]:
    def case(name: str, function: Callable[..., Job], *arguments: object) -> Case:
        return Case(name, functools.partial(function, device, *arguments))

    others = [kind for kind in distributions.DISTRIBUTIONS if kind != "relu"]
    return [
        *(case(f"observe/min_max {NAMES[d]}", min_max, d) for d in NAMES),
        case("observe/min_max rows of 4096", rows),
        *(case(f"observe/histogram {NAMES[d]} gauss", histogram, d, "gauss") for d in NAMES),
        *(case(f"observe/histogram {NAMES[d]} relu", histogram, d, "relu") for d in (F32, F16)),
        *(case(f"observe/histogram float32 {kind}", histogram, F32, kind) for kind in others),
        case("observe/histogram module", histogram_module),
        *(case(f"fake_quant/forward+mask {NAMES[d]}", forward, d, False) for d in NAMES),
        case("fake_quant/forward+mask per channel", forward, F32, True),
        *(case(f"fake_quant/backward {NAMES[d]}", backward, d) for d in NAMES),
        case("fake_quant/follow+forward", step, False),
        case("fake_quant/follow+forward per channel", step, True),
    ]
