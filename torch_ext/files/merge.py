"""Files of several machines as that of one run over all their data."""

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
    """What :func:`merge_observer_params` did."""

    path: str
    files: tuple[str, ...]
    again: tuple[str, ...]  # files whose data, that of all ranks, was in another one already
    quantizers: int
    unsolved: tuple[str, ...]  # without a range

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.quantizers} quantizers from {len(self.files)} files"]
        lines += [f"  counted once, as another rank's: {file}" for file in self.again]
        lines += [f"  without a range: {label_of(name)}" for name in self.unsolved]
        return "\n".join(lines)


def merge_observer_params(
    paths: Sequence[PathLike], path: PathLike, progress: bool | None = None
) -> MergeReport:
    """Joins files of several machines in one: that of a single run which saw all their data.

    Every machine calibrates the same model with a part of the data, and saves. The statistics are
    added up and solved again, bit for bit as one run's, in whatever order the files are given;
    quantizers that have no range in any file stay without. Weights and given scales have to be
    equal in all files. Files that ``sync_observers`` made hold the data of all their ranks: those
    of one run count once.

    Args:
        paths: two or more files of ``save_observer_params``.
        path: the new file, which appears complete or not at all.
        progress: a bar; by default where standard error is a terminal.

    Raises ValueError, with file and quantizer: for files of other models or configurations, a file
    given twice, a file of all ranks beside one of a single process, whose data may be in it
    already, and ranges that are not what the statistic gives (trained since, or loaded).
    """
    files = [os.fspath(one) for one in paths]
    _check_files(files)
    merged: dict[str, FakeQuantize] = {}
    has_range: set[str] = set()
    seen: dict[str, bool] = {}  # a file's data -> whether it is that of all ranks
    again = []
    for file in progress_bar(files, len(files), "merge", progress):
        model = read_quantizers(file)
        found = named_quantizers(model)
        _check_ranges(file, found)
        data, synced = _data_of(found), any(q.observer.synced for q in found.values())
        if seen and synced not in seen.values():
            kinds = ("of one process", "of all ranks")
            raise FileError(
                file,
                f"synced: expected the data {kinds[not synced]} as in {files[0]}, got that "
                f"{kinds[synced]}, which may hold the other's",
            )
        if merged:
            _check_same(file, files[0], found, merged)
        if synced and data in seen:
            again.append(file)
        elif merged:
            _add(merged, found)
        else:
            merged, result = found, model
        seen[data] = synced
        has_range |= {name for name, quantizer in found.items() if bool(quantizer.solved)}
    _solve({name: q for name, q in merged.items() if name in has_range and q.accumulates_data})
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


def _check_ranges(file: str, found: Mapping[str, FakeQuantize]) -> None:
    """Refuses ranges that solving the statistics again would lose."""
    chosen = {n: q for n, q in found.items() if q.accumulates_data and bool(q.solved)}
    before = {name: _copies(quantizer) for name, quantizer in chosen.items()}
    _solve(chosen)
    for name, quantizer in chosen.items():
        if not quantizer.observer.saw_data or not _equal(before[name], _copies(quantizer)):
            raise FileError(
                file,
                f"{label_of(name)}.range: expected what {quantizer.observer.name} gives of the "
                "statistic, got another, trained since or loaded: merge files of calibrations",
            )


def _copies(quantizer: FakeQuantize) -> dict[str, Tensor]:
    return {field: value.clone() for field, value in tensors_of(quantizer).items()}


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, right[field]) for field, value in left.items())


def _data_of(found: Mapping[str, FakeQuantize]) -> str:
    """The same for the same statistics."""
    digest = hashlib.sha256()
    for name, quantizer in sorted(found.items()):
        digest.update(name.encode())
        for field in STATISTIC:
            digest.update(quantizer.get_buffer(field).numpy().tobytes())
    return digest.hexdigest()


def _check_same(
    file: str, first: str, found: Mapping[str, FakeQuantize], merged: Mapping[str, FakeQuantize]
) -> None:
    if found.keys() != merged.keys():
        other = ", ".join(sorted(found.keys() ^ merged.keys())[:10])
        raise FileError(file, f"quantizers: of another model than {first}: differs in {other}")
    for name, quantizer in found.items():
        theirs, ours = spec_of(quantizer), spec_of(merged[name])
        for key, value in ours.items():
            if theirs.get(key) != value:
                have = theirs.get(key)
                raise FileError(
                    file, f"{name}.{key}: expected {value!r} as in {first}, got {bounded(have)}"
                )
        if not quantizer.accumulates_data:
            mine, own = tensors_of(merged[name]), tensors_of(quantizer)
            for field, value in mine.items():
                if not torch.equal(value, own[field]):
                    raise FileError(
                        file,
                        f"{name}.{field}: expected the values of {first}, got others: was it of "
                        "the same weights?",
                    )


def _add(merged: Mapping[str, FakeQuantize], found: Mapping[str, FakeQuantize]) -> None:
    for name, quantizer in found.items():
        if quantizer.accumulates_data:
            merged[name].observer.merge_(quantizer.observer)
