"""The eleven steps from a float net to a quantization-trained one, in their order."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from common.data import DataError, Dataset, load
from common.net import accuracy
from common.qat import Plan, train_quantized
from torch_ext import (
    FakeQuantState,
    get_default_calib_qconfig,
    get_default_qconfig,
    load_observer_params,
    prepare_qat,
    resolve,
    set_fake_quantize,
)
from train_float import train


def run(data: Dataset, qat_steps: int) -> dict[str, float]:
    """Returns the accuracies in percent: float, each percentile tried, INT4 after training."""
    test = data.test_images, data.test_labels

    # 1. Build and train the float model (it has BatchNorm and Dropout).
    model = train(data, epochs=2, batch=32, peak_rate=4e-3, seed=0).eval()
    found = {"float": accuracy(model, *test)}

    # 2. Set its qconfig and prepare it, with an example of what it is called with; prepare_qat
    # leaves `model` itself as it is.
    example = data.train_images[:1]
    model.qconfig = get_default_calib_qconfig(weight_qkwargs={"dtype": "int4"})
    calibration_model = prepare_qat(model, example_inputs=example)

    # 3. State CALIBRATION: observe, compute what the float model computes.
    set_fake_quantize(calibration_model, FakeQuantState.CALIBRATION)

    # 4. Forward the calibration data.
    for images in data.train_images[:512].split(64):
        calibration_model(images)

    # 5. State VALIDATION: quantize with what was observed. No call of eval() is needed between.
    set_fake_quantize(calibration_model, FakeQuantState.VALIDATION)

    # 6. Evaluate; where it is not good enough, change the observer's options and solve again.
    for percentile in (99.0, 99.9, 99.99):
        resolve(calibration_model, activation_observer="percentile", percentile=percentile)
        found[f"calibrated, percentile {percentile}"] = accuracy(calibration_model, *test)

    # 7. From the float model build the QAT model anew, with another qconfig.
    model.qconfig = get_default_qconfig(
        activation_observer="min_max",
        activation_qkwargs={"averaging_constant": 0.01},
        weight_qkwargs={"dtype": "int4"},
    )
    qat_model = prepare_qat(model, example_inputs=example)

    # 8. Start it from the calibrated parameters.
    load_observer_params(calibration_model, qat_model)

    # 9. State QAT: quantize with gradients, ranges follow the batches.
    set_fake_quantize(qat_model, FakeQuantState.QAT)

    # 10. Train.
    train_quantized(qat_model, data, Plan(qat_steps))

    # 11. State VALIDATION, and evaluate.
    set_fake_quantize(qat_model, FakeQuantState.VALIDATION)
    found["trained in QAT"] = accuracy(qat_model, *test)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--quick", action="store_true", help="a small slice of everything")
    arguments = parser.parse_args()
    try:
        data = load(arguments.data)
    except DataError as error:
        print(f"eleven_steps: {error}", file=sys.stderr)
        return 2
    print(data.note)
    train_count, test_count = (1_280, 500) if arguments.quick else (12_000, 10_000)
    data = dataclasses.replace(
        data,
        train_images=data.train_images[:train_count],
        train_labels=data.train_labels[:train_count],
        test_images=data.test_images[:test_count],
        test_labels=data.test_labels[:test_count],
    )
    for name, value in run(data, qat_steps=10 if arguments.quick else 150).items():
        print(f"{name}: {value:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
