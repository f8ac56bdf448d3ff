"""The checkpoint of a correction: what it made of each layer so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torch_ext.files.storage import (
    FileError,
    PathLike,
    delete_checkpoint,
    discard_partials,
    read_tensors,
    write_tensors,
)

_VERSION = 1
_AS_INTEGERS = torch.float64  # which files do not hold; its bits are kept as int64


class LayerCheckpoint:
    """Tensors by layer, kept in a file if there is a path; an interrupted run goes on from it.

    Args:
        who: the public function, for errors; also stored in the file.
        path: the file, read here if it exists; None keeps nothing.
        about: ``fingerprint`` of the model, the data and the arguments.

    Raises:
        FileError: a ValueError, for a file of another model, of other data, or a damaged one.
    """

    def __init__(self, who: str, path: PathLike | None, about: str) -> None:
        self._who, self._path, self._about = who, path, about
        self._tensors: dict[str, Tensor] = {}
        if path is not None:
            discard_partials(path)
            if Path(path).exists():
                self._tensors = self._read(path)

    def get(self, layer: str, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of a layer; None if the file has none.

        Args:
            layer: its name.
            like: a tensor of the shape, dtype and device of each.

        Raises:
            FileError: a tensor is missing, or of another shape or dtype.
        """
        if self._path is None or not any(f"{layer}/{key}" in self._tensors for key in like):
            return None
        found = {}
        for key, want in like.items():
            name = f"{layer}/{key}"
            stored = torch.int64 if want.dtype is _AS_INTEGERS else want.dtype
            have = self._tensors.get(name)
            if have is None or have.shape != want.shape or have.dtype != stored:
                raise FileError(
                    self._path, f"{name}: expected {stored} of shape {list(want.shape)}"
                )
            found[key] = have.view(want.dtype).to(want.device)
        return found

    def put(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds the tensors of a layer, float64, float32 or integers, and writes the file."""
        if self._path is None:
            return
        for key, tensor in tensors.items():
            plain = tensor.detach().cpu().contiguous()
            if plain.dtype is _AS_INTEGERS:
                plain = plain.view(torch.int64)
            self._tensors[f"{layer}/{key}"] = plain
        write_tensors(self._path, self._tensors, self._who, _VERSION, {"about": self._about})

    def finish(self) -> None:
        """Deletes the file, at the end of a complete run."""
        if self._path is not None:
            delete_checkpoint(self._who, self._path)

    def _read(self, path: PathLike) -> dict[str, Tensor]:
        tensors, content = read_tensors(path, self._who, _VERSION)
        if not isinstance(content, dict) or content.get("about") != self._about:
            raise FileError(
                path, "about: the file is of another model, other data or other arguments"
            )
        return tensors
