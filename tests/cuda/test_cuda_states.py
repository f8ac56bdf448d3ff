"""A model in each state: the CPU's bits, no wait for the device, graphs, and few launches."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from devices import assert_same_bits, captured, launches, no_sync, synchronize, warmed_up
from nets.exact_net import RULES, batch, ready_for, step, upstream
from sample_data import DTYPES, sample
from statistic_tensors import empty_state
from torch_ext import FakeQuantState, ops

STATES = list(FakeQuantState)
by_state = pytest.mark.parametrize("state", STATES, ids=lambda s: s.value)
by_rule = pytest.mark.parametrize("rule", RULES)


def on(device: torch.device | str, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(batch(seed).to(device), upstream(seed).to(device)) for seed in range(10, 10 + count)]


def trained(state: FakeQuantState) -> bool:
    return state is FakeQuantState.QAT


@by_state
@by_rule
def test_steps_without_a_wait_give_the_cpus_bits(
    rule: str, state: FakeQuantState, device: torch.device
):
    here, there = ready_for(state, rule, "cpu"), ready_for(state, rule, device)
    assert_same_bits(there.state_dict(), here.state_dict(), "before")
    data = on(device, 4)
    with no_sync(device):
        have = [step(there, x, given, trained(state)) for x, given in data]
    want = [step(here, x, given, trained(state)) for x, given in on("cpu", 4)]
    assert_same_bits(have, want)
    assert_same_bits(there.state_dict(), here.state_dict(), "after")


def test_the_nets_numbers_do_not_depend_on_the_order_of_summation():
    """Otherwise two devices could rightly differ."""
    for state in STATES:
        one, other = ready_for(state, "mse", "cpu"), ready_for(state, "mse", "cpu")
        order = torch.randperm(24)
        for x, given in on("cpu", 6):
            want = step(one, x, given, trained(state))
            have = step(other, x[order], given[order], trained(state))
            assert_same_bits(have[0], want[0][order], state)
            assert_same_bits(have[1:], want[1:], state)
        assert_same_bits(other.state_dict(), one.state_dict())


def test_a_wait_is_seen(device: torch.device):
    """The test above would fail for one."""
    x = torch.ones(3, device=device)
    for read in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises(RuntimeError), no_sync(device):
            read()


@by_state
@by_rule
def test_graph_replay_equals_eager(rule: str, state: FakeQuantState, device: torch.device):
    """After N replays with new data each, outputs, gradients, statistics and ranges agree."""
    eager, model = ready_for(state, rule, device), ready_for(state, rule, device)
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    data = on(device, 5)
    x, given = data[0][0].clone(), data[0][1].clone()
    run = functools.partial(step, model, x, given, trained(state))
    warmed_up(device, run)
    model.load_state_dict(initial)
    replay: Any = captured(device, run)
    assert_same_bits(model.state_dict(), initial, "capturing runs nothing")
    for i, (values, upstream_values) in enumerate(data):
        x.copy_(values)
        given.copy_(upstream_values)
        have = replay()
        want = step(eager, values, upstream_values, trained(state))
        synchronize(device)
        assert_same_bits(have, want, i)
    assert_same_bits(model.state_dict(), eager.state_dict())
    changed = any(not torch.equal(v, initial[k]) for k, v in model.state_dict().items())
    observes = state is FakeQuantState.CALIBRATION and rule != "fixed_scale"
    assert changed == (observes or state is FakeQuantState.QAT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_rule
def test_ops_in_a_graph(rule: str, dtype: torch.dtype, device: torch.device):
    """Observing, merging, solving, following and fake-quantizing in one capture, per channel."""
    batches = [(sample("heavy", 6 * 500, seed) * (seed + 1)).reshape(6, 500) for seed in range(4)]

    class Run:
        def __init__(self) -> None:
            self.x = batches[0].to(dtype).to(device)
            layout: dict[str, int] = {"channels": 6, "mantissa_bits": 7, "octaves": 12}
            self.state, self.total = (empty_state(**layout).to(device) for _ in range(2))
            self.range = torch.zeros(6, 2, device=device)
            self.scale = torch.ones(6, device=device)
            self.zero_point = torch.zeros(6, dtype=torch.int32, device=device)
            self.solved = torch.zeros(1, dtype=torch.uint8, device=device)
            self.tensors = [*self.state, *self.total, self.range, self.scale, self.zero_point]
            self.tensors.append(self.solved)

        def __call__(self) -> list[Tensor]:
            qparams = (self.scale, self.zero_point)
            ops.observe_(self.x, *self.state, 0)
            ops.merge_(*self.total, *self.state)
            ops.follow_(
                self.x, self.range, *qparams, self.solved, 0.1, rule, -128, 127, True, ch_axis=0
            )
            found = ops.solve(rule, *self.total, -128, 127, True)
            alone = getattr(ops, rule)(self.x, ch_axis=0)
            out = ops.fake_quant(self.x, *qparams, -128, 127, 0)
            return [found, *ops.qparams(found, -128, 127, True), alone, out]

    eager, graphed = Run(), Run()
    initial = [t.clone() for t in graphed.tensors]
    warmed_up(device, graphed)
    for tensor, value in zip(graphed.tensors, initial, strict=True):
        tensor.copy_(value)
    replay: Any = captured(device, graphed)
    for i, values in enumerate(batches):
        eager.x.copy_(values)
        graphed.x.copy_(values)
        have, want = replay(), eager()
        synchronize(device)
        assert_same_bits(have, want, i)
        assert_same_bits(graphed.tensors, eager.tensors, i)


def count_is(found: list[str], most: int) -> None:
    assert 1 <= len(found) <= most, found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_observing_launches_at_most_twice(axis: int, dtype: torch.dtype, device: torch.device):
    x = sample("gauss", 1000 * 300).reshape(300, 1000).to(dtype).to(device)
    for histogram in (True, False):
        channels = 1 if axis < 0 else x.shape[axis]
        layout = {"channels": channels, "mantissa_bits": 7, "octaves": 12, "histogram": histogram}
        state = empty_state(**layout).to(device)
        count_is(launches(device, lambda s=state: ops.observe_(x, *s, axis)), 2)


@by_rule
def test_a_training_forward_launches_at_most_three_times(rule: str, device: torch.device):
    for x, keys in (
        (sample("gauss", 300_000), {}),
        (sample("gauss", 300_000).reshape(300, 1000), PER_CHANNEL),
    ):
        quantizer = torch_ext.FakeQuantize("fake_quant", rule, **keys).to(device)
        quantizer.state = FakeQuantState.QAT
        for gradient in (False, True):
            v = x.to(device).requires_grad_(gradient)
            count_is(launches(device, lambda q=quantizer, v=v: q(v)), 3)


PER_CHANNEL: dict[str, Any] = {
    "qscheme": torch.per_channel_symmetric,
    "ch_axis": 0,
    "channel_len": 300,
}


def test_a_frozen_range_stays_without_a_look_at_its_flag(device: torch.device):
    """averaging_constant=0: whether there is a range is known to the device alone."""
    quantizer = torch_ext.FakeQuantize("fake_quant", "mse", averaging_constant=0.0).to(device)
    quantizer.state = FakeQuantState.QAT
    first, later = sample("gauss", 1000).to(device), (sample("gauss", 1000) * 9).to(device)
    quantizer(first)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    with no_sync(device):
        quantizer(later)
    assert_same_bits(quantizer.state_dict(), before)


def test_solving_a_model_launches_once_for_100_quantizers(device: torch.device):
    states = [empty_state().to(device) for _ in range(100)]
    for i, state in enumerate(states):
        ops.observe_(sample("gauss", 500, i).to(device), *state)

    def solve() -> None:
        ops.solve_many(
            ["kl"] * 100,
            [s.extrema for s in states],
            [s.tally for s in states],
            [s.counts for s in states],
            [-128] * 100,
            [127] * 100,
            [True] * 100,
        )

    count_is(launches(device, solve), 1)
    with no_sync(device):
        solve()


@by_state
def test_autocast(state: FakeQuantState, device: torch.device):
    model = ready_for(state, "percentile", device)
    x, given = on(device, 1)[0]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    (out.float() * given).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


@by_state
def test_a_compiled_model_is_one_graph(state: FakeQuantState, device: torch.device):
    model = ready_for(state, "percentile", device)
    x = on(device, 1)[0][0]
    torch.compiler.reset()
    compiled: nn.Module = torch.compile(model, backend="aot_eager", fullgraph=True)
    other = ready_for(state, "percentile", device)
    assert_same_bits(compiled(x), other(x))
    assert_same_bits(model.state_dict(), other.state_dict())
