"""Packages that only an export needs, imported when it is used."""

from __future__ import annotations

from typing import Any


def onnx_packages(who: str) -> Any:
    """The package onnx; onnxscript, which torch.onnx needs, is there too."""
    try:
        import onnx
        import onnx.checker
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{who}: needs the packages onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    return onnx
