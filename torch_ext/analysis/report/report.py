"""Writes the report: one HTML page of tables, pictures and findings about a model's quantizers."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.analysis.report.advice import notes
from torch_ext.analysis.report.page import page
from torch_ext.analysis.report.quantizer_report import WatchedData, measured
from torch_ext.calibration.restore import restored
from torch_ext.files.quantizer_params import params_of
from torch_ext.files.saved_quantizers import SavedQuantizers, read_quantizers
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel, role_of
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.quantizers.transition import QuantizationWarning
from torch_ext.utils.arguments import check_callable
from torch_ext.utils.batches import Forward, check_batches, default_forward, model_device, to_device
from torch_ext.utils.modes import eval_mode, forked_rng
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import label_of

_WHO = "report"


@dataclass(frozen=True)
class ReportSummary:
    """What :func:`report` wrote; as text, the warnings."""

    #: The HTML file.
    path: str
    #: The number of quantizers in it.
    quantizers: int
    #: The warnings in it, each with the name of the quantizer and a text.
    warnings: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.quantizers} quantizers, {len(self.warnings)} warnings"]
        lines += [f"  {label_of(name)}: {text}" for name, text in self.warnings]
        return "\n".join(lines)


def report(
    model: nn.Module | PathLike,
    path: PathLike,
    data: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> ReportSummary:
    """Writes one HTML file about every quantizer, which loads nothing from elsewhere.

    A table, sortable by column, has each quantizer's range, scale, clipped share, signal to
    quantization noise ratio (SQNR), cosine, share of zeros, and flags. A section per quantizer has
    a picture of the histogram with every rule's threshold and the squared error by threshold, a
    table that compares the rules, and findings with advice.

    The numbers are computed from the calibrated statistics, and from the weights. Rules are solved
    with their default options, the quantizer's own rule with its options, on at most 16 channels of
    a weight. With ``data``, the shares, SQNR and cosine of activations are measured on the values
    that pass through their quantizers in VALIDATION, outlier channels are found, and histograms
    that the statistics do not keep are computed from it. Ranges of
    weights are those of the present weights. The model stays as it was.

    Args:
        model: calibrated; or the path of a file of ``save_observer_params``, which has no weights.
        path: the HTML file to write; it appears complete or not at all.
        data: batches, as ``calibrate`` takes them; None (default) uses the statistics alone.
        forward, device: as in ``calibrate``.
        progress: whether to show a progress bar; by default if standard error is a terminal.

    Returns:
        The number of quantizers and the warnings.

    Raises:
        TypeError: if ``model`` is neither a model nor a path, or ``data`` no batches.
        ValueError: for a model without quantizers, a damaged file, a file together with ``data``,
            and ``data`` without batches.
        FileNotFoundError: if ``model`` is a path of no file, or the folder of ``path`` does not
            exist.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)}: expected the folder {folder} to exist")
    title = "Quantizers"
    if isinstance(model, (str, os.PathLike)):
        title = f"Quantizers in {os.fspath(model)}"
        model = read_quantizers(model)
    elif isinstance(model, nn.Module):
        title = ""
    prepared = PreparedModel(_WHO, model)
    quantizers = prepared.quantizers
    title = title or f"Quantizers of {type(prepared.root).__name__}"
    if data is not None and isinstance(model, SavedQuantizers):
        raise ValueError(f"{_WHO}: expected data to be None with a file, which is no whole model")
    if data is not None:
        check_batches(_WHO, "data", data)
    check_callable(_WHO, "forward", forward)
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored(quantizers))
        stack.enter_context(torch.no_grad())
        calibrating = any(
            quantizer.state is FakeQuantState.CALIBRATION for quantizer in quantizers.values()
        )
        if data is not None or calibrating:
            with warnings.catch_warnings():
                # The page has its own warnings about the same.
                warnings.simplefilter("ignore", QuantizationWarning)
                change_states(_WHO, model, FakeQuantState.VALIDATION, allow_unobserved=True)
        else:
            prepared.refresh_weights()
        seen: dict[str, WatchedData] = {}
        if data is not None:
            batches = progress_bar(data, _length(data), f"{_WHO}, data", progress)
            at = model_device(_WHO, model, device)
            seen = _watch(prepared, batches, forward or default_forward(_WHO), at)
        subjects = []
        for name in progress_bar(quantizers, len(quantizers), _WHO, progress):
            quantizer = quantizers[name]
            weight = prepared.read_weight(quantizer)
            role = role_of(name, quantizer)
            subject = measured(name, role, params_of(quantizer).on_cpu(), weight, seen.get(name))
            subjects.append((subject, notes(subject)))
    kinds = [subject.of for subject, _ in subjects]
    about = ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
    text = page(title, f"{len(subjects)} quantizers: {about}.", subjects)
    write_atomically(path, text.encode("utf-8", "replace"))
    flagged = tuple(
        (subject.name, note.text)
        for subject, subject_notes in subjects
        for note in subject_notes
        if note.flag
    )
    return ReportSummary(os.fspath(path), len(subjects), flagged)


def _length(data: Iterable[Any]) -> int | None:
    """The number of batches, if the data tells it."""
    with contextlib.suppress(TypeError):
        return len(data)  # type: ignore[arg-type]
    return None


def _watch(
    prepared: PreparedModel,
    batches: Iterable[Any],
    forward: Forward,
    device: torch.device,
) -> dict[str, WatchedData]:
    """Runs the model on the batches; returns what passed through the quantizers of activations.

    Quantizers that pass values through, or that the forward did not call, are left out. Raises
    ValueError if there are no batches.
    """
    seen: dict[str, WatchedData] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(prepared.root))
        stack.enter_context(forked_rng(prepared.root))
        for name, quantizer in prepared.quantizers.items():
            if not quantizer.transient and not quantizer.passes_through:
                watched = seen[name] = WatchedData(quantizer)
                stack.callback(quantizer.register_forward_hook(_hook(watched)).remove)
        empty = True
        for batch in batches:
            # The module inside torch.compile's wrapper, because compiled code may skip new hooks.
            forward(prepared.root, to_device(batch, device))
            empty = False
        if empty:
            raise ValueError(f"{_WHO}: expected data to give batches, got none")
    return {name: watched for name, watched in seen.items() if watched.largest is not None}


def _hook(watched: WatchedData) -> Callable[[FakeQuantize, tuple[Tensor, ...], Tensor], None]:
    return lambda quantizer, inputs, out: watched.add(quantizer, inputs[0], out)
