"""torch.set_flush_denormal() and the number of threads change no bit of any result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from op_samples import statistic
from torch_ext import ops

COUNT = 1 << 20  # two threads share it


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def around_the_least_normal(count: int, dtype: torch.dtype) -> Tensor:
    """Subnormal float32 values of both signs, and the first normal ones."""
    codes = (torch.arange(count) * 48_271 % 2001 - 1000).double()
    return (codes * 2.0**-135).to(dtype)


# All are made here, before the mode is set, which changes torch's own arithmetic too.
VALUES = around_the_least_normal(COUNT, torch.float32)
WIDE, UPSTREAM = VALUES.double(), VALUES * 2.0**20
BRAIN, HALF = VALUES.bfloat16(), (VALUES.double() * 2.0**111).half()  # subnormal in each
SCALE, LEAST_SCALE = torch.tensor([2.0**-133]), torch.tensor([2.0**-126])
ZERO = torch.zeros(1, dtype=torch.int32)


def observed(x: Tensor, ch_axis: int, **layout: bool) -> list[Tensor]:
    state = statistic(torch.zeros(0, 4), ch_axis, **layout)
    ops.observe_(x.reshape(-1, 4), *state.values(), ch_axis)
    range_ = ops.solve("min_max", *state.values(), -128, 127, False)
    return [*state.values(), range_, *ops.qparams(range_, -128, 127, False)]


def quantized() -> list[Tensor]:
    x = VALUES.clone().requires_grad_()
    out = ops.fake_quant(x, SCALE, ZERO, -128, 127)
    return [out.detach(), *torch.autograd.grad(out, x, VALUES)]


def learned() -> list[Tensor]:
    inputs = [VALUES.clone().requires_grad_(), LEAST_SCALE.clone().requires_grad_()]
    out = ops.lsq(*inputs, ZERO, -4, 3)
    return [out.detach(), *torch.autograd.grad(out, inputs, UPSTREAM)]


@pytest.mark.parametrize(
    "compute",
    [
        lambda: observed(VALUES, -1),
        lambda: observed(WIDE, -1),
        lambda: observed(WIDE, 1),
        lambda: observed(BRAIN, -1),
        lambda: observed(BRAIN, 1),
        lambda: observed(HALF, -1),
        lambda: observed(HALF, 1),
        lambda: observed(BRAIN, -1, histogram=False),
        lambda: observed(HALF, -1, histogram=False),
        quantized,
        learned,
    ],
    ids=[
        *(
            "observe_f32",
            "observe_f64",
            "observe_channels",
            "observe_bf16",
            "observe_bf16_channels",
        ),
        *("observe_f16", "observe_f16_channels", "extrema_bf16", "extrema_f16"),
        *("fake_quant", "lsq"),
    ],
)
def test_the_bits_do_not_depend_on_the_denormal_mode(compute: Callable[[], list[Tensor]]):
    want = [t.view(torch.int32) for t in compute()]
    assert any((t != 0).any() for t in want)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        have = [t.view(torch.int32) for t in compute()]
        assert all(map(torch.equal, have, want)), threads


def test_a_value_below_float32s_normals_is_no_zero():
    """1e-40 in float64, 2^20 times: on every thread the same number of zeros, none."""
    x = torch.full((COUNT,), 1e-40, dtype=torch.float64)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            state = statistic(torch.zeros(0), -1)
            ops.observe_(x, *state.values())
            assert state["tally"].tolist() == [[COUNT, 0, COUNT, 0, 0]], (flush, threads)


def test_the_mode_of_the_caller_stays_what_it_was():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    quantized()
    assert (LEAST_SCALE * 0.5).item() == 0
