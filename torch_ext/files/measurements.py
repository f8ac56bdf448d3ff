"""The checkpoint of a long run of measurements, which an interrupted run continues from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_ext.files.quantizer_params import spec_of
from torch_ext.files.storage import (
    FileError,
    PathLike,
    delete_checkpoint,
    read_object,
    write_atomically,
)
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.arguments import bounded
from torch_ext.utils.batches import digest

_VERSION = 1
_SAME = 1e-6  # relative difference of numbers that count as equal: sums may differ in their order


def fingerprint(prepared: PreparedModel, *more: object) -> str:
    """A digest of the model's tensors, its quantizers' settings, and what else a run depends on.

    `more` are values that JSON can hold. The result is SHA-256 as 64 hexadecimal digits.
    """
    specs = {name: spec_of(quantizer) for name, quantizer in prepared.quantizers.items()}
    text = json.dumps([digest(prepared.root.state_dict()), specs, *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Results:
    """Measured numbers by label, kept in a file if there is a path.

    The first number, that of the float model, is measured in every run and compared with the file's
    number, to notice a file of other data or another metric.

    Args:
        who: the public function, for errors; also stored in the file.
        path: the file, read here if it exists; None keeps the numbers in memory.
        about: :func:`fingerprint` of the model and the arguments.

    Raises:
        FileError: a ValueError, for a file of another model, of other arguments, or a damaged one.
    """

    def __init__(self, who: str, path: PathLike | None, about: str) -> None:
        self._who = who
        self._path = path
        self._about = about
        self._values: dict[str, float] = {}
        if path is not None and Path(path).exists():
            self._values = self._read(path)
        self._checked = False

    def measure(self, label: str, compute: Callable[[], object]) -> float:
        """Returns the number of a label: from the file, or else computed and written to it.

        Raises:
            ValueError: if the first number differs from that in the file.
            TypeError: if `compute` returns no number.
        """
        known = self._values.get(label)
        if known is not None and self._checked:
            return known
        value = self._number(label, compute())
        if known is not None and not _same(known, value):
            raise ValueError(
                f"{self._who}: expected {label} to be {known:g} as in the checkpoint, got "
                f"{value:g}: the checkpoint is of other data or another metric; remove {self._path}"
            )
        self._checked = True
        self._values[label] = value
        if self._path is not None:
            content = {
                "kind": self._who,
                "version": _VERSION,
                "about": self._about,
                "values": {name: repr(number) for name, number in self._values.items()},
            }
            write_atomically(self._path, json.dumps(content, indent=1).encode())
        return value

    def finish(self) -> None:
        """Deletes the file, at the end of a complete run."""
        if self._path is not None:
            delete_checkpoint(self._who, self._path)

    def _number(self, label: str, value: Any) -> float:
        if not isinstance(value, (str, bytes)):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                return float(value)
        raise TypeError(
            f"{self._who}: expected the metric of {label} to be a number, got {bounded(value)}"
        )

    def _read(self, path: PathLike) -> dict[str, float]:
        content = read_object(path)
        for key, want in (("kind", self._who), ("version", _VERSION)):
            if content.get(key) != want:
                raise FileError(path, f"{key}: expected {want!r}, got {content.get(key)!r}")
        if content.get("about") != self._about:
            raise FileError(
                path, "about: the file is of another model, other ranges or other arguments"
            )
        values = content.get("values")
        if not isinstance(values, dict):
            raise FileError(path, "values: expected an object")
        try:
            return {name: float(_text(value)) for name, value in values.items()}
        except ValueError as error:
            raise FileError(path, f"values: {error}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected numbers as text, got {bounded(value)}")
    return value


def _same(left: float, right: float) -> bool:
    if math.isfinite(left) and math.isfinite(right):
        return abs(left - right) <= _SAME * max(abs(left), abs(right))
    return repr(left) == repr(right)
