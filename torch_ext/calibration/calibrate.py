"""Runs a model over calibration data: progress, checkpoints, resuming, and a summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.calibration.checkpoint import Progress, read_progress, write_progress
from torch_ext.calibration.restore import one_call_at_a_time, restored_on_error, watched
from torch_ext.files.storage import PathLike, delete_checkpoint, discard_partials
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
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
    """The values that one quantizer has observed, over all its channels.

    With ``fresh=False`` these include the values of earlier calibrations.
    """

    #: Number of finite values, zeros and tiny ones among them.
    finite: int
    #: Number of exact zeros.
    zeros: int
    #: Number of non-zero values too small for the histogram; 0 where none is kept.
    tiny: int
    #: Number of infinite values; the range ignores them.
    infinite: int
    #: Number of NaN values; the range ignores them.
    nan: int
    #: Smallest finite value; ``inf`` if there was none.
    minimum: float
    #: Largest finite value; ``-inf`` if there was none.
    maximum: float


@dataclass(frozen=True)
class CalibrationSummary:
    """The result of :func:`calibrate`; ``str()`` gives a table."""

    #: Number of batches, those of a checkpoint included.
    batches: int
    #: Number of samples, which is the sum of the batches' first dimensions.
    samples: int
    #: Number of batches that came from a checkpoint and were not run again.
    resumed_from: int
    #: Wall-clock seconds of this call.
    seconds: float
    #: What each quantizer observed, by its name; without those whose scales are dynamic.
    quantizers: dict[str, QuantizerSummary] = field(repr=False)
    #: Names of the activation quantizers that saw no finite value.
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
    """Runs the loader's batches through the model in CALIBRATION, then solves every quantizer.

    Runs in eval mode and without gradients. Afterwards the modes of the modules and torch's random
    state are as before. If anything raises, statistics, ranges and states are restored too.

    Args:
        model: a prepared model, wrapped or not.
        loader: an iterable of batches. The model is called with the batch if that is a tensor,
            with the first entry of a tuple or list, with keyword arguments from a mapping.
        forward: called as ``forward(model, batch)`` instead, for other kinds of batches.
        device: where batches are moved; by default, the device of the model's first parameter.
        autocast: True, or the dtype to compute in; by default, no autocast.
        progress: whether to show a progress bar; by default, if standard error is a terminal.
        limit: stop after this many batches, a checkpoint's included; by default, use all.
        fresh: whether to reset the statistics first; False adds to them.
        checkpoint: a file for the statistics, written after every ``every`` batches and deleted
            at the end. If the file exists, calibration resumes from it: the batches it covers
            are skipped, and the result equals that of an uninterrupted run bit for bit. The loader
            has to give the same batches again, so torch's random state is restored before it is
            iterated, and the last skipped batch is compared. Each rank needs a file of its own.
        every: number of batches between two checkpoints.
        state: the state to set afterwards. With ``"calibration"`` nothing is solved yet.
        allow_unobserved: whether quantizers may have seen no data, as in
            :func:`set_fake_quantize`.

    Raises:
        TypeError: ``model`` is no module, ``loader`` no iterable of batches, or an argument has
            another type than expected.
        ValueError: the model has no quantizers, the loader gives no batches, a number is out of
            range, a state is unknown, or the checkpoint is damaged (:class:`FileError`) or belongs
            to another model or other batches.
        RuntimeError: a quantizer saw no data, in which case the message lists the names; or another
            call with this model still runs. Threads may share a model in its forward: see
            :func:`set_fake_quantize`.

    Warns:
        UserWarning: the forward wrote to parameters or buffers of the model.
    """
    prepared = PreparedModel(_WHO, model)
    quantizers = prepared.quantizers
    target = parse_state(_WHO, state)
    check_batches(_WHO, "loader", loader)
    check_callable(_WHO, "forward", forward)
    for name, flag in (("fresh", fresh), ("allow_unobserved", allow_unobserved)):
        parse_flag(_WHO, name, flag)
    _check_count("limit", limit)
    _check_count("every", every)
    batch_device = model_device(_WHO, model, device)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_call_at_a_time(_WHO, prepared.root))
        stack.enter_context(restored_on_error(quantizers))
        stack.enter_context(eval_mode(model))
        stack.enter_context(forked_rng(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocasting(autocast, batch_device))
        if fresh:
            for quantizer in quantizers.values():
                quantizer.observer.reset_()
        run = _CalibrationRun(model, quantizers, forward or default_forward(_WHO), batch_device)
        resumed = run.resume(checkpoint) if checkpoint is not None else 0
        for quantizer in quantizers.values():
            quantizer.enter(FakeQuantState.CALIBRATION)
        with watched(_WHO, model):
            for batch in _with_progress(_limited(loader, limit), loader, limit, progress):
                ran = run.step(batch)
                if ran and checkpoint is not None and run.batches % every == 0:
                    run.save(checkpoint, batch)
        run.finish()
        if target is not FakeQuantState.CALIBRATION:
            change_states(_WHO, model, target, allow_unobserved=allow_unobserved)
    if checkpoint is not None:
        delete_checkpoint(_WHO, checkpoint)
    summary = _summaries(quantizers)
    return CalibrationSummary(
        batches=run.batches,
        samples=run.samples,
        resumed_from=resumed,
        seconds=time.perf_counter() - start,
        quantizers=summary,
        unobserved=tuple(
            name
            for name, quantizer in run.observed.items()
            if quantizer.observer.statistic != "none" and summary[name].finite == 0
        ),
    )


class _CalibrationRun:
    """Runs, skips and counts the batches of one calibration."""

    def __init__(
        self,
        model: nn.Module,
        quantizers: Mapping[str, FakeQuantize],
        forward: Forward,
        device: torch.device,
    ) -> None:
        self.model = model
        self.observed = {n: q for n, q in quantizers.items() if not (q.transient or q.rangeless)}
        self.forward = forward
        self.device = device
        self.batches = self.samples = self.skipped = 0
        self.resumed: Progress | None = None
        self.rng_state = torch.get_rng_state()

    def resume(self, path: PathLike) -> int:
        """Loads a checkpoint if the file exists; returns the number of batches it covers."""
        discard_partials(path)
        self.resumed = read_progress(path, self.observed)
        if self.resumed is None:
            return 0
        self.rng_state = self.resumed.rng_state
        torch.set_rng_state(self.rng_state)
        self.batches, self.samples = self.resumed.batches, self.resumed.samples
        return self.batches

    def step(self, batch: Any) -> bool:
        """Runs a batch, or skips one that the checkpoint covers; returns whether it ran."""
        if self.resumed is not None and self.skipped < self.resumed.batches:
            self.skipped += 1
            if self.skipped == self.resumed.batches and digest(batch) != self.resumed.last_digest:
                raise ValueError(
                    f"{_WHO}: expected batch {self.skipped} to be the one of the checkpoint, got "
                    "another: the loader's batches differ from those of the interrupted run; "
                    "give the same again, or delete the file"
                )
            return False
        self.forward(self.model, to_device(batch, self.device))
        self.batches += 1
        self.samples += sample_count(batch)
        return True

    def save(self, path: PathLike, batch: Any) -> None:
        progress = Progress(self.batches, self.samples, digest(batch), self.rng_state)
        write_progress(path, self.observed, progress)

    def finish(self) -> None:
        """Raises ValueError if the loader gave no batches, or fewer than the checkpoint covers."""
        if self.resumed is not None and self.skipped < self.resumed.batches:
            raise ValueError(
                f"{_WHO}: expected the loader to give at least the {self.resumed.batches} batches "
                f"of the checkpoint, got {self.skipped}; give the same again, or delete the file"
            )
        if self.batches == 0:
            raise ValueError(
                f"{_WHO}: expected the loader to give batches, got none; an iterator gives them "
                "once: pass a list or a DataLoader"
            )


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


def _with_progress(
    batches: Iterator[Any], loader: Iterable[Any], limit: int | None, progress: bool | None
) -> Iterable[Any]:
    total = None
    with contextlib.suppress(TypeError):
        total = len(loader)  # type: ignore[arg-type]
    if total is not None and limit is not None:
        total = min(total, limit)
    return progress_bar(batches, limit if total is None else total, _WHO, progress)


def _summaries(quantizers: Mapping[str, FakeQuantize]) -> dict[str, QuantizerSummary]:
    summaries = {}
    for name, quantizer in quantizers.items():
        if quantizer.rangeless:
            continue
        observer = quantizer.observer
        tally: Tensor = observer.tally.sum(0)
        low, high = float(observer.extrema[:, 0].min()), float(observer.extrema[:, 1].max())
        finite, zeros, tiny, infinite, nan = (int(count) for count in tally.tolist())
        summaries[name] = QuantizerSummary(finite, zeros, tiny, infinite, nan, low, high)
    return summaries
