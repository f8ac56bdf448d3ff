"""Merges the files of several machines into the file of a single run over all their data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_ext.files.observer_params import save_observer_params
from torch_ext.files.quantizer_params import STATISTIC, spec_of, tensors_of
from torch_ext.files.saved_quantizers import read_quantizers
from torch_ext.files.storage import FileError, PathLike
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import named_quantizers
from torch_ext.quantizers.solve import solve_observers
from torch_ext.utils.arguments import bounded
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import label_of

_WHO = "merge_observer_params"


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_observer_params` did. ``str()`` gives a summary."""

    #: The new file.
    path: str
    #: The files that were merged.
    files: tuple[str, ...]
    #: Files that were skipped, as another file held their data, that of all ranks, already.
    again: tuple[str, ...]
    #: Number of quantizers.
    quantizers: int
    #: Names of quantizers without a range.
    unsolved: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.quantizers} quantizers from {len(self.files)} files"]
        lines += [f"  skipped, its data is in another rank's file: {file}" for file in self.again]
        lines += [f"  without a range: {label_of(name)}" for name in self.unsolved]
        return "\n".join(lines)


def merge_observer_params(
    paths: Sequence[PathLike], path: PathLike, progress: bool | None = None
) -> MergeReport:
    """Merges files of several machines into the file of a single run that saw all their data.

    Every machine calibrates the same model with a part of the data, and saves. The statistics are
    added and solved again; the result is that of a single run, bit for bit, in whatever order the
    files are given. Quantizers without a range in every file stay without. Weight ranges and given
    scales have to be equal in all files. A file saved after ``sync_observers`` holds the data of
    all ranks; of several such files of one run only the first is counted.

    Args:
        paths: two or more files of :func:`save_observer_params`.
        path: the new file, which is written completely or not at all.
        progress: show a progress bar; None shows it if standard error is a terminal.

    Returns:
        What was merged, and what was skipped.

    Raises:
        ValueError: fewer than two files, or a file given twice.
        FileError: invalid contents; another model or configuration; a file of all ranks beside one
            of a single process, whose data it may include; or ranges that the statistic does not
            give, because the model was trained or loaded ranges since.
        OSError: a file that cannot be read or written.
    """
    files = [os.fspath(given) for given in paths]
    _check_files(files)
    merged: dict[str, FakeQuantize] = {}
    has_range: set[str] = set()
    seen: dict[str, bool] = {}  # digest of a file's statistics -> whether it is of all ranks
    again = []
    for file in progress_bar(files, len(files), "merge", progress):
        model = read_quantizers(file)
        quantizers = named_quantizers(model)
        _check_ranges(file, quantizers)
        data = _statistics_digest(quantizers)
        synced = any(quantizer.observer.synced for quantizer in quantizers.values())
        if seen and synced not in seen.values():
            kinds = ("of one process", "of all ranks")
            raise FileError(
                file,
                f"synced: expected the data {kinds[not synced]} as in {files[0]}, got that "
                f"{kinds[synced]}, which may hold the other's",
            )
        if merged:
            _check_same(file, files[0], quantizers, merged)
        if synced and data in seen:
            again.append(file)
        elif merged:
            _add(merged, quantizers)
        else:
            merged, result = quantizers, model
        seen[data] = synced
        has_range |= {name for name, quantizer in quantizers.items() if bool(quantizer.solved)}
    _solve(
        {
            name: quantizer
            for name, quantizer in merged.items()
            if name in has_range and quantizer.accumulates_data
        }
    )
    save_observer_params(result, path)
    unsolved = tuple(name for name in merged if name not in has_range)
    return MergeReport(os.fspath(path), tuple(files), tuple(again), len(merged), unsolved)


def _check_files(files: list[str]) -> None:
    if len(files) < 2:
        raise ValueError(f"{_WHO}: expected two or more files, got {len(files)}")
    for i, file in enumerate(files):
        for other in files[:i]:
            if os.path.samefile(file, other):
                raise ValueError(f"{_WHO}: expected every file once, got {other} and {file}")


@torch.no_grad()
def _solve(chosen: Mapping[str, FakeQuantize]) -> None:
    observers = {name: quantizer.observer for name, quantizer in chosen.items()}
    for name, solution in solve_observers(observers).items():
        chosen[name].take_(solution)


def _check_ranges(file: str, quantizers: Mapping[str, FakeQuantize]) -> None:
    """Raises FileError for ranges that the statistics do not give: merging would lose them."""
    chosen = {
        name: quantizer
        for name, quantizer in quantizers.items()
        if quantizer.accumulates_data and bool(quantizer.solved)
    }
    before = {name: _copies(quantizer) for name, quantizer in chosen.items()}
    _solve(chosen)
    for name, quantizer in chosen.items():
        if not quantizer.observer.saw_data or not _equal(before[name], _copies(quantizer)):
            raise FileError(
                file,
                f"{label_of(name)}.range: expected the range that {quantizer.observer.name} "
                "computes from the statistic, got another, trained or loaded since; merge files "
                "that were saved after a calibration",
            )


def _copies(quantizer: FakeQuantize) -> dict[str, Tensor]:
    return {field: value.clone() for field, value in tensors_of(quantizer).items()}


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, right[field]) for field, value in left.items())


def _statistics_digest(quantizers: Mapping[str, FakeQuantize]) -> str:
    """A SHA-256 of the quantizers' names and statistics."""
    digest = hashlib.sha256()
    for name, quantizer in sorted(quantizers.items()):
        digest.update(name.encode())
        for field in STATISTIC:
            digest.update(quantizer.get_buffer(field).numpy().tobytes())
    return digest.hexdigest()


def _check_same(
    file: str,
    first: str,
    quantizers: Mapping[str, FakeQuantize],
    merged: Mapping[str, FakeQuantize],
) -> None:
    """Raises FileError unless a file has the quantizers, keys and weight ranges of the first."""
    if quantizers.keys() != merged.keys():
        other = ", ".join(sorted(quantizers.keys() ^ merged.keys())[:10])
        raise FileError(file, f"quantizers: of another model than {first}: differs in {other}")
    for name, quantizer in quantizers.items():
        want_spec, have_spec = spec_of(merged[name]), spec_of(quantizer)
        for key in {**want_spec, **have_spec}:
            want = want_spec.get(key)
            if have_spec.get(key) != want:
                have = bounded(have_spec.get(key))
                raise FileError(file, f"{name}.{key}: expected {want!r} as in {first}, got {have}")
        if not quantizer.accumulates_data:
            want_tensors, have_tensors = tensors_of(merged[name]), tensors_of(quantizer)
            for field, tensor in want_tensors.items():
                if not torch.equal(tensor, have_tensors[field]):
                    raise FileError(
                        file,
                        f"{name}.{field}: expected the values of {first}, got others: were both "
                        "calibrated with the same weights?",
                    )


def _add(merged: Mapping[str, FakeQuantize], quantizers: Mapping[str, FakeQuantize]) -> None:
    for name, quantizer in quantizers.items():
        if quantizer.accumulates_data:
            merged[name].observer.merge_(quantizer.observer)
