"""What several processes cost and gain: sync_observers, and calibration on one and on all.

torchrun --nproc-per-node 2 benchmarks/scaling.py [--quick] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import native
import tables
import torch_ext
from torch_ext import FakeQuantize, calibrate, prepare_qat, set_fake_quantize, sync_observers

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from common.net import SmallNet

BATCH = 64
HEADER = f"{'what':46} {'processes':>9} {'median':>12} {'least':>10} {'most':>10}"


def prepared() -> nn.Module:
    """The examples' net, in CALIBRATION; speed does not depend on its weights."""
    torch.manual_seed(0)
    model = torch_ext.fuse(SmallNet().eval())
    model.qconfig = torch_ext.get_default_calib_qconfig()
    model = prepare_qat(model, example_inputs=torch.zeros(1, 1, 28, 28))
    set_fake_quantize(model, "calibration")
    return model


def observers(model: nn.Module) -> list[torch_ext.Observer]:
    found = [m.observer for m in model.modules() if isinstance(m, FakeQuantize)]
    return [observer for observer in found if not observer.transient]


def seconds(run: Callable[[], object]) -> float:
    """From where all ranks are ready to where the slowest is done."""
    dist.barrier()
    begun = time.perf_counter()
    run()
    took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


class Syncing:
    """One statistic of the net, merged again and again."""

    def __init__(self) -> None:
        self.model = prepared()
        images = torch.rand(
            BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(dist.get_rank())
        )
        with torch.no_grad():
            self.model(images)
        self.observers = observers(self.model)
        self.kept = [[t.clone() for t in (o.extrema, o.tally, o.counts)] for o in self.observers]

    def restore(self) -> None:
        for observer, kept in zip(self.observers, self.kept, strict=True):
            for buffer, value in zip(observer.buffers(), kept, strict=True):
                buffer.copy_(value)
            observer.synced = False

    def ours(self) -> float:
        self.restore()
        return seconds(lambda: sync_observers(self.model))

    def tensor_by_tensor(self) -> float:
        """A collective for each buffer, and nothing else: what any such scheme costs at least."""
        self.restore()

        def run() -> None:
            for observer in self.observers:
                dist.all_reduce(observer.extrema, dist.ReduceOp.MAX)
                dist.all_reduce(observer.tally)
                dist.all_reduce(observer.counts)

        return seconds(run)


def alone(model: nn.Module, batches: list[Tensor]) -> float:
    """All batches on rank 0, while the others wait."""
    run = (lambda: calibrate(model, batches, state="calibration")) if dist.get_rank() == 0 else None
    return seconds(run or (lambda: None))


def together(model: nn.Module, batches: list[Tensor]) -> float:
    own = batches[dist.get_rank() :: dist.get_world_size()]

    def run() -> None:
        calibrate(model, own, state="calibration")
        sync_observers(model)

    return seconds(run)


def row(what: str, processes: int, values: list[float], unit: str, factor: float) -> str:
    three = (statistics.median(values), min(values), max(values))
    texts = [f"{value * factor:.3g}" for value in three]
    return f"{what:46} {processes:>9} {texts[0] + ' ' + unit:>12} {texts[1]:>10} {texts[2]:>10}"


def measure(rounds: int, batch_count: int) -> tuple[list[str], dict[str, list[float]]]:
    world = dist.get_world_size()
    syncing, model = Syncing(), prepared()
    images = torch.rand(batch_count * BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(9))
    batches = list(images.split(BATCH))
    names = ("sync", "tensor by tensor", "alone", "together")
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):  # the first warms up
        one = (
            syncing.ours(),
            syncing.tensor_by_tensor(),
            alone(model, batches),
            together(model, batches),
        )
        if turn:
            for name, value in zip(names, one, strict=True):
                found[name].append(value)

    def ratio(name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(found[name], found[other], strict=True)]

    count, size = len(syncing.observers), sum(o.counts.nbytes for o in syncing.observers) / 2**20
    net = f"{count} quantizers, {size:.1f} MiB"
    total = len(images)
    rows = [
        row(f"sync_observers: {net}", world, found["sync"], "ms", 1e3),
        row("  a collective for each buffer", world, found["tensor by tensor"], "ms", 1e3),
        row("  ratio", world, ratio("tensor by tensor", "sync"), "", 1),
        row(f"calibrate: {total} images", 1, [total / s for s in found["alone"]], "/s", 1),
        row("calibrate + sync_observers", world, [total / s for s in found["together"]], "/s", 1),
        row("  ratio", world, ratio("alone", "together"), "", 1),
    ]
    return rows, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--save", action="store_true", help="a record in results/")
    chosen = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        print(f"scaling: start it as {__doc__.splitlines()[2]}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rows, found = measure(*((2, 4) if chosen.quick else (9, 32)))
        if dist.get_rank() == 0:
            about = tables.machine()
            about |= {"rounds": str(len(found["sync"])), "backend": "gloo, one thread a process"}
            text = "\n".join([f"{k:12} {v}" for k, v in about.items()] + ["", HEADER, *rows]) + "\n"
            print(text, flush=True)
            if chosen.save:
                stem = f"{about['date']}-{tables.slug(about['cpu'])}-scaling"
                path = native.FOLDER / "results" / stem
                record = {"machine": about, "seconds": found}
                path.with_suffix(".txt").write_text(text)
                path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        return 0
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
