"""The checkpoint of a reconstruction: the weights of the layers that are finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_ext.files.storage import FileError, PathLike, read_tensors, write_tensors

_VERSION = 1
_Numbers = tuple[float, float, float]


class RoundedWeights:
    """Weights and numbers of finished layers, kept in a file if there is a path.

    Args:
        who: the public function; stored in the file.
        path: the file, read here if it exists; None keeps nothing.
        about: texts that tell model, data and arguments from others.

    Attributes:
        found: what the file has, by layer.

    Raises:
        FileError: a ValueError, for a file of another run, or a damaged one.
    """

    def __init__(self, who: str, path: PathLike | None, about: Sequence[str]) -> None:
        self._who = who
        self._path = path
        self._about = hashlib.sha256(json.dumps(list(about)).encode()).hexdigest()
        self._weights: dict[str, Tensor] = {}
        self._numbers: dict[str, _Numbers] = {}
        if path is not None and Path(path).exists():
            self._read(path)
        self.found = {n: (self._weights[n], numbers) for n, numbers in self._numbers.items()}

    def add(self, name: str, weight: Tensor, numbers: _Numbers) -> None:
        """Adds a layer and writes the file."""
        if self._path is None:
            return
        # Files have no float64; the values are small integers times a float32 scale.
        self._weights[name] = weight.detach().to("cpu", torch.float32, copy=True)
        self._numbers[name] = numbers
        content = {"about": self._about, "layers": self._numbers}
        write_tensors(self._path, self._weights, self._who, _VERSION, content)

    def finish(self) -> None:
        """Deletes the file, at the end of a complete run."""
        if self._path is not None:
            Path(self._path).unlink(missing_ok=True)

    def _read(self, path: PathLike) -> None:
        tensors, content = read_tensors(path, self._who, _VERSION)
        if not isinstance(content, dict) or content.get("about") != self._about:
            raise FileError(
                path,
                "about: the file is of another model, other ranges, data or arguments; remove it "
                "to start over",
            )
        layers = content.get("layers")
        if not isinstance(layers, dict) or layers.keys() != tensors.keys():
            raise FileError(path, "layers: expected the names of the weights")
        for name, numbers in layers.items():
            if tensors[name].dtype != torch.float32 or not bool(tensors[name].isfinite().all()):
                raise FileError(path, f"{name}: expected finite float32 values")
            self._numbers[name] = _parsed(path, name, numbers)
        self._weights = tensors


def _parsed(path: PathLike, name: str, numbers: Any) -> _Numbers:
    valid = isinstance(numbers, list) and len(numbers) == 3
    if not valid or not all(isinstance(n, float) and math.isfinite(n) for n in numbers):
        raise FileError(path, f"layers: expected three numbers for {name}")
    before, after, changed = numbers
    return before, after, changed
