"""Several threads that run one model: exact statistics, consistent ranges, one calibrate a time."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets.tiny_net import images, prepared, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    Observer,
    calibrate,
    get_default_calib_qconfig,
    named_quantizers,
    ops,
    prepare_qat,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = get_default_calib_qconfig()
THREADS = 4


def run_in_threads(call: Callable[[Any], Any], shares: Iterable[Any]) -> None:
    """Calls the function with each share in a thread of its own, all starting together."""
    shares = list(shares)
    barrier = threading.Barrier(len(shares))
    errors: list[BaseException] = []

    def work(share: Any) -> None:
        barrier.wait()
        try:
            call(share)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def with_example() -> nn.Module:
    net = tiny_net().eval()
    net.qconfig = CONFIG  # type: ignore[assignment]
    return prepare_qat(net, example_inputs=images())


@pytest.mark.parametrize("channels", [1, 3])
def test_an_observer_counts_every_value(channels: int) -> None:
    keys: dict[str, Any] = {}
    if channels > 1:
        keys = {"qscheme": "per_channel_symmetric", "ch_axis": 1, "channel_len": channels}
    data = torch.randn(THREADS, 400, 64, channels, 8)
    shared, alone = Observer("percentile", **keys), Observer("percentile", **keys)

    def observe(share: Tensor) -> None:
        for x in share:
            shared(x)

    run_in_threads(observe, data)
    for share in data:
        for x in share:
            alone(x)
    assert same(snapshot(shared), snapshot(alone))
    assert int(shared.tally[:, 0].sum()) == data.numel()


def test_statistics_merged_from_threads_are_complete() -> None:
    total, wanted = Observer("percentile"), Observer("percentile")
    parts = []
    for seed in range(THREADS * 50):
        part = Observer("percentile")
        part(images(2, seed=seed) * (1 + seed % 7))
        parts.append(part)

    def merge(some: list[Observer]) -> None:
        for part in some:
            total.merge_(part)

    run_in_threads(merge, [parts[i::THREADS] for i in range(THREADS)])
    for part in parts:
        wanted.merge_(part)
    assert same(snapshot(total), snapshot(wanted))


@pytest.mark.parametrize("many", [False, True])
def test_ranges_are_read_while_others_observe(many: bool) -> None:
    """A statistic that is read half updated contradicts itself, which raises."""
    observer, batches = Observer("percentile"), torch.randn(4, 1 << 16)
    observer(batches[0])
    stop = threading.Event()

    def observe(batch: Tensor) -> None:
        while not stop.is_set():
            observer(batch)

    def read(_: Tensor) -> None:
        parts = (observer.extrema, observer.tally, observer.counts)
        try:
            for _ in range(300):
                if many:
                    ops.solve_many(
                        ["mse"] * 2, *([t] * 2 for t in parts), [-8] * 2, [7] * 2, [True] * 2
                    )
                else:
                    ops.solve("mse", *parts, -8, 7, True)
        finally:
            stop.set()

    run_in_threads(
        lambda task: task[0](task[1]), [(observe, b) for b in batches] + [(read, batches)]
    )


FORKS = """
import os, threading
import torch
from torch_ext import Observer

torch.set_num_threads(1)
observer, batch = Observer("percentile"), torch.randn(1 << 18)


def observe():
    while True:
        observer(batch)


for _ in range(3):
    threading.Thread(target=observe, daemon=True).start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        observer(batch)
        finite, zeros, tiny = observer.tally[0, :3].tolist()
        whole = finite % batch.numel() == 0 and finite == zeros + tiny + observer.counts.sum()
        os._exit(0 if whole else 1)
    if os.waitpid(child, 0)[1] != 0:
        print("a child found a half updated statistic")
        os._exit(1)
os._exit(0)
"""


def test_a_child_observes_though_it_was_forked_while_others_did() -> None:
    """Their mutex stays locked in the child, which has none of the threads that hold it."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=60)


@pytest.mark.parametrize("make", [lambda: prepared(CONFIG), with_example], ids=["plain", "example"])
def test_four_threads_calibrate_one_model(make: Callable[[], nn.Module]) -> None:
    shares = [[images(64, seed=100 * i + j) for j in range(10)] for i in range(THREADS)]
    net, alone = make(), make()

    def forward(share: list[Tensor]) -> None:
        with torch.no_grad():
            for batch in share:
                net(batch)

    set_fake_quantize(net, "calibration")
    run_in_threads(forward, shares)
    set_fake_quantize(net, "validation")
    calibrate(alone, [batch for share in shares for batch in share])
    assert same(snapshot(net), snapshot(alone))


def test_ranges_that_follow_in_threads_fit_their_scales() -> None:
    quantizer = FakeQuantize(averaging_constant=0.5)
    quantizer.state = "qat"  # type: ignore[assignment]

    def forward(share: Tensor) -> None:
        for x in share:
            quantizer(x)

    run_in_threads(forward, torch.randn(THREADS, 500, 256))
    scale, _ = ops.qparams(quantizer.range, -128, 127, True, "grid", False)
    assert same_bits(scale, quantizer.scale)


def test_two_calls_of_calibrate_at_once_are_refused_and_the_advice_works() -> None:
    net, wanted = prepared(CONFIG), prepared(CONFIG)
    batches = [images(seed=i) for i in range(4)]
    before = snapshot(net)

    def again(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        calibrate(net, batches)

    with pytest.raises(RuntimeError, match="calibrate: expected one call at a time"):
        calibrate(net, batches, forward=again)
    assert same(snapshot(net), before)

    set_fake_quantize(net, "calibration")
    run_in_threads(lambda batch: net(batch), batches)
    set_fake_quantize(net, "validation")
    calibrate(wanted, batches)
    assert same(snapshot(net), snapshot(wanted))
    assert set(named_quantizers(net)) == set(named_quantizers(wanted))
