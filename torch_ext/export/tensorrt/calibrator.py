"""A calibrator for the builder of TensorRT, up to TensorRT 10, that returns our scales."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torch_ext.export.common.entries import check_path
from torch_ext.export.common.network_names import Names
from torch_ext.export.tensorrt.cache import cache_text, parse_cache, read_tensorrt_cache
from torch_ext.files.storage import PathLike, write_atomically

_WHO = "export.tensorrt_calibrator"


class CalibrationAlgorithm(enum.IntEnum):
    """The values of TensorRT's enumeration, used if the package tensorrt is not installed."""

    ENTROPY_CALIBRATION_2 = 2
    MINMAX_CALIBRATION = 3


# A cache's algorithm -> its member of tensorrt.CalibrationAlgoType, and its calibrator class.
_KINDS = {
    "EntropyCalibration2": ("ENTROPY_CALIBRATION_2", "IInt8EntropyCalibrator2"),
    "MinMaxCalibration": ("MINMAX_CALIBRATION", "IInt8MinMaxCalibrator"),
}


class TensorrtCalibrator:
    """A calibrator that gives the builder a cache and no batches; the builder calls its methods.

    Made by :func:`tensorrt_calibrator`.
    """

    def __init__(self, cache: bytes, path: Path | None, algorithm: Any) -> None:
        self._cache = cache
        self._path = path
        self._algorithm = algorithm

    def get_batch_size(self) -> int:
        """1; the builder asks for it, although it gets no batch."""
        return 1

    def get_batch(self, names: Sequence[str], *_: Any) -> None:
        """Returns None, which means that there are no batches."""
        return None

    def read_calibration_cache(self) -> bytes:
        """The cache, as a file of :func:`tensorrt_cache` holds it."""
        return self._cache

    def write_calibration_cache(self, cache: Any) -> None:
        """Takes the cache that the builder used, and writes it to the calibrator's file.

        Raises:
            ValueError: if the builder calibrated again: without batches its scales mean nothing.
        """
        used = bytes(cache)
        have, want = (parse_cache("<cache>", data).scales for data in (used, self._cache))
        if have != want:
            raise ValueError(
                f"{_WHO}: expected TensorRT to return the cache it read, got other scales: it "
                "calibrated again, as it is of another version or uses another algorithm"
            )
        if self._path is not None:
            write_atomically(self._path, used)

    def get_algorithm(self) -> Any:
        """TensorRT's ``CalibrationAlgoType``; an integer of the same value without the package."""
        return self._algorithm


def tensorrt_calibrator(
    model: nn.Module,
    path: PathLike | None = None,
    version: str | None = None,
    algorithm: str = "EntropyCalibration2",
    names: Names = None,
) -> TensorrtCalibrator:
    """A calibrator for ``config.int8_calibrator``, so that the builder uses the model's scales.

    If the package tensorrt is installed, the result is an instance of its calibrator class. Model,
    scales and names are checked here, before the builder runs.

    Args:
        model: calibrated, in VALIDATION.
        path: a file to keep the cache in, written here unless it exists already with the same
            cache. None (default) keeps the cache in memory.
        version, algorithm, names: as for :func:`tensorrt_cache`.

    Raises:
        ValueError: as :func:`tensorrt_cache`; for a file with other scales, another version or
            another algorithm; for an installed tensorrt without calibrators.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    target = None if path is None else check_path(_WHO, path, None)
    text, _ = cache_text(_WHO, model, version, algorithm, names)
    cache = text.encode()
    if target is not None:
        _keep(target, cache)
    try:
        import tensorrt
    except ImportError:
        kind = CalibrationAlgorithm[_KINDS[algorithm][0]]
        return TensorrtCalibrator(cache, target, kind)
    return _as_tensorrt(tensorrt, algorithm, cache, target)


def _keep(target: Path, cache: bytes) -> None:
    """Writes the cache unless the file holds it; raises ValueError for a file with another one."""
    if not target.exists():
        write_atomically(target, cache)
        return
    have, want = read_tensorrt_cache(target), parse_cache("<cache>", cache)
    if have == want:
        return
    names = dict.fromkeys((*want.scales, *have.scales))
    other = [name for name in names if have.scales.get(name) != want.scales.get(name)]
    problem = (
        f"other scales, first of {other[0]!r}"
        if other
        else f"a cache of {have.version} {have.algorithm}"
    )
    raise ValueError(
        f"{_WHO}: expected {target} to hold this model's cache or not to exist, got {problem}; "
        "remove it, or pass another path"
    )


def _as_tensorrt(
    package: Any, algorithm: str, cache: bytes, target: Path | None
) -> TensorrtCalibrator:
    """A calibrator that is an instance of the package's class too, which the builder checks."""
    member, name = _KINDS[algorithm]
    base: Any = getattr(package, name, None)
    if base is None:
        raise ValueError(
            f"{_WHO}: expected the installed tensorrt to have {name}, got {package.__version__}, "
            'which has no calibrators; take export.onnx(..., profile="tensorrt")'
        )

    class Calibrator(TensorrtCalibrator, base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the bindings reject objects whose base was not initialised
            kind = getattr(package.CalibrationAlgoType, member)
            TensorrtCalibrator.__init__(self, cache, target, kind)

    return Calibrator()
