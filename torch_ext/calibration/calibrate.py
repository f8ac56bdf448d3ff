"""Runs a model over calibration data: progress, checkpoints, resuming, and a summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.calibration.checkpoint import Progress, read_progress, write_progress
from torch_ext.files.storage import PathLike, discard_partials
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.restore import restored_on_error, watched
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState, StateName, parse_state
from torch_ext.utils.arguments import bounded, check_callable, parse_flag
from torch_ext.utils.batches import (
    Forward,
    check_batches,
    default_forward,
    digest,
    model_device,
    sample_count,
    to_device,
)
from torch_ext.utils.modes import autocasting, eval_mode, forked_rng
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import shown, text_table

_WHO = "calibrate"


@dataclass(frozen=True)
class QuantizerSummary:
    """What one quantizer saw."""

    finite: int
    zeros: int
    tiny: int
    infinite: int
    nan: int
    minimum: float
    maximum: float


@dataclass(frozen=True)
class CalibrationSummary:
    """What a calibration did; printed, a table."""

    batches: int
    samples: int
    resumed_from: int  # batches taken over from a checkpoint
    seconds: float
    quantizers: dict[str, QuantizerSummary] = field(repr=False)
    unobserved: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            [
                name,
                *map(str, (q.finite, q.zeros, q.infinite, q.nan)),
                f"{q.minimum:.6g}",
                f"{q.maximum:.6g}",
            ]
            for name, q in self.quantizers.items()
        ]
        text = f"{self.batches} batches, {self.samples} samples, {self.seconds:.1f} s\n"
        text += text_table(("quantizer", "finite", "zeros", "inf", "nan", "min", "max"), rows)
        if self.unobserved:
            text += f"\nsaw no data: {shown(list(self.unobserved), 1000)}"
        return text


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | bool | None = None,
    progress: bool | None = None,
    limit: int | None = None,
    fresh: bool = True,
    checkpoint: PathLike | None = None,
    every: int = 16,
    state: FakeQuantState | StateName = FakeQuantState.VALIDATION,
    allow_unobserved: bool = False,
) -> CalibrationSummary:
    """Observes the loader's batches in CALIBRATION and leaves it, which solves every quantizer.

    Runs without gradients and with all modules in eval mode; afterwards the modes and torch's
    random state are what they were. When anything fails, statistics and states are too.

    Args:
        loader: batches; a tensor, a tuple or list whose first entry is the input, or a mapping
            of keyword arguments.
        forward: called with model and batch instead, for batches of another kind.
        device: where batches go; by default to the model's first parameter.
        autocast: True, or the dtype to compute in.
        progress: a bar; by default where standard error is a terminal.
        limit: stop after this many batches.
        fresh: forget what was observed before.
        checkpoint: a file that keeps the statistics, written after each ``every`` batches. Where it
            exists, calibration goes on from it: the batches that it holds are skipped, and the
            result is bit for bit that of an uninterrupted run. The loader has to give the same
            batches again; torch's random state is restored for it, and the last batch skipped
            is compared. Deleted at the end. It belongs to one process: each rank needs its own.
        state: the state to leave in.
        allow_unobserved: as in ``set_fake_quantize``.
    """
    quantizers = PreparedModel(_WHO, model).quantizers
    target = parse_state(_WHO, state)
    check_batches(_WHO, "loader", loader)
    check_callable(_WHO, "forward", forward)
    for name, flag in (("fresh", fresh), ("allow_unobserved", allow_unobserved)):
        parse_flag(_WHO, name, flag)
    _check_count("limit", limit)
    _check_count("every", every)
    where = model_device(_WHO, model, device)
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored_on_error(quantizers))
        stack.enter_context(eval_mode(model))
        stack.enter_context(forked_rng(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocasting(autocast, where))
        if fresh:
            for quantizer in quantizers.values():
                quantizer.observer.reset_()
        run = _CalibrationRun(model, quantizers, forward or default_forward(_WHO), where)
        resumed = run.resume(checkpoint) if checkpoint is not None else 0
        for quantizer in quantizers.values():
            quantizer.enter(FakeQuantState.CALIBRATION)
        with watched(_WHO, model):
            for batch in _bar(_limited(loader, limit), loader, limit, progress):
                ran = run.step(batch)
                if ran and checkpoint is not None and run.batches % every == 0:
                    run.save(checkpoint, batch)
        run.finish()
        if target is not FakeQuantState.CALIBRATION:
            change_states(_WHO, model, target, allow_unobserved=allow_unobserved)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    summary = _summaries(quantizers)
    return CalibrationSummary(
        batches=run.batches,
        samples=run.samples,
        resumed_from=resumed,
        seconds=time.perf_counter() - begun,
        quantizers=summary,
        unobserved=tuple(
            name
            for name, quantizer in run.observed.items()
            if quantizer.observer.statistic != "none" and summary[name].finite == 0
        ),
    )


class _CalibrationRun:
    """The batches of one calibration, counted."""

    def __init__(
        self,
        model: nn.Module,
        quantizers: Mapping[str, FakeQuantize],
        forward: Forward,
        device: torch.device,
    ) -> None:
        self.model = model
        self.observed = {n: q for n, q in quantizers.items() if not q.transient}
        self.forward = forward
        self.device = device
        self.batches = self.samples = self.skipped = 0
        self.held: Progress | None = None
        self.rng_state = torch.get_rng_state()

    def resume(self, path: PathLike) -> int:
        discard_partials(path)
        self.held = read_progress(path, self.observed)
        if self.held is None:
            return 0
        self.rng_state = self.held.rng_state
        torch.set_rng_state(self.rng_state)
        self.batches, self.samples = self.held.batches, self.held.samples
        return self.batches

    def step(self, batch: Any) -> bool:
        """Runs a batch, or skips one that the checkpoint holds; whether it ran."""
        if self.held is not None and self.skipped < self.held.batches:
            self.skipped += 1
            if self.skipped == self.held.batches and digest(batch) != self.held.last_digest:
                raise ValueError(
                    f"{_WHO}: expected batch {self.skipped} to be the one of the checkpoint, got "
                    "another: the loader's batches differ from those of the interrupted run"
                )
            return False
        self.forward(self.model, to_device(batch, self.device))
        self.batches += 1
        self.samples += sample_count(batch)
        return True

    def save(self, path: PathLike, batch: Any) -> None:
        made = Progress(self.batches, self.samples, digest(batch), self.rng_state)
        write_progress(path, self.observed, made)

    def finish(self) -> None:
        if self.held is not None and self.skipped < self.held.batches:
            raise ValueError(
                f"{_WHO}: expected the loader to give at least the {self.held.batches} batches "
                f"of the checkpoint, got {self.skipped}"
            )
        if self.batches == 0:
            raise ValueError(f"{_WHO}: expected the loader to give batches, got none")


def _check_count(name: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_WHO}: expected {name} to be a number of batches, got {bounded(value)}")
    if value < 1:
        raise ValueError(f"{_WHO}: expected {name} to be 1 or more, got {value}")


def _limited(loader: Iterable[Any], limit: int | None) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        yield batch
        if limit is not None and index + 1 >= limit:
            return


def _bar(
    batches: Iterator[Any], loader: Iterable[Any], limit: int | None, progress: bool | None
) -> Iterable[Any]:
    total = None
    with contextlib.suppress(TypeError):
        total = len(loader)  # type: ignore[arg-type]
    if total is not None and limit is not None:
        total = min(total, limit)
    return progress_bar(batches, limit if total is None else total, _WHO, progress)


def _summaries(quantizers: Mapping[str, FakeQuantize]) -> dict[str, QuantizerSummary]:
    found = {}
    for name, quantizer in quantizers.items():
        observer = quantizer.observer
        tally: Tensor = observer.tally.sum(0)
        low, high = float(observer.extrema[:, 0].min()), float(observer.extrema[:, 1].max())
        finite, zeros, tiny, infinite, nan = (int(count) for count in tally.tolist())
        found[name] = QuantizerSummary(finite, zeros, tiny, infinite, nan, low, high)
    return found
