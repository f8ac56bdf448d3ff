"""From a trained float net to INT8 by calibration and to INT4 weights by training, on real images.

Prints the float accuracy, the INT8 accuracy of every observer (all solved from one calibration
pass), what another batch size or order changes, and what training in INT4 gains; draws the losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import torch_ext
from common import replay, rivals
from common.data import DataError, Dataset, load
from common.net import accuracy, trained
from common.qat import Plan, train_quantized
from common.report import draw_losses, print_table
from torch_ext import FakeQuantState, get_default_qconfig, prepare_qat, set_fake_quantize


@dataclass(frozen=True)
class Sizes:
    """How much of the data each part uses."""

    test: int = 10_000
    calibration: int = 512
    replayed: int = 256  # images
    looked_at: int = 64  # images, by sensitivity and report
    swept: int = 1_000  # test images, for each pair of rules
    qat_steps: int = 120
    seeds: int = 3


BACKEND = "onnxruntime"
QUICK = Sizes(500, calibration=64, replayed=21, looked_at=2, swept=50, qat_steps=4, seeds=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--quick", action="store_true", help="a small slice of everything")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = parser.parse_args()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"fashion_mnist: output folder {str(arguments.output)!r}: {error}", file=sys.stderr)
        return 2
    try:
        run(load(arguments.data), QUICK if arguments.quick else Sizes(), arguments.output)
    except DataError as error:
        print(f"fashion_mnist: {error}", file=sys.stderr)
        return 2
    return 0


def run(data: Dataset, sizes: Sizes, output: Path) -> None:
    begun = time.perf_counter()
    info = torch_ext.build_info()
    print(data.note)
    print(
        f"torch_ext {info['version']}, torch {torch.__version__}, {info['cpu_capability']}, "
        f"{torch.get_num_threads()} threads"
    )
    data = dataclasses.replace(
        data,
        test_images=data.test_images[: sizes.test],
        test_labels=data.test_labels[: sizes.test],
    )
    float_model = torch_ext.fuse(trained(data.name))
    floating = accuracy(float_model, data.test_images, data.test_labels)
    print(f"float accuracy: {floating:.2f} % of {len(data.test_labels)} test images")

    calibrated = calibrate_int8(float_model, data, sizes)
    options = rule_options(calibrated)
    int8 = int8_accuracies(calibrated, data, options, floating)
    look_closer(calibrated, data, sizes, output)
    show_replay(float_model, data, sizes, options)
    int4 = int4_accuracies(float_model, data, sizes, output)
    show_summary(floating, int8, int4)
    print(f"the whole run took {time.perf_counter() - begun:.0f} s")


def calibrate_int8(float_model: nn.Module, data: Dataset, sizes: Sizes) -> nn.Module:
    """One pass over the calibration images; from here on no rule needs data again.

    The grids are those that onnxruntime computes with in integers on CPUs, and so do OpenVINO and
    Inductor; resolve(model, backend=...) changes them afterwards.
    """
    model = prepare(float_model, data, backend=BACKEND, activation_observer="percentile")
    calibrate(model, data, sizes.calibration)
    return model


def prepare(float_model: nn.Module, data: Dataset, **qconfig: Any) -> nn.Module:
    """A prepared copy of the float model."""
    float_model.qconfig = get_default_qconfig(**qconfig)
    return prepare_qat(float_model, example_inputs=data.train_images[:1])


def calibrate(model: nn.Module, data: Dataset, count: int) -> None:
    """Calibrates on the first training images, with a progress bar; leaves it in VALIDATION."""
    summary = torch_ext.calibrate(model, data.train_images[:count].split(64), progress=True)
    print(f"calibrated on {summary.samples} images in {summary.seconds:.1f} s")


def rule_options(calibrated: nn.Module) -> dict[str, dict[str, Any]]:
    """Options of the two rules that are told their range; every other rule keeps its defaults."""
    torch_ext.resolve(calibrated, activation_observer="min_max")
    quantizers = [quantizer for _, quantizer in replay.activation_quantizers(calibrated)]
    largest = max(float(quantizer.range.abs().max()) for quantizer in quantizers)
    options: dict[str, dict[str, Any]] = {name: {} for name in torch_ext.observers()}
    # Nothing saturates anywhere in the net, whichever sign it has.
    options["fixed_scale"] = {"scale": largest / 127, "zero_point": 128}
    options["clip"] = {"xmin": -6.0, "xmax": 6.0}
    return options


def int8_accuracies(
    calibrated: nn.Module, data: Dataset, options: dict[str, dict[str, Any]], floating: float
) -> dict[str, float]:
    """INT8 accuracy in VALIDATION of every observer, each solved from the same statistics."""
    found: dict[str, float] = {}
    rows = []
    for rule, chosen in options.items():
        begun = time.perf_counter()
        torch_ext.resolve(calibrated, activation_observer=rule, **chosen)
        solved = time.perf_counter() - begun
        found[rule] = accuracy(calibrated, data.test_images, data.test_labels)
        said = ", ".join(f"{key} {value:.4g}" for key, value in chosen.items())
        rows.append(
            [
                rule,
                said,
                f"{1000 * solved:.1f}",
                f"{found[rule]:.2f}",
                f"{found[rule] - floating:+.2f}",
            ]
        )
    print_table(
        "INT8 accuracy in VALIDATION, every observer solved from the one calibration pass",
        ["observer", "options", "solve, ms", "accuracy, %", "to float, %"],
        rows,
    )
    return found


def look_closer(calibrated: nn.Module, data: Dataset, sizes: Sizes, output: Path) -> None:
    """Which pair of rules is best, which quantizers cost most, and a page about all of them."""
    test = data.test_images[: sizes.swept], data.test_labels[: sizes.swept]
    found = torch_ext.sweep(
        calibrated,
        lambda model: accuracy(model, *test),
        activation_observers={"percentile": {"percentile": [99.9, 99.99, 99.999]}, "mix": {}},
        weight_observers=["min_max", "mse"],
        progress=True,
    )
    found.apply(calibrated)
    print(f"\nAccuracy of {len(test[1])} test images, rules of activations and of weights")
    print(found)
    batches = data.train_images[: sizes.looked_at].split(64)
    costs = torch_ext.sensitivity(calibrated, batches, progress=True)
    print("\nThe costliest quantizers")
    print("\n".join(str(costs).splitlines()[:11]))
    costs.save_picture(output / "sensitivity.svg")
    print(torch_ext.report(calibrated, output / "report.html", batches, progress=True))


def show_replay(
    float_model: nn.Module, data: Dataset, sizes: Sizes, options: dict[str, dict[str, Any]]
) -> None:
    """The promise: the split and the order of the data change nothing, not even the last bit."""
    prepared = prepare(float_model, data, backend=BACKEND, activation_observer="percentile")
    captured = replay.capture(prepared, data.train_images[: sizes.replayed])
    ways = replay.feeds(sizes.replayed)
    begun = time.perf_counter()
    outcome = replay.replay(prepared, captured, ways, options)
    seconds = time.perf_counter() - begun
    values = sum(tensor.numel() for tensor in captured.values())
    print(
        f"\nThe inputs of {outcome.quantizers} activation quantizers in one pass over "
        f"{sizes.replayed} images ({values:,} values), replayed in {', '.join(ways)}:"
    )
    if outcome.differing:
        raise RuntimeError(
            f"{len(outcome.differing)} of {outcome.compared} tensors differ between the feeds, "
            f"first {outcome.differing[0]!r}"
        )
    print(
        f"torch_ext: all {outcome.compared} tensors (statistics, and scales and zero points of "
        f"{len(options)} observers) are bit for bit the same"
    )
    spreads = [replay.own_spread(outcome, seconds)]
    others, missing = rivals.available()
    spreads += [replay.spread_of(rival, captured, ways) for rival in others]
    print_table(
        f"Spread of the scale over these {len(ways)} feeds of the same numbers (max / min - 1)",
        ["calibrator", "worst, %", "at quantizer", "median, %", "seconds"],
        [
            [
                s.name,
                f"{s.worst[0]:.4g}",
                s.worst[1] if s.worst[0] else "",
                f"{s.median:.4g}",
                f"{s.seconds:.1f}",
            ]
            for s in spreads
        ],
    )
    for sentence in missing:
        print(sentence)


def int4_accuracies(
    float_model: nn.Module, data: Dataset, sizes: Sizes, output: Path
) -> dict[str, list[float]]:
    """INT4 weights: calibrated only, trained from the calibration, and trained without it.

    One accuracy for what is only calibrated, one for each seed of what is trained.
    """
    config = {"activation_observer": "percentile", "weight_qkwargs": {"dtype": "int4"}}
    calibrated = prepare(float_model, data, **config)
    calibrate(calibrated, data, sizes.calibration)
    test = data.test_images, data.test_labels
    found: dict[str, list[float]] = {}
    for rule in ("mse", "min_max"):  # the last one is what QAT starts from
        torch_ext.resolve(calibrated, weight_observer=rule)
        found[f"calibrated, weights by {rule}"] = [accuracy(calibrated, *test)]
    losses: dict[str, list[list[float]]] = {}
    for name, start in (("QAT from the calibration", calibrated), ("QAT without it", None)):
        begun = time.perf_counter()
        for seed in range(sizes.seeds):
            model = prepare(float_model, data, **config)
            if start is not None:
                torch_ext.load_observer_params(start, model)
            set_fake_quantize(model, FakeQuantState.QAT)
            plan = Plan(sizes.qat_steps, seed=seed)
            losses.setdefault(name, []).append(train_quantized(model, data, plan))
            set_fake_quantize(model, FakeQuantState.VALIDATION)
            found.setdefault(name, []).append(accuracy(model, *test))
        seconds = time.perf_counter() - begun
        print(f"{name}: {sizes.seeds} seeds, {sizes.qat_steps} steps each, {seconds:.0f} s")
    picture = output / "int4_qat_loss.png"
    title = f"QAT with INT4 weights on {data.name}, mean of {sizes.seeds} seeds"
    if draw_losses(losses, picture, title):
        print(f"wrote {picture}")
    else:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    return found


def show_summary(floating: float, int8: dict[str, float], int4: dict[str, list[float]]) -> None:
    rows = {"float": [floating]}
    for which, choose in (("best", max), ("worst", min)):
        rule = choose(int8, key=lambda rule: int8[rule])
        rows[f"INT8, {which} observer ({rule})"] = [int8[rule]]
    rows |= {f"INT4 weights, {name}": values for name, values in int4.items()}
    print_table(
        "Accuracy on the test images (of several seeds: mean, and least to most)",
        ["model", "accuracy, %", "to float, %", "over seeds, %"],
        [
            [
                name,
                f"{mean(values):.2f}",
                f"{mean(values) - floating:+.2f}",
                f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "",
            ]
            for name, values in rows.items()
        ],
    )
    starts = [values for name, values in int4.items() if name.startswith("QAT")]
    apart = abs(mean(starts[0]) - mean(starts[1]))
    noise = max(max(values) - min(values) for values in starts)
    print(
        f"The means of the two starts of QAT are {apart:.2f} points apart, the seeds of one start "
        f"up to {noise:.2f}: without a calibration the first batch sets the ranges."
    )


if __name__ == "__main__":
    sys.exit(main())
