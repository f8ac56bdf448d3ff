"""Short training with few bits: without a calibration, from one, and from corrected weights.

Everything but the start is the same: the net, the data, the seeds, the steps. Without a calibration
the first batch sets the ranges (fake_quant, lsq), or the usual clipping level does (pact).
``equalize`` and ``reconstruct`` change the weights and read no labels. Every start has the learning
rate that is best for it, of those that are tried. Prints accuracies over seeds, draws the losses.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import nn

import torch_ext
from common.data import DataError, Dataset, load
from common.net import SmallNet, accuracy, trained
from common.qat import Plan, train_quantized
from common.report import draw_losses, print_table
from low_bits import METHODS, prepare
from torch_ext import FakeQuantState, load_observer_params, set_fake_quantize

STARTS = (
    "without a calibration",
    "calibrated",
    "calibrated, reconstruct",
    "equalize, calibrated, reconstruct",
)
IMAGES = 512  # to calibrate with


class Training(NamedTuple):
    """One training; everything that it depends on."""

    folder: str | None
    bits: int
    method: str
    start: str
    rate: float
    seed: int
    steps: int
    test: int


class Trained(NamedTuple):
    """The accuracy, in percent, before and after the training, and the loss of each step."""

    before: float
    after: float
    losses: list[float]


@functools.cache
def net_and_data(folder: str | None) -> tuple[SmallNet, Dataset]:
    data = load(folder)
    return torch_ext.fuse(trained(data.name)), data


@functools.cache
def started(folder: str | None, bits: int, start: str) -> nn.Module:
    """A calibrated net, with equalized and rounded weights where the start has them."""
    net, data = net_and_data(folder)
    images = data.train_images[:IMAGES]
    if "equalize" in start:
        net = copy.deepcopy(net)
        torch_ext.equalize(net, images[:1], progress=False)
    model = prepare(net, bits, "fake_quant")
    torch_ext.calibrate(model, images.split(64), progress=False)
    if "reconstruct" in start:
        torch_ext.reconstruct(model, [images], progress=False)
    return model


def train(training: Training) -> Trained:
    torch.set_num_threads(1)
    net, data = net_and_data(training.folder)
    test = data.test_images[: training.test], data.test_labels[: training.test]
    model = prepare(net, training.bits, training.method)
    before = float("nan")  # without a range there is nothing to validate
    if training.start != STARTS[0]:
        start = started(training.folder, training.bits, training.start)
        torch_ext.load_float_state_dict(model, torch_ext.float_state_dict(start))
        with contextlib.redirect_stdout(None):
            load_observer_params(start, model)
        set_fake_quantize(model, FakeQuantState.VALIDATION)
        before = accuracy(model, *test)
    set_fake_quantize(model, FakeQuantState.QAT)
    losses = train_quantized(
        model, data, Plan(training.steps, rate=training.rate, seed=training.seed)
    )
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    return Trained(before, accuracy(model, *test), losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--bits", type=int, choices=(2, 4), default=4)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--steps", type=int, default=60, help="of training (60)")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--test", type=int, default=2000, help="test images (2000)")
    parser.add_argument("--method", choices=tuple(METHODS), default="lsq")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    chosen = parser.parse_args()
    if min(chosen.steps, chosen.seeds, chosen.test, chosen.jobs) < 1:
        parser.error("expected --steps, --seeds, --test and --jobs to be at least 1")
    if not all(0 < rate < math.inf for rate in chosen.rates):
        parser.error("expected --rates to be above 0")
    try:
        net, data = net_and_data(chosen.data)
        chosen.output.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:
        print(f"qat_start: {error}", file=sys.stderr)
        return 2
    print(data.note, flush=True)
    begun = time.perf_counter()
    work = [
        Training(
            chosen.data, chosen.bits, chosen.method, start, rate, seed, chosen.steps, chosen.test
        )
        for seed in range(chosen.seeds)
        for start in chosen.starts
        for rate in chosen.rates
    ]
    found: dict[tuple[str, float], list[Trained]] = {}
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        for one, done in zip(work, pool.imap(train, work), strict=True):
            found.setdefault((one.start, one.rate), []).append(done)
            print(f"  {one.start}, {one.rate:g}, seed {one.seed}: {done.after:.2f} %", flush=True)
    test = data.test_images[: chosen.test], data.test_labels[: chosen.test]
    print(f"float: {accuracy(net, *test):.2f} %")
    show(found, chosen)
    print(f"the whole run took {time.perf_counter() - begun:.0f} s")
    return 0


def show(found: dict[tuple[str, float], list[Trained]], chosen: argparse.Namespace) -> None:
    what = f"{chosen.method}, {chosen.bits} bits, {chosen.steps} steps, {chosen.seeds} seeds"
    rows, losses = [], {}
    for start in chosen.starts:
        rate = max(chosen.rates, key=lambda rate: mean(one.after for one in found[start, rate]))
        losses[start] = [one.losses for one in found[start, rate]]
        for each in chosen.rates:
            seeds = found[start, each]
            after = [one.after for one in seeds]
            before = seeds[0].before
            rows.append(
                [
                    f"{start}, {each:g}{' (best)' if each == rate else ''}",
                    "" if math.isnan(before) else f"{before:.2f}",
                    f"{mean(after):.2f}",
                    f"{min(after):.2f} to {max(after):.2f}",
                    f"{mean(mean(one.losses[:10]) for one in seeds):.2f}",
                    f"{mean(mean(one.losses[-10:]) for one in seeds):.2f}",
                ]
            )
    columns = ["start, learning rate", "before, %", "after, %", "seeds", "first loss", "last loss"]
    print_table(what, columns, rows)
    path = chosen.output / f"qat_start_{chosen.bits}_bits.svg"
    if draw_losses(losses, path, what):
        print(f"wrote {path}")
    else:
        print("no picture: matplotlib is not installed (pip install matplotlib)")


if __name__ == "__main__":
    sys.exit(main())
