"""Says which layers of an ONNX file each engine computes in integers, and how fast it is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch_ext.export.common.entries import SMALL_SCALE, check_path
from torch_ext.export.common.packages import load_onnx
from torch_ext.export.common.sessions import onnxruntime_session
from torch_ext.export.engines.float_twin import float_twin
from torch_ext.export.engines.integer_layers import EngineLayer, is_quantized, layers_in_onnxruntime
from torch_ext.export.engines.named_file import all_nodes, named_file
from torch_ext.export.engines.openvino_runs import openvino_compiled, openvino_layers
from torch_ext.export.engines.timing import Shapes, random_inputs, side_by_side
from torch_ext.files.storage import PathLike
from torch_ext.utils.arguments import bounded, parse_integer
from torch_ext.utils.text import shown, text_table

_WHO = "export.check"
_ENGINES = ("onnxruntime", "openvino")
_MOST_THREADS = 1024
_MOST_SECONDS = 86400


@dataclass(frozen=True)
class EngineCheck:
    """What one engine makes of a file, in an :class:`ExportCheck`."""

    #: ``"onnxruntime"`` or ``"openvino"``.
    engine: str
    #: The version of its package.
    version: str
    #: Convolutions, matrix products, attention and recurrent layers, in the engine's order.
    layers: tuple[EngineLayer, ...]
    #: Milliseconds of a run; None if it was not timed.
    int8_ms: float | None
    #: The same for the file without its quantizers; None if it was not timed.
    float_ms: float | None
    #: Why the engine does not load the file; empty if it does.
    problem: str

    @property
    def integer(self) -> tuple[EngineLayer, ...]:
        """The layers that it computes in integers."""
        return tuple(layer for layer in self.layers if layer.integer)

    @property
    def floating(self) -> tuple[EngineLayer, ...]:
        """The layers that it computes in float."""
        return tuple(layer for layer in self.layers if not layer.integer)

    @property
    def all_integer(self) -> bool:
        """Whether the engine loads the file and computes every layer in integers, if it has any."""
        return not self.problem and not self.floating

    @property
    def speedup(self) -> float | None:
        """How many times as fast as in float the file runs; None if it was not timed."""
        if self.int8_ms is None or self.float_ms is None:
            return None
        return self.float_ms / self.int8_ms

    def summary(self) -> str:
        """The number of integer layers, and the times, in a line."""
        if self.problem:
            return f"{self.engine} {self.version}: {self.problem}"
        text = f"{self.engine} {self.version}: "
        if self.layers:
            text += f"{len(self.integer)} of {len(self.layers)} layers in integers"
        else:
            text += "no layers: nothing in the file multiplies and adds up"
        if self.speedup is not None:
            text += (
                f"; {self.int8_ms:.3g} ms, in float {self.float_ms:.3g} ms: {self.speedup:.2f} "
                "times as fast"
            )
        return text

    def table(self) -> tuple[tuple[str, ...], list[list[str]]]:
        """The header and the rows of a table of the layers, as text."""
        rows = [
            [
                *(layer.name, layer.op, "integer" if layer.integer else "float"),
                *(layer.reason, layer.advice),
            ]
            for layer in self.layers
        ]
        return ("layer", "operator", "runs in", "because", "way out"), rows


@dataclass(frozen=True)
class ExportCheck:
    """The result of :func:`check`; as text, a summary and a table for each engine."""

    #: The file.
    path: str
    #: One per engine that was asked.
    engines: tuple[EngineCheck, ...]
    #: What deserves a look: scales that are next to nothing, a file without quantizers, engines
    #: that are not installed.
    notes: tuple[str, ...]

    @property
    def all_integer(self) -> bool:
        """Whether every engine computes every layer in integers."""
        return all(engine.all_integer for engine in self.engines)

    def __str__(self) -> str:
        parts = [self.path]
        for engine in self.engines:
            parts.append(engine.summary())
            if engine.layers:
                parts.append(text_table(*engine.table()))
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)


def check(
    path: PathLike,
    *,
    engines: str | Sequence[str] | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    threads: int = 1,
    seconds: float = 2.0,
) -> ExportCheck:
    """Says which layers of an ONNX file run in integers, which in float and why, and how fast.

    The file may be of :func:`onnx` or of another program. onnxruntime's layers are those of the
    graph that its optimiser makes, OpenVINO's those of its runtime model. The file and the same
    file without its quantizers run in turns, on random inputs, in float32 where they do not run in
    integers; the least time of each counts::

        found = export.check("net.onnx")
        print(found)
        assert found.all_integer

    Args:
        path: the file.
        engines: ``"onnxruntime"``, ``"openvino"`` or a list of both; by default those that are
            installed.
        batch: the size of inputs' first axis, where the file leaves it open; by default 1.
        shapes: the whole shape of inputs by name, for other axes that the file leaves open.
        threads: of the engine, 1 to 1024; by default 1.
        seconds: about how long each engine is timed, up to 86400, by default 2; 0 does not time.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: for an unknown engine or another wrong argument; for inputs that are no tensors
            of numbers, unless ``seconds`` is 0; if no engine loads the file, with the reason of
            each.
        FileError: a ValueError, for a file that is not ONNX.
        FileNotFoundError: if there is no such file.
        ImportError: if onnx or onnxscript is missing, an engine that was asked for, or every one.
    """
    chosen, notes = _engines(engines)
    parse_integer(_WHO, "batch", batch, 1, 2**31 - 1)
    parse_integer(_WHO, "threads", threads, 1, _MOST_THREADS)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{_WHO}: expected seconds to be a number, got {bounded(seconds)}")
    if not 0 <= seconds <= _MOST_SECONDS:
        raise ValueError(
            f"{_WHO}: expected seconds to be between 0 and {_MOST_SECONDS}, got {seconds}"
        )
    target = check_path(_WHO, path, ".onnx")
    packages, proto = load_onnx(_WHO, target)
    if not any(is_quantized(node) for node in all_nodes(proto.graph)):
        notes.append("the file has no quantizers, and no operator of integers: it is float")
    notes += _tiny_scales(packages, proto)
    feeds = random_inputs(_WHO, packages, proto, batch, shapes) if seconds else {}
    twin = b""
    if seconds:
        try:
            twin = float_twin(_WHO, packages, proto, f"{target} in float")
        except ValueError as error:
            notes.append(str(error).removeprefix(f"{_WHO}: "))
    found = []
    with named_file(packages, proto, target) as file:
        for name in chosen:
            given = (name, file, target, packages, proto, twin, feeds, threads, seconds)
            try:
                found.append(_check_engine(*given))
            except ValueError as error:
                problem = str(error).removeprefix(f"{_WHO}: ")
                found.append(EngineCheck(name, _version(name), (), None, None, problem))
    if found and all(engine.problem for engine in found):
        raise ValueError(f"{_WHO}: " + "; ".join(engine.problem for engine in found))
    return ExportCheck(str(target), tuple(found), tuple(notes))


def _engines(engines: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The engines to ask, and a note for each that is not installed."""
    installed = [name for name in _ENGINES if importlib.util.find_spec(name) is not None]
    if engines is None:
        if not installed:
            raise ImportError(
                f"{_WHO}: needs onnxruntime or openvino: pip install onnxruntime openvino"
            )
        absent = [name for name in _ENGINES if name not in installed]
        return installed, [f"{name} is not installed: pip install {name}" for name in absent]
    if not isinstance(engines, (str, Sequence)):
        raise TypeError(
            f"{_WHO}: expected engines to be a name or a list of names, got {bounded(engines)}"
        )
    given = [engines] if isinstance(engines, str) else list(engines)
    chosen = [name for i, name in enumerate(given) if name not in given[:i]]
    if not chosen:
        raise ValueError(f"{_WHO}: expected engines to name an engine, got none")
    for name in chosen:
        if name not in _ENGINES:
            raise ValueError(f"{_WHO}: unknown engine {bounded(name)}; known: {_ENGINES}")
        if name not in installed:
            raise ImportError(f"{_WHO}: needs the package {name}: pip install {name}")
    return chosen, []


def _tiny_scales(packages: Any, proto: Any) -> list[str]:
    """A note about quantizers whose scale is so small that engines' fused kernels go wrong."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    tiny = {}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in tensors:
            name = node.input[1].removesuffix("/scale")
            values = packages.numpy_helper.to_array(tensors[node.input[1]])
            if name not in tiny and values.size and float(abs(values).min()) < SMALL_SCALE:
                tiny[name] = float(abs(values).min())
    if not tiny:
        return []
    return [
        f"scales below {SMALL_SCALE:g}, with which onnxruntime's fused kernels go wrong: "
        f"{shown([f'{name} ({scale:.3g})' for name, scale in tiny.items()], 5)}"
    ]


def _version(engine: str) -> str:
    # Not the version of an installed package: that may be onnxruntime-gpu or openvino-nightly.
    return str(importlib.import_module(engine).__version__).partition("-")[0]


def _check_engine(
    name: str,
    file: Path,
    path: Path,
    packages: Any,
    proto: Any,
    twin: bytes,
    feeds: Any,
    threads: int,
    seconds: float,
) -> EngineCheck:
    engine = _ENGINE_CALLS[name]
    loaded, run = engine.load(file, path, threads)
    layers = tuple(engine.layers(loaded, packages, proto, file, path))
    times: tuple[float | None, float | None] = (None, None)
    if twin:
        _, run_float = engine.load(twin, f"{path} in float", threads)
        times = _timed(engine.title, lambda: run(feeds), lambda: run_float(feeds), seconds)
    return EngineCheck(name, _version(name), layers, *times, "")


def _timed(
    engine: str, quantized: Callable[[], object], floating: Callable[[], object], seconds: float
) -> tuple[float, float]:
    try:
        return side_by_side(quantized, floating, seconds)
    except Exception as error:  # engines have classes of their own
        raise ValueError(
            f"{_WHO}: expected the file to run with random inputs, got {engine}'s error: "
            f"{str(error).strip()[:1500]}; give other shapes, or seconds=0 to only list layers"
        ) from error


class _EngineCalls(NamedTuple):
    """An engine: its name in errors, what loads a model and gives a way to run it, and layers."""

    title: str
    load: Callable[[Path | bytes, object, int], tuple[Any, Callable[[Any], object]]]
    layers: Callable[[Any, Any, Any, Path, Path], list[EngineLayer]]


def _load_in_onnxruntime(
    model: Path | bytes, label: object, threads: int
) -> tuple[Any, Callable[[Any], object]]:
    session = onnxruntime_session(_WHO, model, label, threads=threads)
    return session, lambda feeds: session.run(None, feeds)


def _load_in_openvino(
    model: Path | bytes, label: object, threads: int
) -> tuple[Any, Callable[[Any], object]]:
    compiled = openvino_compiled(_WHO, model, label, threads)
    return compiled, compiled.create_infer_request().infer


_ENGINE_CALLS = {
    "onnxruntime": _EngineCalls(
        "onnxruntime",
        _load_in_onnxruntime,
        lambda _, packages, proto, file, path: layers_in_onnxruntime(
            _WHO, packages, proto, file, path
        ),
    ),
    "openvino": _EngineCalls(
        "OpenVINO",
        _load_in_openvino,
        lambda compiled, packages, proto, *_: openvino_layers(compiled, packages, proto),
    ),
}
