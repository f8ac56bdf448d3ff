"""Streams, devices, determinism, memory: what a GPU program can get wrong beside its numbers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from devices import assert_same_bits, free_memory, synchronize, to
from input_zoo import ZOO
from nets.exact_net import batch, ready_for, step, upstream
from op_samples import SAMPLES
from sample_data import sample
from statistic_tensors import State, empty_state, observed
from torch_ext import FakeQuantState, ops

NATIVE = torch.ops.torch_ext
RULES = torch_ext.observers()
HUGE = 2**31 + 5


def streams(device: torch.device, count: int) -> list[Any]:
    """Contexts that make a new stream the current one."""
    if device.type != "cuda":
        return [contextlib.nullcontext() for _ in range(count)]
    return [torch.cuda.stream(torch.cuda.Stream(device)) for _ in range(count)]


class Work:
    """One quantizer's statistic, range and output, fed batch after batch."""

    def __init__(self, where: torch.device | str, kind: str) -> None:
        self.batches = [(sample(kind, 200_003, s) * (s + 1)).to(where) for s in range(6)]
        self.state = empty_state().to(where)
        self.range, self.scale = torch.zeros(1, 2, device=where), torch.ones(1, device=where)
        self.zero_point = torch.zeros(1, dtype=torch.int32, device=where)
        self.solved = torch.zeros(1, dtype=torch.uint8, device=where)
        self.outputs: list[Tensor] = []

    def step(self, i: int) -> None:
        x, qparams = self.batches[i], (self.scale, self.zero_point)
        ops.observe_(x, *self.state)
        ops.follow_(x, self.range, *qparams, self.solved, 0.1, "mse", -128, 127, True)
        self.outputs.append(ops.fake_quant(x, *qparams, -128, 127))
        self.outputs.append(ops.solve("kl", *self.state, -128, 127, True))

    def results(self) -> list[Tensor]:
        return [*self.state, self.range, self.scale, self.zero_point, *self.outputs]


def test_two_streams_at_once(device: torch.device):
    """Also with the memory that one of them has just given back."""
    kinds = ("heavy", "relu")
    here = [Work("cpu", kind) for kind in kinds]
    there = [Work(device, kind) for kind in kinds]
    synchronize(device)
    contexts = streams(device, 2)
    for i in range(6):
        for work, context in zip(there, contexts, strict=True):
            with context:
                work.step(i)
    for work in here:
        for i in range(6):
            work.step(i)
    synchronize(device)
    for kind, have, want in zip(kinds, there, here, strict=True):
        assert_same_bits(have.results(), want.results(), kind)


def test_work_waits_for_what_its_stream_does_first(device: torch.device):
    """On another stream it would read the values from before."""
    x, later = torch.zeros(100_000, device=device), sample("gauss", 100_000).to(device)
    want = observed(later.cpu())
    state = empty_state().to(device)
    s, z = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    synchronize(device)
    with streams(device, 1)[0]:
        if device.type == "cuda":
            torch.cuda._sleep(50_000_000)
        x.copy_(later)
        ops.observe_(x, *state)
        solved = ops.solve("mse", *state, -128, 127, True)
        out = ops.fake_quant(x, s, z, -128, 127)
    synchronize(device)
    assert_same_bits(state, want)
    assert_same_bits(solved, ops.solve("mse", *want, -128, 127, True))
    assert_same_bits(out, ops.fake_quant(later.cpu(), s.cpu(), z.cpu(), -128, 127))


def test_another_device_than_the_current_one(device: torch.device):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    other = torch.device("cuda", 1) if device.type == "cuda" else device
    for op, makes in SAMPLES.items():
        for i, make in enumerate(makes):
            on_other, arguments = _moved(make(), other), make()
            have, want = getattr(NATIVE, op)(**on_other), getattr(NATIVE, op)(**arguments)
            assert_same_bits(have, want, op, i)
            assert_same_bits(_tensors(on_other), _tensors(arguments), op, i)
            if device.type == "cuda":
                assert torch.cuda.current_device() == device.index
    for state in FakeQuantState:
        here, there = ready_for(state, "mse", "cpu"), ready_for(state, "mse", other)
        train = state is FakeQuantState.QAT
        want = step(here, batch(1), upstream(1), train)
        assert_same_bits(step(there, batch(1).to(other), upstream(1).to(other), train), want)


def _moved(arguments: dict[str, Any], where: torch.device) -> dict[str, Any]:
    return {key: to(value, where) for key, value in arguments.items()}


def _tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if torch.is_tensor(v) or k in ("extrema", "tally")}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Besides, Torch fills new memory with NaN then: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.sanitizer
@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_every_op_with_deterministic_algorithms(op: str, device: torch.device):
    for i, make in enumerate(SAMPLES[op]):
        want_arguments, arguments = make(), _moved(make(), device)
        want = getattr(NATIVE, op)(**want_arguments)
        with deterministic():
            have = getattr(NATIVE, op)(**arguments)
        assert_same_bits(have, want, i)
        assert_same_bits(_tensors(arguments), _tensors(want_arguments), i)


@pytest.mark.parametrize("state", list(FakeQuantState), ids=lambda s: s.value)
@pytest.mark.parametrize("rule", RULES)
def test_training_with_deterministic_algorithms(
    rule: str, state: FakeQuantState, device: torch.device
):
    train = state is FakeQuantState.QAT
    here, there = ready_for(state, rule, "cpu"), ready_for(state, rule, device)
    x, given = batch(5).to(device), upstream(5).to(device)
    with deterministic():
        have = step(there, x, given, train)
    assert_same_bits(have, step(here, batch(5), upstream(5), train))
    assert_same_bits(there.state_dict(), here.state_dict())


def test_the_same_bits_every_time(device: torch.device):
    """Atomics on integers: whatever the blocks' order."""
    x = ZOO["spread"](1_000_003).to(device)
    rows = x[:1_000_000].reshape(1000, 1000)
    first, first_rows = observed(x), observed(rows, 1)
    for _ in range(20):
        assert_same_bits(observed(x), first)
        assert_same_bits(observed(rows, 1), first_rows)


def test_no_memory_is_kept(device: torch.device):
    if device.type != "cuda":
        pytest.skip("counts CUDA memory")
    work = Work(device, "gauss")
    for i in range(6):
        work.step(i)
    work.outputs.clear()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    for i in range(60):
        work.step(i % 6)
        work.outputs.clear()
    synchronize(device)
    assert torch.cuda.memory_allocated(device) == before


def test_want_of_memory_keeps_its_type(device: torch.device):
    """For scratch memory as for outputs; the device works on afterwards."""
    if device.type != "cuda":
        pytest.skip("limits CUDA memory")
    state = observed(sample("gauss", 2**17).reshape(512, -1).to(device), 0)
    want = ops.solve("mse", *state, -128, 127, True)
    synchronize(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total, device)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"solve: expected the work on cuda:"):
            ops.solve("mse", *state, -128, 127, True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert_same_bits(ops.solve("mse", *state, -128, 127, True), want)


def repeated(state: State, times: int) -> State:
    """Of the same values so many times over."""
    return state._replace(tally=state.tally * times, counts=state.counts * times)


def test_more_than_2_31_elements(device: torch.device):
    """Half precision; the same 2^16 values again and again, and five more."""
    numel = HUGE if device.type == "cuda" else 2**20 + 5
    if free_memory(device) < 8 * numel:
        pytest.skip(f"needs {8 * numel >> 30} GiB of memory")
    tile = (sample("heavy", 2**16) * 8).clamp(-6e4, 6e4).half()
    tile[:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    times, rest = divmod(numel, len(tile))
    x = torch.empty(numel, dtype=torch.float16, device=device)
    x[: times * len(tile)].view(times, -1).copy_(tile.to(device))
    x[times * len(tile) :] = tile[:rest].to(device)

    want = repeated(observed(tile), times)
    ops.merge_(*want, *observed(tile[:rest]))
    have = observed(x)
    assert int(have.tally[0, [0, 3, 4]].sum()) == numel
    assert_same_bits(have, want)
    rows = x[: times * len(tile)].view(times, -1)
    thin = observed(rows, 0, histogram=False)
    one = observed(tile, histogram=False)
    assert_same_bits(thin.tally, one.tally.expand(times, 5).contiguous())
    assert_same_bits(thin.extrema, one.extrema.expand(times, 2).contiguous())

    s, z = torch.tensor([0.25]), torch.tensor([3], dtype=torch.int32)
    forward, backward = NATIVE._fake_quant_forward, NATIVE._fake_quant_backward
    out, mask = forward(x, s.to(device), z.to(device), "[-128,127]")
    want_out, want_mask = forward(tile, s, z, "[-128,127]")
    _assert_repeats(out, want_out)
    _assert_repeats(mask, want_mask)
    del out
    grads = (torch.arange(len(tile)) % 2000 + 1).half()
    upstream_grad = x  # its values are no longer needed
    upstream_grad[: times * len(tile)].view(times, -1).copy_(grads.to(device))
    upstream_grad[times * len(tile) :] = grads[:rest].to(device)
    _assert_repeats(backward(upstream_grad, mask), backward(grads, want_mask))


def _assert_repeats(have: Tensor, tile: Tensor) -> None:
    """Whole tiles and what remains of one, compared on the device. Changes its arguments."""
    if tile.is_floating_point():
        for t in (have, tile):  # a number that does not occur stands for every NaN
            t.nan_to_num_(nan=777.0, posinf=torch.inf, neginf=-torch.inf)
    start = len(have) // len(tile) * len(tile)
    integers = {1: torch.uint8, 2: torch.int16}[have.element_size()]
    whole, one = have[:start].view(integers), tile.view(integers).to(have.device)
    assert torch.equal(whole.view(-1, len(tile)), one.expand(start // len(tile), -1))
    left, want = have[start:].cpu(), tile[: len(have) - start]
    if not tile.is_floating_point():  # packed bits, of five elements
        left, want = left & 0b11111, want & 0b11111
    assert torch.equal(left, want)
