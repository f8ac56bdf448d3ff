"""Optional packages that only exports need, imported when an export is called."""

from __future__ import annotations

from typing import Any

from torch_ext.files.storage import FileError, PathLike


def load_onnx(who: str, path: PathLike, weights: bool = True) -> tuple[Any, Any]:
    """The package onnx, and the ModelProto of a file.

    Args:
        who: the function that errors name.
        weights: read tensors that lie in files of their own, too.

    Raises:
        FileError: the file is not ONNX.
        OSError: it cannot be read.
        ImportError: without the packages onnx and onnxscript.
    """
    packages = onnx_packages(who)
    try:
        return packages, packages.load(str(path), load_external_data=weights)
    except OSError:
        raise
    except Exception as error:  # protobuf raises its own class of error
        raise FileError(path, f"not an ONNX file: {error}") from error


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


def onnxruntime_package(who: str) -> Any:
    """The package onnxruntime; raises ImportError without it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"{who}: needs the package onnxruntime: pip install onnxruntime"
        ) from error
    return onnxruntime
