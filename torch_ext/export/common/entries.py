"""The quantizers that an export writes, and the checks that every export makes first."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from torch_ext.files.quantizer_params import Params, check_parameters, params_of
from torch_ext.files.storage import FileError, PathLike
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel, role_of
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.quantizers.transition import QuantizationWarning
from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import label_of, shown

_SUFFIXES = {".onnx": "ONNX", ".json": "JSON", ".table": "ncnn", ".safetensors": "safetensors"}
SMALL_SCALE = 1e-30
TO_FLOAT = 'set_fake_quantize(model, "float", pattern=[...]) leaves them out'


@dataclass(frozen=True)
class Entry:
    """A quantizer that an export writes; `params` holds its tensors, on the CPU."""

    name: str
    quantizer: FakeQuantize
    params: Params

    @property
    def role(self) -> str:
        """``"input"``, ``"output"`` or ``"weight"``."""
        return role_of(self.name, self.quantizer)

    @property
    def is_weight(self) -> bool:
        return self.quantizer.transient

    @property
    def groups(self) -> str:
        """Why a format that has no groups cannot hold it; empty if it has none."""
        size = self.params.group_size
        return "" if size is None else f"it has a scale for each group of {size} values"

    @property
    def scale(self) -> Tensor:
        """float32 [C]."""
        return self.params["scale"]

    @property
    def zero_point(self) -> Tensor:
        """int32 [C]."""
        return self.params["zero_point"]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote. As text: file, format, and the quantizers that were left out."""

    #: The file.
    path: str
    #: The format's name, such as ``"ONNX"``.
    format: str
    #: Names of the quantizers in the file.
    quantizers: tuple[str, ...]
    #: Names of the quantizers that are not in the file, with the reason.
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format} of {len(self.quantizers)} quantizers"]
        lines += [f"  left out: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join(lines)


def entries(prepared: PreparedModel) -> tuple[dict[str, Entry], dict[str, str]]:
    """Chooses the quantizers of a model that an export writes.

    The ranges of weights are solved from the present weights first, in the model too, so that
    VALIDATION computes what the export does.

    Returns:
        The quantizers in VALIDATION that have a range, by name; and the names of those that pass
        values through, because they are in FLOAT or saw no data, with the reason.

    Raises:
        ValueError: by name, for quantizers in another state, without a range, with dynamic scales,
            or with invalid scales or zero points; and if no quantizer quantizes.

    Warns:
        QuantizationWarning: by name, of scales below 1e-30.
    """
    chosen: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    problems: dict[str, str] = {}
    not_finite = prepared.refresh_validating_weights()
    for name, quantizer in prepared.quantizers.items():
        if quantizer.state is FakeQuantState.FLOAT:
            left_out[name] = "it is in FLOAT"
        elif quantizer.passes_through:
            left_out[name] = "it saw no data and passes through"
        elif quantizer.state is not FakeQuantState.VALIDATION:
            problems[name] = f"it is in {quantizer.state.value.upper()}"
        elif quantizer.is_dynamic:
            problems[name] = f"its scales are dynamic, a file has fixed ones; {TO_FLOAT}"
        elif not bool(quantizer.solved):
            problems[name] = "it has no range"
        elif name in not_finite:
            problems[name] = not_finite[name]
        else:
            try:
                params = params_of(quantizer).on_cpu()
                check_parameters(params)
            except ValueError as error:
                problems[name] = str(error)
            else:
                chosen[name] = Entry(name, quantizer, params)
    if not chosen and not problems:
        problems = left_out
    refuse(prepared.who, problems, 'calibrate first, then set_fake_quantize(model, "validation")')
    _warn_of_small_scales(prepared.who, chosen)
    return chosen, left_out


def _warn_of_small_scales(who: str, chosen: Mapping[str, Entry]) -> None:
    """Warns of scales with which products of scales are no normal numbers of float32."""
    least = {name: float(entry.scale.min()) for name, entry in chosen.items()}
    small = [f"{name} ({scale:.3g})" for name, scale in least.items() if scale < SMALL_SCALE]
    if small:
        warnings.warn(
            f"{who}: scales below {SMALL_SCALE:g}, with which engines compute something else "
            f"(onnxruntime's fused kernels do): {shown(small)}; is this data, or a layer that is "
            "all but zero?",
            QuantizationWarning,
            stacklevel=4,
        )


def refuse(who: str, problems: Mapping[str, str], advice: str) -> None:
    """Raises ValueError that lists `problems`, reasons by quantizer's name; none: does nothing."""
    if problems:
        lines = [f"  {label_of(name)}: {why}" for name, why in problems.items()]
        raise ValueError(
            "\n".join(
                [
                    f"{who}: expected every quantizer to suit the format, got {len(problems)} that "
                    f"do not; nothing was written ({advice})",
                    *lines,
                ]
            )
        )


def check_path(who: str, path: PathLike, suffix: str | None) -> Path:
    """Checks the path of a file to write, before anything is computed.

    Args:
        suffix: that of the format, with the dot; None for a format without one, whose path may
            have any suffix but that of another format.

    Raises:
        TypeError: if `path` is no path.
        ValueError: if it has another suffix.
        FileNotFoundError: if its folder does not exist.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{who}: expected path to be a file's path, got {bounded(path)}")
    target = Path(path)
    if suffix is None:
        if kind := _SUFFIXES.get(target.suffix.lower()):
            raise ValueError(f"{who}: expected path to be no {kind} file, got {os.fspath(path)!r}")
    elif target.suffix.lower() != suffix:
        raise ValueError(f"{who}: expected path to end in {suffix}, got {os.fspath(path)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: expected the folder {target.parent} to exist")
    return target


def read_lines(path: PathLike, limit: int) -> list[str]:
    """The lines of a text file in UTF-8, which may end in LF or in CR LF.

    Raises FileError for a file of more than `limit` bytes or of another encoding.
    """
    with open(path, "rb") as file:
        return split_lines(path, file.read(limit + 1), limit)


def split_lines(path: PathLike, data: bytes, limit: int) -> list[str]:
    """The lines of a file's bytes, as of :func:`read_lines`.

    The caller reads up to `limit` + 1 bytes, so that a longer file is noticed.
    """
    if len(data) > limit:
        raise FileError(path, f"expected at most {limit} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(path, f"expected text in UTF-8: {error}") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines
