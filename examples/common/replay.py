"""The same numbers in other batches and another order: what changes, here and elsewhere.

The input of every activation quantizer is captured in one pass of the float net and replayed to it
in batches of 1, 7 and 64 images and in a shuffled order. Only the split and the order differ, so
an observer whose result is a property of the data has to give the same result each time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from common.rivals import Rival
from torch_ext import FakeQuantize, FakeQuantState, set_fake_quantize

Feed = list[Tensor]  # the indices of the images of each batch, in the order of the batches


@dataclass(frozen=True)
class Sameness:
    """The outcome of comparing, bit for bit, what the feeds left behind."""

    quantizers: int
    compared: int  # tensors compared with those of the first feed
    differing: list[str]
    scales: dict[str, dict[str, list[float]]]  # rule -> quantizer -> one scale per feed


@dataclass(frozen=True)
class Spread:
    """How far the scales of one calibrator lie apart over the feeds: max / min - 1, in percent."""

    name: str
    per_quantizer: dict[str, float]
    seconds: float

    @property
    def worst(self) -> tuple[float, str]:
        return max((spread, name) for name, spread in self.per_quantizer.items())

    @property
    def median(self) -> float:
        return statistics.median(self.per_quantizer.values())


def feeds(count: int, seed: int = 0) -> dict[str, Feed]:
    """The ways to feed `count` images, by name."""
    order = torch.arange(count)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return {
        "batches of 1": list(order.split(1)),
        "batches of 7": list(order.split(7)),
        "batches of 64": list(order.split(64)),
        "batches of 64, shuffled": list(shuffled.split(64)),
    }


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """The quantizers that see data; those of weights hang in parametrizations."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize) and "parametrizations" not in name.split("."):
            yield name, module


@torch.no_grad()
def capture(prepared: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What arrives at each activation quantizer in one pass over the images, of float values."""
    model = copy.deepcopy(prepared)
    captured: dict[str, Tensor] = {}
    handles = []
    for name, quantizer in activation_quantizers(model):

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            if name in captured:
                raise RuntimeError(f"{name} ran twice in one pass")
            captured[name] = inputs[0].detach().clone()

        handles.append(quantizer.register_forward_pre_hook(keep))
    set_fake_quantize(model, FakeQuantState.CALIBRATION)  # in FLOAT they are not called
    model(images)
    for handle in handles:
        handle.remove()
    return captured


@torch.no_grad()
def replay(
    prepared: nn.Module,
    captured: Mapping[str, Tensor],
    ways: Mapping[str, Feed],
    rule_options: Mapping[str, Mapping[str, Any]],
) -> Sameness:
    """Replays each feed to a fresh copy of the prepared model; compares statistics and scales."""
    reference: dict[str, Tensor] = {}
    differing: list[str] = []
    compared = 0
    scales: dict[str, dict[str, list[float]]] = {}
    for way, feed in ways.items():
        model = copy.deepcopy(prepared)
        set_fake_quantize(model, FakeQuantState.CALIBRATION)
        for name, quantizer in activation_quantizers(model):
            for indices in feed:
                quantizer(captured[name][indices])
        set_fake_quantize(model, FakeQuantState.VALIDATION)  # solves every quantizer
        result = {f"as solved: {key}": value for key, value in model.state_dict().items()}
        for rule, options in rule_options.items():
            torch_ext.resolve(model, activation_observer=rule, **options)
            for name, quantizer in activation_quantizers(model):
                result[f"{rule}: {name}.scale"] = quantizer.scale.clone()
                result[f"{rule}: {name}.zero_point"] = quantizer.zero_point.clone()
                by_name = scales.setdefault(rule, {}).setdefault(name, [])
                by_name.append(float(quantizer.scale))
        if not reference:
            reference = result
            continue
        compared += len(reference)
        differing += [
            f"{way}: {key}" for key in reference if not same_bits(result[key], reference[key])
        ]
    return Sameness(len(captured), compared, differing, scales)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """torch.equal, and dtype and shape too."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def spread_of(rival: Rival, captured: Mapping[str, Tensor], ways: Mapping[str, Feed]) -> Spread:
    """Replays the same feeds through another project's calibrator, one per quantizer."""
    begun = time.perf_counter()
    per_quantizer = {}
    for name, values in captured.items():
        thresholds = [rival.threshold([values[i] for i in feed]) for feed in ways.values()]
        per_quantizer[name.removesuffix(".activation_quantizer")] = spread(thresholds)
    return Spread(rival.name, per_quantizer, time.perf_counter() - begun)


def own_spread(outcome: Sameness, seconds: float) -> Spread:
    """The same figure for this library: the worst of the rules at each quantizer."""
    worst: dict[str, float] = {}
    for by_name in outcome.scales.values():
        for name, scales in by_name.items():
            worst[name] = max(worst.get(name, 0.0), spread(scales))
    return Spread(f"torch_ext, any of {len(outcome.scales)} observers", worst, seconds)


def spread(values: Sequence[float]) -> float:
    """max / min - 1 in percent; infinite where a calibrator gave 0 once and not always."""
    low, high = min(values), max(values)
    if low > 0:
        return 100 * (high / low - 1)
    return 0.0 if high == low else float("inf")
