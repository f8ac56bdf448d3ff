"""What an ONNX file of this package says of its quantizers."""

from __future__ import annotations

import json
from typing import Any

from torch_ext.export.common.packages import onnx_packages
from torch_ext.files.storage import FileError, PathLike

METADATA_KEY = "torch_ext"


def read_onnx_names(path: PathLike) -> dict[str, list[str]]:
    """The tensors that each quantizer quantizes, of a file of :func:`onnx`.

    Raises FileError (a ValueError) for other files.
    """
    content = read_onnx_metadata(path)
    found: dict[str, list[str]] = {}
    for name, entry in content["quantizers"].items():
        tensors = entry.get("tensors") if isinstance(entry, dict) else None
        if not isinstance(tensors, list) or not all(isinstance(one, str) for one in tensors):
            raise FileError(path, f"metadata: {name[:80]}: expected names of tensors")
        found[name] = tensors
    return found


def read_onnx_metadata(path: PathLike) -> dict[str, Any]:
    """What a file of :func:`onnx` says of its quantizers."""
    packages = onnx_packages("export.read_onnx_metadata")
    try:
        proto = packages.load(str(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf has an exception of its own
        raise FileError(path, f"not an ONNX file: {error}") from error
    text = next((one.value for one in proto.metadata_props if one.key == METADATA_KEY), None)
    try:
        content = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"metadata: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("quantizers"), dict):
        raise FileError(path, "not a file of torch_ext.export.onnx: its metadata is missing")
    if content.get("version") != 1:
        raise FileError(path, f"metadata: this release reads version 1, got {content['version']!r}")
    return content
