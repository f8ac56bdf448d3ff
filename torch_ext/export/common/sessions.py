"""Loads ONNX files in onnxruntime, and says what to do about those that it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch_ext.export.common.packages import onnxruntime_package
from torch_ext.files.storage import PathLike

# What onnxruntime says of a file -> the way out.
_ADVICE = {
    r"output_dtype \w+ does not match|qdqisint8allowed": (
        "int8 activations beside MaxPool need an opset below 21, or uint8 affine ones"
    ),
    r"[Oo]pset (\d+) is under development|ONNX Runtime only \*guarantees\*": (
        "export with a lower opset, or install a newer onnxruntime"
    ),
    r"NOT_IMPLEMENTED|Could not find an implementation": (
        "give the layer that it names a grid of 8 bits, or leave it out of the quantization"
    ),
}


def onnxruntime_session(
    who: str,
    model: PathLike | bytes,
    label: object,
    *,
    level: str = "ORT_ENABLE_ALL",
    threads: int = 1,
    save: Path | None = None,
    entries: Mapping[str, str] | None = None,
) -> Any:
    """A session on the CPU.

    Args:
        who: the function that errors name.
        model: a file, or a ModelProto as bytes.
        label: what errors call the model, such as its path.
        level: name of a ``GraphOptimizationLevel``.
        threads: of each operator.
        save: where the optimised graph is written.
        entries: further settings of the session.

    Raises:
        ImportError: without onnxruntime.
        ValueError: onnxruntime does not load the model; with its reason and a way out.
    """
    onnxruntime = onnxruntime_package(who)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if save is not None:
        options.optimized_model_filepath = str(save)
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    given = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has classes of its own, without a common base
        raise ValueError(
            f"{who}: expected {label} to be a model that onnxruntime {onnxruntime.__version__} "
            f"loads, got its error: {str(error).strip()[:1500]}{advice_for(str(error))}"
        ) from error


def advice_for(message: str) -> str:
    """The way out of an engine's error, for the end of a message; empty if none is known."""
    for pattern, advice in _ADVICE.items():
        if re.search(pattern, message):
            return f"; {advice}"
    return ""
