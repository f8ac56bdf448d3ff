"""A page about a model's quantizers: tables, pictures, and what deserves a look, in words."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.analysis.report.advice import notes
from torch_ext.analysis.report.page import page
from torch_ext.analysis.report.quantizer_report import WatchedData, measured
from torch_ext.files.quantizer_params import Params, params_of
from torch_ext.files.saved_quantizers import SavedQuantizers, read_quantizers
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel, role_of
from torch_ext.quantizers.restore import restored
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
    """What :func:`report` wrote; printed, the warnings."""

    path: str
    quantizers: int
    warnings: tuple[tuple[str, str], ...]  # name of the quantizer, text

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
    """Writes one HTML file about every quantizer; it loads nothing from anywhere.

    A table, sortable by column, has each quantizer's range, scale, clipped share, signal to
    quantization noise ratio (SQNR), cosine, share of zeros, and flags. Each has a section of its
    own: a picture of the histogram with every rule's threshold and the squared error by threshold,
    the rules side by side, and findings in words with what to do about them.

    All is computed from the calibrated statistics, and from the weights: rules are solved with
    their defaults, the quantizer's own with its options, on at most 16 of a weight's channels.
    With ``data`` the SQNR and its neighbours are measured on what passes through the quantizers of
    activations, in VALIDATION, and outlier channels are found; histograms that the statistics do
    not keep are made of it. The model stays as it is.

    Args:
        model: calibrated, or a file of :func:`save_observer_params`, which holds no weights.
        data: batches, as ``calibrate`` takes them.
        forward, device: as in ``calibrate``.
        progress: a bar; by default where standard error is a terminal.

    Raises TypeError or ValueError for what is neither a model with quantizers nor such a file, or
    for a file together with data; FileNotFoundError where the folder of `path` does not exist.
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
        calibrating = any(q.state is FakeQuantState.CALIBRATION for q in quantizers.values())
        if data is not None or calibrating:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", QuantizationWarning)  # the page has its own words
                change_states(_WHO, model, FakeQuantState.VALIDATION, allow_unobserved=True)
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
            subject = measured(name, role, _on_cpu(quantizer), weight, seen.get(name))
            subjects.append((subject, notes(subject)))
    kinds = [subject.of for subject, _ in subjects]
    about = ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
    text = page(title, f"{len(subjects)} quantizers: {about}.", subjects)
    write_atomically(path, text.encode("utf-8", "replace"))
    found = tuple((s.name, note.text) for s, said in subjects for note in said if note.flag)
    return ReportSummary(os.fspath(path), len(subjects), found)


def _on_cpu(quantizer: FakeQuantize) -> Params:
    params = params_of(quantizer)
    return replace(params, tensors={field: t.cpu() for field, t in params.tensors.items()})


def _length(data: Iterable[Any]) -> int | None:
    with contextlib.suppress(TypeError):
        return len(data)  # type: ignore[arg-type]
    return None


def _watch(
    prepared: PreparedModel,
    batches: Iterable[Any],
    forward: Forward,
    device: torch.device,
) -> dict[str, WatchedData]:
    """Runs the batches; what passes through each activation's quantizer, by name."""
    seen: dict[str, WatchedData] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(prepared.root))
        stack.enter_context(forked_rng(prepared.root))
        for name, quantizer in prepared.quantizers.items():
            if not quantizer.transient and not quantizer.passes_through:
                one = seen[name] = WatchedData(quantizer)
                stack.callback(quantizer.register_forward_hook(_hook(one)).remove)
        empty = True
        for batch in batches:
            forward(prepared.root, to_device(batch, device))  # a compiled one skips hooks
            empty = False
        if empty:
            raise ValueError(f"{_WHO}: expected data to give batches, got none")
    return {name: one for name, one in seen.items() if one.largest is not None}


def _hook(seen: WatchedData) -> Callable[[FakeQuantize, tuple[Tensor, ...], Tensor], None]:
    return lambda quantizer, inputs, out: seen.add(quantizer, inputs[0], out)
