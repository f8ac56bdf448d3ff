"""Optional packages that only exports need, imported when an export is called."""

from __future__ import annotations

from typing import Any


def onnx_packages(who: str) -> Any:
    """The package onnx; raises ImportError without it or onnxscript, which torch.onnx needs."""
    try:
        import onnx
        import onnx.checker
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{who}: needs the packages onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    return onnx
