"""Fake-quant forward and backward, and the QAT step that observes the batch first."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import distributions
from case import MI, Case, Ceiling, Goals, Job, Peer, Run, expect, goals
from torch_ext import ops

ROW = 4096
QUANT_MIN, QUANT_MAX = -128, 127
GRID = f"[{QUANT_MIN},{QUANT_MAX}]"
SCALE = 0.02  # clips 1 % of Gaussian values

FORWARD = goals((MI, 1, 10, 20), (16 * MI, 1, 8, 16), (16 * MI, 2, 5, 10))
FORWARD_COMPOSED = goals((16 * MI, 1, 3, 4))
BACKWARD = goals((MI, 1, 1.7, 2.7), (16 * MI, 1, 1.7, 2.7), (16 * MI, 2, 1.7, 2.7))
FLOAT_FORWARD = goals((MI, 1, 0.7, 0.9), (16 * MI, 1, 0.85, 1.0))
LEARNED = goals((16 * MI, 1, 4, 8))
COPY = goals((16 * MI, 1, 0.85, 1.0), (16 * MI, 2, 0.85, 1.0))
COPY_BACKWARD = goals((16 * MI, 1, 0.85, 0.98), (16 * MI, 2, 0.85, 0.98))
STEP = goals((64 << 10, 1, 6, 12), (MI, 1, 8, 14), (16 * MI, 1, 7, 11), (16 * MI, 2, 4, 7))
STEP_CHANNELS = goals((16 * MI, 1, 10, 25))
COPY_CHANNELS = goals((16 * MI, 1, 0.70, 0.90))

FLOATS = {"float8_e4m3": (torch.float8_e4m3fn, 448), "float8_e5m2": (torch.float8_e5m2, 57344)}

Pair = Callable[[], tuple[Tensor, Tensor]]

native = torch.ops.torch_ext
aten = torch.ops.aten


class Setup:
    """One input with the qparams of both sides, per tensor or per row of 4096."""

    def __init__(self, size: int, per_channel: bool, dtype: torch.dtype = torch.float32) -> None:
        self.axis = 0 if per_channel else -1
        self.x = distributions.gauss(size).to(dtype)
        if per_channel:
            self.x = self.x.view(-1, ROW)
        channels = len(self.x) if per_channel else 1
        self.scale = torch.linspace(SCALE, 1.5 * SCALE, channels)
        self.zero_point = torch.zeros(channels, dtype=torch.int32)

    @property
    def grid(self) -> tuple[int, int]:
        return QUANT_MIN, QUANT_MAX

    def ours(self) -> Callable[[], Tensor]:
        arguments = (self.x, self.scale, self.zero_point, *self.grid, self.axis)
        return functools.partial(ops.fake_quant, *arguments)

    def ours_with_mask(self) -> Pair:
        arguments = (self.x, self.scale, self.zero_point, GRID, self.axis)
        return functools.partial(native._fake_quant_forward, *arguments)

    def torch_with_mask(self) -> Pair:
        if self.axis >= 0:
            arguments = (self.x, self.scale, self.zero_point, self.axis, *self.grid)
            return functools.partial(aten.fake_quantize_per_channel_affine_cachemask, *arguments)
        qparams = (self.scale.item(), 0)
        return functools.partial(
            aten.fake_quantize_per_tensor_affine_cachemask, self.x, *qparams, *self.grid
        )

    def torch(self) -> Peer:
        if self.axis >= 0:
            arguments = (self.x, self.scale, self.zero_point, self.axis, *self.grid)
            run = functools.partial(torch.fake_quantize_per_channel_affine, *arguments)
            return Peer("torch.fake_quantize_per_channel", run, FORWARD)
        qparams = (self.scale.item(), 0)
        call = functools.partial(
            torch.fake_quantize_per_tensor_affine, self.x, *qparams, *self.grid
        )
        return Peer("torch.fake_quantize_per_tensor", call, FORWARD)

    def composed(self) -> Peer:
        """Vectorised ops into reused memory; the scale's reciprocal and zero point per row."""
        out = torch.empty_like(self.x)
        shape = (-1, 1) if self.axis >= 0 else ()
        scale, zero = self.scale.view(shape), self.zero_point.float().view(shape)
        inverse = 1 / scale

        def run() -> Tensor:
            torch.mul(self.x, inverse, out=out)
            out.round_().add_(zero).clamp_(QUANT_MIN, QUANT_MAX).sub_(zero)
            return out.mul_(scale)

        return Peer("mul round add clamp sub mul", run, FORWARD_COMPOSED)


def _nearly_all_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Torch multiplies by 1/scale where we divide: ties may fall to the other side."""
    differs = (ours - theirs).abs() > 1e-6
    return int(differs.sum()) <= max(1, ours.numel() // 1000)


def forward(per_channel: bool, size: int) -> Job:
    s = Setup(size, per_channel)
    ours, theirs = s.ours(), s.torch()

    def check() -> None:
        expect(_nearly_all_equal(ours(), theirs.run()), "fake-quantized values")  # type: ignore[arg-type]

    return Job(ours, (theirs,), s.composed(), Ceiling("copy", s.x, COPY), check)


def forward_with_mask(per_channel: bool, size: int) -> Job:
    """What training needs: the values, and which of them were clipped (1 bit; torch: 1 byte)."""
    s = Setup(size, per_channel)
    peer = Peer("torch, cachemask op", s.torch_with_mask(), FORWARD)
    return Job(s.ours_with_mask(), (peer,), ceiling=Ceiling("copy", s.x, COPY))


def forward_float(name: str, size: int) -> Job:
    """On a float format. Peers: int8 by the same op, and Torch's division, clamp and cast."""
    s = Setup(size, per_channel=False)
    dtype, largest = FLOATS[name]
    ours = functools.partial(ops.fake_quant, s.x, s.scale, s.zero_point, grid=name)
    clamped, stored = torch.empty_like(s.x), torch.empty_like(s.x, dtype=dtype)

    def composed() -> Tensor:
        torch.div(s.x, s.scale, out=clamped)
        stored.copy_(clamped.clamp_(-largest, largest))
        return clamped.copy_(stored).mul_(s.scale)

    def check() -> None:
        expect(torch.equal(ours(), composed()), "fake-quantized values")

    peers = (Peer("int8 by the same op", s.ours(), FLOAT_FORWARD),)
    cast = Peer("div clamp cast cast mul", composed)
    return Job(ours, peers, cast, Ceiling("copy", s.x, COPY), check)


def forward_bf16(size: int) -> Job:
    s = Setup(size, per_channel=False, dtype=torch.bfloat16)
    peer = Peer("torch.fake_quantize_per_tensor", s.torch().run)
    return Job(s.ours(), (peer,), ceiling=Ceiling("copy", s.x))


def backward(per_channel: bool, size: int) -> Job:
    s = Setup(size, per_channel)
    gradient = distributions.gauss(size, seed=1).view_as(s.x)
    _, bits = s.ours_with_mask()()
    _, flags = s.torch_with_mask()()
    kind = "per_channel" if per_channel else "per_tensor"
    op = getattr(aten, f"fake_quantize_{kind}_affine_cachemask_backward")
    ours = functools.partial(native._fake_quant_backward, gradient, bits)
    theirs = functools.partial(op, gradient, flags)

    def check() -> None:
        expect(_nearly_all_equal(ours(), theirs()), "gradients")

    peer = Peer("torch, its backward op", theirs, BACKWARD)
    ceiling = Ceiling("copy", gradient, COPY_BACKWARD)
    return Job(ours, (peer,), ceiling=ceiling, check=check)


def _torch_step(x: Tensor, per_channel: bool, channels: int) -> tuple[Run, Tensor, Tensor]:
    on = torch.ones(1, dtype=torch.int64)
    low, high = torch.full((channels,), float("inf")), torch.full((channels,), float("-inf"))
    scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    run = functools.partial(
        torch.fused_moving_avg_obs_fake_quant,
        *(x, on, on, low, high, scale, zero_point, 0.01, QUANT_MIN, QUANT_MAX),
        *(0, per_channel, True),
    )
    return run, low, high


def step(per_channel: bool, size: int) -> Job:
    """A QAT forward: the range follows the batch, the batch is fake-quantized with it."""
    x = distributions.gauss(size)
    if per_channel:
        x = x.view(-1, ROW)
    channels, axis = (len(x), 0) if per_channel else (1, -1)
    bounds, scale = torch.zeros(channels, 2), torch.ones(channels)
    zero_point = torch.zeros(channels, dtype=torch.int32)
    solved = torch.zeros(1, dtype=torch.uint8)
    theirs, low, high = _torch_step(x, per_channel, channels)

    def ours() -> Tensor:
        follows = (bounds, scale, zero_point, solved, 0.01, "min_max", QUANT_MIN, QUANT_MAX)
        return ops.follow_fake_quant(x, *follows, True, ch_axis=axis)

    def check() -> None:
        ours()
        theirs()
        # Not the scales: for a symmetric grid Torch divides by 128 and 127, we by 127.5.
        expect(torch.allclose(bounds, torch.stack([low, high], 1)), "ranges")

    limits: Goals = STEP_CHANNELS if per_channel else STEP
    peer = Peer("torch.fused_moving_avg_obs_fq", theirs, limits)
    ceiling = Ceiling("copy", x, COPY_CHANNELS if per_channel else {})
    return Job(ours, (peer,), ceiling=ceiling, check=check)


def learned_backward(method: str, size: int) -> Job:
    """Gradients of x and of the learned parameter; torch has none for pact: lsq's is its peer."""
    s = Setup(size, per_channel=False)
    gradient = distributions.gauss(size, seed=1)
    zero_point = torch.zeros(1)
    theirs = functools.partial(
        aten._fake_quantize_learnable_per_tensor_affine_backward,
        *(gradient, s.x, s.scale, zero_point, *s.grid, 1.0),
    )
    parameter, own_zero_point = s.scale, s.zero_point
    if method == "pact":
        parameter, own_zero_point = s.scale * (QUANT_MAX - QUANT_MIN) / 2, None
    ours = functools.partial(
        native._learned_fake_quant_backward,
        *(gradient, s.x, method, parameter, own_zero_point, GRID, -1, False),
    )

    def check() -> None:
        dx, found, *_ = ours()
        # Torch's mask is taken after rounding: values within half a step of the ends differ.
        expect((dx != theirs()[0]).float().mean().item() < 0.01, "gradients of x")
        # Rounded as the forward does it, in float32; the rest in float64.
        code, v = s.x / s.scale, s.x.double() / s.scale.double()
        inside = (code > QUANT_MIN) & (code < QUANT_MAX)
        slope = torch.where(inside, code.round().double() - v, v.clamp(QUANT_MIN, QUANT_MAX))
        if method == "pact":
            reach = (QUANT_MAX - QUANT_MIN) / 2
            slope = (v >= reach).double() - (v <= -reach).double()
        want = (gradient.double() * slope).sum().float()
        expect(torch.allclose(found, want, rtol=1e-4), "gradient of the parameter")

    peer = Peer("torch learnable backward", theirs, LEARNED)
    return Job(ours, (peer,), ceiling=Ceiling("copy", gradient), check=check)


KINDS = (("", False), (" per channel", True))
CASES = (
    *(Case(f"fake_quant/forward{k}", functools.partial(forward, c)) for k, c in KINDS),
    *(
        Case(f"fake_quant/forward+mask{k}", functools.partial(forward_with_mask, c))
        for k, c in KINDS
    ),
    Case("fake_quant/forward bfloat16", forward_bf16),
    *(
        Case(f"fake_quant/forward {name}", functools.partial(forward_float, name))
        for name in FLOATS
    ),
    *(Case(f"fake_quant/backward{k}", functools.partial(backward, c)) for k, c in KINDS),
    *(
        Case(f"fake_quant/{method} backward", functools.partial(learned_backward, method))
        for method in ("lsq", "pact")
    ),
    *(Case(f"fake_quant/follow+forward{k}", functools.partial(step, c)) for k, c in KINDS),
)
