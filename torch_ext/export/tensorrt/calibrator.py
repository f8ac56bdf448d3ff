"""A calibrator for the builder of TensorRT up to 10, which hands over our scales."""

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
    """TensorRT's numbers, for where the package tensorrt is not installed."""

    ENTROPY_CALIBRATION_2 = 2
    MINMAX_CALIBRATION = 3


# Algorithm of a cache -> its member of CalibrationAlgoType, and the class to be an instance of.
_KINDS = {
    "EntropyCalibration2": ("ENTROPY_CALIBRATION_2", "IInt8EntropyCalibrator2"),
    "MinMaxCalibration": ("MINMAX_CALIBRATION", "IInt8MinMaxCalibrator"),
}


class TensorrtCalibrator:
    """Has the methods that the builder calls: it reads the cache, and needs no batch."""

    def __init__(self, cache: bytes, path: Path | None, algorithm: Any) -> None:
        self._cache = cache
        self._path = path
        self._algorithm = algorithm

    def get_batch_size(self) -> int:
        return 1

    def get_batch(self, names: Sequence[str], *_: Any) -> None:
        """No batch: there is nothing left to calibrate."""
        return None

    def read_calibration_cache(self) -> bytes:
        return self._cache

    def write_calibration_cache(self, cache: Any) -> None:
        """Takes back what was handed over; other scales would be those of no data at all.

        Raises ValueError: the builder calibrated, so it is of another version or algorithm.
        """
        given = bytes(cache)
        have, want = (parse_cache("<cache>", data).scales for data in (given, self._cache))
        if have != want:
            raise ValueError(
                f"{_WHO}: expected TensorRT to hand back the cache it read, got other scales: it "
                "took the cache for that of another version or algorithm"
            )
        if self._path is not None:
            write_atomically(self._path, given)

    def get_algorithm(self) -> Any:
        return self._algorithm


def tensorrt_calibrator(
    model: nn.Module,
    path: PathLike | None = None,
    version: str | None = None,
    algorithm: str = "EntropyCalibration2",
    names: Names = None,
) -> TensorrtCalibrator:
    """A calibrator for ``config.int8_calibrator``, so that the builder uses the model's scales.

    Where the package tensorrt is installed it is an instance of its calibrator class. All else is
    as for :func:`tensorrt_cache`; everything is checked here, and nothing when the builder calls.

    Args:
        path: a file to keep the cache in: written here, unless it is there already. A file with
            other scales, of another version or algorithm is refused, as the builder would use
            these: remove it, or take another path. None keeps the cache in memory.

    Raises:
        ValueError: as :func:`tensorrt_cache`, or for a file that holds another cache.
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
    if not target.exists():
        write_atomically(target, cache)
        return
    have, want = read_tensorrt_cache(target), parse_cache("<cache>", cache)
    if have == want:
        return
    names = dict.fromkeys((*want.scales, *have.scales))
    other = [name for name in names if have.scales.get(name) != want.scales.get(name)]
    what = f"scales, first of {other[0]!r}" if other else f"{have.version} {have.algorithm}"
    raise ValueError(
        f"{_WHO}: expected {target} to hold this model's cache or not to exist, got other {what}; "
        "remove it, or pass another path"
    )


def _as_tensorrt(
    package: Any, algorithm: str, cache: bytes, target: Path | None
) -> TensorrtCalibrator:
    member, name = _KINDS[algorithm]
    base: Any = getattr(package, name, None)
    if base is None:
        raise ValueError(
            f"{_WHO}: expected the installed tensorrt to have {name}, got {package.__version__}, "
            'which has no calibrators; take export.onnx(..., profile="tensorrt")'
        )

    class Calibrator(TensorrtCalibrator, base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the bindings refuse objects without it
            kind = getattr(package.CalibrationAlgoType, member)
            TensorrtCalibrator.__init__(self, cache, target, kind)

    return Calibrator()
