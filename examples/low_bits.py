"""Few bits: what learning the ranges gains over following them, from the same calibrated starts.

Weights and inputs of layers have 4 bits, then 2; those of the first and the last layer keep 8, as
the papers of lsq and pact have it. Prints the accuracy of each method over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from statistics import mean

import torch
from torch import nn

import torch_ext
from common.data import DataError, Dataset, load
from common.net import SmallNet, accuracy, trained
from common.qat import Plan, train_quantized
from common.report import print_table
from torch_ext import (
    FakeQuantState,
    get_default_qconfig,
    load_observer_params,
    prepare_qat,
    set_fake_quantize,
)

# Method of the activations, method of the weights: pact is one of activations alone.
METHODS = {
    "fake_quant": ("fake_quant", "fake_quant"),
    "lsq": ("lsq", "lsq"),
    "pact": ("pact", "fake_quant"),
}
# Grids of weights and of what layers read, which ReLUs made.
GRIDS = {
    4: ({"dtype": "int4"}, {"dtype": "uint4"}),
    2: ({"dtype": "int4", "quant_min": -2, "quant_max": 1}, {"dtype": "uint4", "quant_max": 3}),
}


def prepare(float_model: SmallNet, bits: int, method: str) -> nn.Module:
    """A prepared copy: the ranges of least squared error for few bits, min and max for 8."""
    activation, weight = METHODS[method]
    weight_grid, activation_grid = GRIDS[bits]
    few = get_default_qconfig(activation, weight, "mse", "mse", activation_grid, weight_grid)
    eight = get_default_qconfig(activation_observer="percentile")
    mapping = {
        "": few,
        "stem.0": eight,
        "scores": eight,
        "residual?": None,  # a branch that is added has negative values too
        "residual?.*": few,
    }
    return prepare_qat(float_model, mapping=mapping, example_inputs=torch.zeros(1, 1, 28, 28))


def run(data: Dataset, bits: int, steps: int, seeds: int, images: int) -> dict[str, list[float]]:
    """Accuracies in percent, of the calibrated net and of each method, one for each seed."""
    float_model = torch_ext.fuse(trained(data.name))
    test = data.test_images, data.test_labels
    calibrated = prepare(float_model, bits, "fake_quant")
    torch_ext.calibrate(calibrated, data.train_images[:images].split(64))
    found = {"calibrated": [accuracy(calibrated, *test)]}
    for method in METHODS:
        for seed in range(seeds):
            model = prepare(float_model, bits, method)
            with contextlib.redirect_stdout(None):
                load_observer_params(calibrated, model)
            set_fake_quantize(model, FakeQuantState.QAT)
            train_quantized(model, data, Plan(steps, seed=seed))
            set_fake_quantize(model, FakeQuantState.VALIDATION)
            found.setdefault(method, []).append(accuracy(model, *test))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files of Fashion-MNIST")
    parser.add_argument(
        "--steps", type=int, default=200, help="of training, for each method and seed"
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    try:
        data = load(arguments.data)
    except DataError as error:
        print(f"low_bits: {error}", file=sys.stderr)
        return 2
    print(data.note)
    begun = time.perf_counter()
    rows = []
    for bits in GRIDS:
        found = run(data, bits, arguments.steps, arguments.seeds, images=512)
        for name, values in found.items():
            spread = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
            rows.append([f"{bits} bits, {name}", f"{mean(values):.2f}", spread])
    print_table(
        f"Accuracy after {arguments.steps} steps from the calibrated start",
        ["weights and activations", "accuracy, %", f"{arguments.seeds} seeds"],
        rows,
    )
    print(f"the whole run took {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
