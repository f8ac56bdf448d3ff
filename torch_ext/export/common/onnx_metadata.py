"""Reads the metadata about quantizers from an ONNX file of this package."""

from __future__ import annotations

import json
from typing import Any

from torch_ext.export.common.packages import load_onnx
from torch_ext.files.storage import FileError, PathLike

METADATA_KEY = "torch_ext"


def read_onnx_names(path: PathLike) -> dict[str, list[str]]:
    """The names of the tensors that each quantizer quantizes, from a file of :func:`onnx`.

    Raises FileError (a ValueError) for other files.
    """
    content = read_onnx_metadata(path)
    names: dict[str, list[str]] = {}
    for name, entry in content["quantizers"].items():
        tensors = entry.get("tensors") if isinstance(entry, dict) else None
        if not isinstance(tensors, list) or not all(isinstance(item, str) for item in tensors):
            raise FileError(path, f"metadata: {name[:80]}: expected names of tensors")
        names[name] = tensors
    return names


def read_onnx_metadata(path: PathLike) -> dict[str, Any]:
    """Reads what a file of :func:`onnx` says of its quantizers, from its metadata.

    Returns:
        A dict with ``version`` (1), ``torch_ext`` (the version that wrote it), ``profile``,
        ``left_out`` (reasons by quantizer's name), and ``quantizers``: by name a dict with
        ``tensors`` (names in the graph), ``type`` (``"int8"``), ``quant_min``, ``quant_max``,
        ``axis`` (-1: per tensor) and ``weight`` (whether it quantizes a weight).

    Raises:
        FileError: a ValueError, for a file that is not of :func:`onnx`.
        FileNotFoundError: if there is no such file.
        ImportError: if the packages onnx and onnxscript are missing.
    """
    _, proto = load_onnx("export.read_onnx_metadata", path, weights=False)
    text = next((prop.value for prop in proto.metadata_props if prop.key == METADATA_KEY), None)
    try:
        content = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"metadata: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("quantizers"), dict):
        raise FileError(path, "not a file of torch_ext.export.onnx: its metadata is missing")
    if content.get("version") != 1:
        raise FileError(path, f"metadata: this release reads version 1, got {content['version']!r}")
    return content
