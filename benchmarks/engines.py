"""INT8 in the engines: integer layers, speed against float, size, agreement with VALIDATION.

    make engines                installs the packages of the extra ``engines`` first
    .venv/bin/python benchmarks/engines.py [--nets resnet18] [--engines onnxruntime] [--save]

Each net is calibrated for each engine, exported, and run by it: with one thread, one image at a
time, in turns with the same engine's float32, of which the least time counts. Engines that are not
installed are left out, and named. There are no labels: "same class" is the share of images for
which the engine chooses the class that VALIDATION chooses, "difference" the norm of the difference
of the outputs over that of VALIDATION's. "KiB" is the size of an ONNX file, its weights stored as
int8, and "export" the processor time of the export in seconds: other work on the machine does not
count.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from engine_programs import inductor, xnnpack
from torch_ext import calibrate, export, get_default_qconfig, prepare_qat
from torch_ext.analysis.svg import bar_picture
from zoo.operators import declare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BATCH = 8


@dataclass(frozen=True)
class Row:
    """A net in an engine."""

    net: str
    engine: str
    integer: int
    layers: int
    int8_ms: float
    float_ms: float
    same_class: float
    difference: float
    kib: float | None  # of a file
    export_s: float  # of processor time
    not_integer: str

    @property
    def speedup(self) -> float:
        return self.float_ms / self.int8_ms


@dataclass(frozen=True)
class Run:
    """What an engine makes of a model: its layers, its times, and a way to call it."""

    integer: int
    layers: int
    int8_ms: float
    float_ms: float
    not_integer: str
    call: Callable[[Tensor], Tensor]
    kib: float | None
    export_s: float


# Nets ---------------------------------------------------------------------------------------------


def untrained(package: str, name: str) -> Callable[[int], tuple[nn.Module, Tensor, Tensor]]:
    """A net with random weights, and norms whose statistics are those of the data."""

    def make(count: int) -> tuple[nn.Module, Tensor, Tensor]:
        declare()
        torch.manual_seed(0)
        net = getattr(importlib.import_module(package), name)()
        calibration, test = _crops(224, count)
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        net.train()
        with torch.no_grad():
            for part in calibration.split(BATCH):
                net(part)
        return net.eval(), calibration, test

    return make


def efficientnet(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """EfficientNet-Lite1, trained on ImageNet."""
    from trained_net import trained_net

    return trained_net(), *_crops(240, count)


def example(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The examples' net, trained on Fashion-MNIST, or else on scikit-learn's digits."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    data = importlib.import_module("common.data").load()
    net = importlib.import_module("common.net").trained(data.name)
    return net.eval(), data.train_images[:64], data.test_images[:count]


NETS: dict[str, Callable[[int], tuple[nn.Module, Tensor, Tensor]]] = {
    "resnet18": untrained("torchvision.models", "resnet18"),
    "mobilenet_v2": untrained("torchvision.models", "mobilenet_v2"),
    "mobilenet_v3_small": untrained("torchvision.models", "mobilenet_v3_small"),
    "timm efficientnet_b0": untrained("timm.models", "efficientnet_b0"),
    "timm regnetx_002": untrained("timm.models", "regnetx_002"),
    "efficientnet_lite1": efficientnet,
    "example": example,
}


def _crops(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Crops of photos to calibrate with, and others to compare on."""
    import trained_net

    pictures = trained_net.photos()
    made = []
    for number, seed in ((32, 1), (count, 2)):
        crops = trained_net.crops(pictures, number, seed)
        made.append(nn.functional.interpolate(crops, (size, size), mode="bilinear"))
    return made[0], made[1]


# Engines ------------------------------------------------------------------------------------------


def onnx_engine(engine: str) -> Callable[[nn.Module, nn.Module, Tensor, float], Run]:
    """A file of export.onnx in onnxruntime or OpenVINO."""

    def run(net: nn.Module, model: nn.Module, example: Tensor, seconds: float) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            pair = torch.cat([example, example])
            seconds_of_export = _export(engine, model, pair, path)
            size = path.stat().st_size / 1024
            found = export.check(path, engines=engine, seconds=seconds).engines[0]
            call = _caller(engine, path)
        assert found.int8_ms is not None
        assert found.float_ms is not None
        return Run(
            len(found.integer), len(found.layers), found.int8_ms, found.float_ms,
            _grouped([(layer.name, layer.reason) for layer in found.floating]), call,
            size, seconds_of_export,
        )  # fmt: skip

    return run


def _export(engine: str, model: nn.Module, pair: Tensor, path: Path) -> float:
    """Writes the file; returns how long that took."""
    begun = time.process_time()
    try:
        export.onnx(model, pair, path, profile=engine, quantized_weights=True)  # type: ignore[arg-type]
    except ValueError:  # the profile refuses what stays float; here that is counted
        begun = time.process_time()
        export.onnx(model, pair, path, quantized_weights=True)
    return time.process_time() - begun


def _caller(engine: str, path: Path) -> Callable[[Tensor], Tensor]:
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path.read_bytes()), "CPU", settings)
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def program_engine(backend: str) -> Callable[[nn.Module, nn.Module, Tensor, float], Run]:
    """A program of export.pt2e in Inductor or in ExecuTorch's XNNPACK."""
    lower = {"x86": inductor, "xnnpack": xnnpack}[backend]

    def run(net: nn.Module, model: nn.Module, example: Tensor, seconds: float) -> Run:
        begun = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            program = export.pt2e(model, example, backend=backend)  # type: ignore[arg-type]
        seconds_of_export = time.process_time() - begun
        kinds = (nn.Conv2d, nn.Linear)
        layers = sum(isinstance(module, kinds) for module in net.modules())
        told = [str(w.message) for w in caught if w.category is torch_ext.QuantizationWarning]
        lowered = lower(net, program, example, seconds)
        return Run(
            lowered.integer, layers, lowered.int8_ms, lowered.float_ms, "; ".join(told),
            lowered.call, None, seconds_of_export,
        )  # fmt: skip

    return run


@dataclass(frozen=True)
class Engine:
    """An engine, the packages that it needs, and the grids that a model is calibrated for."""

    packages: tuple[str, ...]
    grids: dict[str, Any]
    run: Callable[[nn.Module, nn.Module, Tensor, float], Run]


ENGINES: dict[str, Engine] = {
    "onnxruntime": Engine(("onnxruntime",), {"backend": "onnxruntime"}, onnx_engine("onnxruntime")),
    "onnxruntime, int8 symmetric": Engine(("onnxruntime",), {}, onnx_engine("onnxruntime")),
    "openvino": Engine(("openvino",), {"backend": "openvino"}, onnx_engine("openvino")),
    "inductor": Engine(("torchao",), {"backend": "x86"}, program_engine("x86")),
    "xnnpack": Engine(("executorch",), {"backend": "xnnpack"}, program_engine("xnnpack")),
}


def usable(name: str) -> str:
    """Why an engine cannot run here; empty if it can."""
    if missing := [p for p in ENGINES[name].packages if importlib.util.find_spec(p) is None]:
        return f"{', '.join(missing)} is not installed"
    return ""


def _grouped(layers: list[tuple[str, str]]) -> str:
    """Layers with their reasons, those of a kind of reason together."""
    groups: dict[str, list[str]] = {}
    for name, reason in layers:
        groups.setdefault(reason, []).append(name)
    kinds: dict[str, list[str]] = {}
    for reason, names in groups.items():
        kind = next((k for k in ("Relu", "Clip", "input int8", "bias") if k in reason), reason)
        kinds.setdefault(kind, []).extend(names)
    firsts = {}
    for reason in groups:
        kind = next((k for k in ("Relu", "Clip", "input int8", "bias") if k in reason), reason)
        firsts.setdefault(kind, reason)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {firsts[kind]}"
        for kind, names in kinds.items()
    )


# The table ----------------------------------------------------------------------------------------


def measure(net_name: str, engines: list[str], count: int, seconds: float) -> list[Row]:
    net, calibration, test = NETS[net_name](count)
    net = torch_ext.fuse(net, example_inputs=test[:1])
    rows = []
    for name in engines:
        engine = ENGINES[name]
        plain = copy.deepcopy(net)
        plain.qconfig = get_default_qconfig(**engine.grids)  # type: ignore[assignment]
        keys = {"output_qconfig": plain.qconfig} if name == "xnnpack" else {}
        model = prepare_qat(plain, inplace=True, example_inputs=test[:1], **keys)
        calibrate(model, calibration.split(BATCH), progress=False)
        try:
            done = engine.run(net, model, test[:1], seconds)
        except Exception as error:  # an engine that fails must not end the others
            print(f"  {net_name} in {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        with torch.no_grad():
            want = torch.cat([model(part) for part in test.split(BATCH)])
            have = torch.cat([done.call(x) for x in test.split(1)])
        same = float((have.argmax(1) == want.argmax(1)).double().mean())
        error = float((have - want).double().norm() / want.double().norm())
        row = Row(
            net_name, name, done.integer, done.layers, done.int8_ms, done.float_ms, same, error,
            done.kib, done.export_s, done.not_integer,
        )  # fmt: skip
        rows.append(row)
        print(
            f"  {net_name} in {name}: {row.integer} of {row.layers}, {row.speedup:.2f} times, "
            f"same class {same:.3f}",
            flush=True,
        )
    return rows


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        "| net | engine | layers in integers | ms, float's | times as fast | same class "
        "| difference | KiB | export, s | in float, because |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.net} | {row.engine} | {row.integer} of {row.layers} | {row.int8_ms:.3g}, "
        f"{row.float_ms:.3g} | {row.speedup:.2f} | {row.same_class:.3f} | {row.difference:.3f} "
        f"| {'' if row.kib is None else f'{row.kib:.0f}'} | {row.export_s:.1f} "
        f"| {row.not_integer} |"
        for row in rows
    ]
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]]) -> str:
    """An SVG: a group of bars for each net, a bar for each engine."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    by_net: dict[str, dict[str, float]] = {}
    for row in rows:
        by_net.setdefault(row["net"], {})[row["engine"]] = row["speedup"]
    bars = []
    for net, found in by_net.items():
        speeds = [found.get(engine, math.nan) for engine in engines]
        bars.append((net, speeds, ", ".join(f"{speed:.1f}" for speed in speeds)))
    title = "INT8: how many times as fast as the same engine's float32"
    return bar_picture(title, engines, bars)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        model = text.partition("model name")[2].partition("\n")[0].strip("\t :") or model
    versions = {}
    for name in ("torch", "onnxruntime", "openvino", "torchao", "executorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=list(ENGINES))
    parser.add_argument("--images", type=int, default=48, help="to compare on (48)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, each (5)")
    parser.add_argument("--save", action="store_true", help="keep the record in results/")
    chosen = parser.parse_args()
    if chosen.images < 1 or chosen.seconds <= 0:
        parser.error("expected --images to be at least 1 and --seconds to be above 0")
    torch.set_num_threads(1)
    about = machine()
    print(json.dumps(about))
    engines = []
    for name in chosen.engines:
        if reason := usable(name):
            print(f"without {name}: {reason}")
        else:
            engines.append(name)
    if not engines:
        raise SystemExit('engines.py: expected an engine to be installed; "make engines"')
    rows = []
    for name in chosen.nets:
        rows += measure(name, engines, chosen.images, chosen.seconds)
    print("\n" + table(rows))
    if chosen.save:
        record = {**about, "load at the end": [round(value, 1) for value in os.getloadavg()]}
        record["rows"] = [{**asdict(row), "speedup": row.speedup} for row in rows]
        path = RESULTS / f"{about['date']}-engines.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".svg").write_text(picture(record["rows"]) + "\n")
        print(f"wrote {path} and its .svg")


if __name__ == "__main__":
    main()
