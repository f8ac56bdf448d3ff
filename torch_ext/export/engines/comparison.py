"""Compares every quantized tensor of a model with an engine's, in steps of its quantizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torch_ext.export.common.entries import Entry, check_path, entries
from torch_ext.export.common.onnx_metadata import read_onnx_metadata
from torch_ext.export.common.packages import load_onnx
from torch_ext.export.common.sessions import onnxruntime_session
from torch_ext.export.engines.file_tensors import FileTensor, feeds_of, file_tensors
from torch_ext.export.engines.openvino_runs import run_in_openvino
from torch_ext.export.engines.tensor_runs import (
    EngineRun,
    ModelRun,
    run_as_written,
    run_model,
    run_optimised,
)
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.parts.groups import spread
from torch_ext.utils.arguments import bound_arguments, bounded
from torch_ext.utils.text import label_of, shown, text_table

_WHO = "export.compare_with_engine"
Engine = Literal["onnxruntime", "openvino"]
_ENGINES = get_args(Engine)
_EQUAL = 0.01  # steps: a float's rounding, of 16 bits too, is less


@dataclass(frozen=True)
class TensorDifference:
    """A quantized tensor of an :class:`EngineComparison`."""

    #: The quantizer's name.
    name: str
    #: The tensor of the file that it quantizes.
    tensor: str
    #: ``"input"``, ``"output"`` or ``"weight"``, whichever it quantizes.
    of: str
    #: By way: the largest difference, in steps of the quantizer's scale. A way in which the engine
    #: has no such tensor, because its optimiser removed it, is missing.
    steps: Mapping[str, float]
    #: By way: the share of elements that differ by more than a hundredth of a step.
    share: Mapping[str, float]
    #: What else differs, such as the scale in the file; or empty.
    note: str

    def differs(self, way: str, steps: float = _EQUAL) -> bool:
        """Whether any element differs by more than so many steps, by default a hundredth."""
        return self.steps.get(way, 0) > steps


@dataclass(frozen=True)
class OutputDifference:
    """An output of the model in an :class:`EngineComparison`; each field is by way."""

    #: The output's name in the file.
    name: str
    #: The largest difference.
    largest: Mapping[str, float]
    #: The norm of the difference over the norm of VALIDATION's output.
    relative: Mapping[str, float]
    #: The share of rows along axis 1 whose largest entry is at the same place; NaN without axis 1.
    same_class: Mapping[str, float]


@dataclass(frozen=True)
class EngineComparison:
    """The result of :func:`compare_with_engine`; as text, a table of what differs."""

    #: The file.
    path: str
    #: ``"onnxruntime"`` or ``"openvino"``.
    engine: str
    #: How the engine ran it: ``"as written"`` and ``"optimised"``; OpenVINO always optimises.
    ways: tuple[str, ...]
    #: One per call of a quantizer, in VALIDATION's order of execution.
    rows: tuple[TensorDifference, ...]
    #: One per output of the model.
    outputs: tuple[OutputDifference, ...]

    def first(self, way: str | None = None, steps: float = _EQUAL) -> TensorDifference | None:
        """The first tensor that differs, in order of execution; None if none does.

        Args:
            way: one of ``ways``, by default the first.
            steps: by more than so many; by default a hundredth. Sums in another order make
                differences of 1 at ties, which the following layers carry on.

        Raises:
            ValueError: for another way.
        """
        chosen = self.ways[0] if way is None else way
        if chosen not in self.ways:
            raise ValueError(
                f"EngineComparison.first: expected way to be one of {self.ways}, got {bounded(way)}"
            )
        return next((row for row in self.rows if row.differs(chosen, steps)), None)

    def __str__(self) -> str:
        lines = [f"{self.path}: VALIDATION against {self.engine}, {len(self.rows)} tensors"]
        for way in self.ways:
            there = [row for row in self.rows if way in row.steps]
            differ = [row for row in there if row.differs(way)]
            text = f"{way}: {len(there) - len(differ)} of {len(there)} tensors equal"
            if differ:
                first = differ[0]
                text += (
                    f"; first different {label_of(first.name)} ({first.steps[way]:.4g} steps, "
                    f"{_percent(first.share[way])} of its elements)"
                )
                text += f", {first.note}" if first.note else ""
            lines.append(text)
        rows = [
            [label_of(row.name), row.of, *self._cells(row.steps, row.share), row.note]
            for row in self.rows
            if row.note or any(row.differs(way) for way in self.ways)
        ]
        if rows:
            header = ["quantizer", "of"]
            for way in self.ways:
                header += [f"{way}: steps", "elements"]
            lines += ["", text_table([*header, ""], rows)]
        header = ["output"]
        for way in self.ways:
            header += [f"{way}: relative difference", "same class"]
        cells = [[out.name, *self._outputs(out)] for out in self.outputs]
        return "\n".join([*lines, "", text_table(header, cells)])

    def _cells(self, steps: Mapping[str, float], share: Mapping[str, float]) -> list[str]:
        cells = []
        for way in self.ways:
            there = way in steps
            cells += [f"{steps[way]:.4g}", _percent(share[way])] if there else ["not there", ""]
        return cells

    def _outputs(self, out: OutputDifference) -> list[str]:
        cells = []
        for way in self.ways:
            same = out.same_class[way]
            cells += [f"{out.relative[way]:.3g}", "" if math.isnan(same) else _percent(same)]
        return cells


def compare_with_engine(
    model: nn.Module, path: PathLike, batch: Any, *, engine: Engine = "onnxruntime"
) -> EngineComparison:
    """Compares each quantized tensor of VALIDATION with an engine's, for one batch.

    For a file of :func:`onnx`, to find where an engine's results begin to differ::

        print(export.compare_with_engine(model, "net.onnx", images))

    onnxruntime runs it in two ways. "as written": without graph optimisations, so that the file
    itself is compared; every pair of nodes gives VALIDATION's bits for the same input, and a
    difference comes from a sum in another order, at a tie. "optimised": the graph that it really
    runs, with the tensors that its optimiser left; integer kernels round a sum in other ways.
    OpenVINO runs a copy of the file whose quantized tensors are outputs, in float32 where it does
    not compute in integers. The outputs are those of the unchanged file.

    Args:
        model: the calibrated model that the file was exported from, in VALIDATION.
        path: the file.
        batch: arguments of the model's forward, as ``example_inputs`` of :func:`onnx`. All its
            quantized tensors are in memory at once, so take few samples.
        engine: ``"onnxruntime"`` (default) or ``"openvino"``.

    Returns:
        The largest difference and the share of elements of each tensor, in order of execution.

    Raises:
        ValueError: for a model that is not in VALIDATION or not the file's, a batch of another
            shape, an unknown engine, or a file that the engine does not load.
        FileError: a ValueError, for a file that is not of :func:`onnx`.
        FileNotFoundError: if there is no such file.
        ImportError: if onnx, onnxscript or the engine's package is missing.
    """
    if engine not in _ENGINES:
        raise ValueError(f"{_WHO}: unknown engine {bounded(engine)}; known: {_ENGINES}")
    target = check_path(_WHO, path, ".onnx")
    noted = read_onnx_metadata(target)
    prepared = PreparedModel(_WHO, model)
    chosen, _ = entries(prepared)
    if noted.get("profile") == "float":
        raise ValueError(f'{_WHO}: expected a file with quantizers, got profile="float"')
    _check_names(target, noted["quantizers"], chosen)
    packages, proto = load_onnx(_WHO, target)
    tensors = file_tensors(target, proto, noted["quantizers"])
    session = onnxruntime_session(_WHO, target, target, level="ORT_DISABLE_ALL")
    bound = bound_arguments(_WHO, prepared.root, batch, "batch")
    feeds = feeds_of(_WHO, target, session, torch.utils._pytree.tree_leaves(bound))
    names = [output.name for output in session.get_outputs()]
    del session

    ours = run_model(prepared, chosen, batch)
    flat = [one for calls in tensors.values() for one in calls]
    runs = {}
    if engine == "openvino":
        runs["openvino"] = run_in_openvino(_WHO, target, proto, flat, feeds)
    else:
        written = run_as_written(_WHO, target, packages, proto, flat, feeds)
        optimised = run_optimised(_WHO, target, packages, proto, tensors, written, feeds)
        runs |= {"as written": written, "optimised": optimised}
    grids = {tensor.name: tensor for tensor in proto.graph.initializer}
    notes = {name: _note(packages, grids, name, entry) for name, entry in chosen.items()}
    rows = _rows(ours, runs, tensors, chosen, notes)
    outputs = tuple(
        _output(name, ours.outputs[i], {way: run.outputs[i] for way, run in runs.items()})
        for i, name in enumerate(names)
    )
    return EngineComparison(str(target), engine, tuple(runs), tuple(rows), outputs)


def _check_names(path: Path, noted: Mapping[str, Any], chosen: Mapping[str, Entry]) -> None:
    """Raises ValueError unless file and model quantize by the same quantizers."""
    only = {
        "the file": [name for name in noted if name not in chosen],
        "the model": [name for name in chosen if name not in noted],
    }
    if any(only.values()):
        texts = [f"only in {where}: {shown(names)}" for where, names in only.items() if names]
        raise ValueError(
            f"{_WHO}: expected {path} to be exported from this model in this state, got "
            f"quantizers {'; '.join(texts)}; export it again"
        )


def _note(packages: Any, tensors: Mapping[str, Any], name: str, entry: Entry) -> str:
    """What a quantizer's grid is in the file, if it is not the model's."""
    texts = []
    for field, ours in (("scale", entry.scale), ("zero_point", entry.zero_point)):
        tensor = tensors.get(f"{name}/{field}")
        if tensor is None:
            continue
        theirs = torch.from_numpy(packages.numpy_helper.to_array(tensor).astype("float64"))
        mine = ours.detach().cpu().double().reshape(-1)
        theirs = theirs.reshape(-1)
        if theirs.shape != mine.shape:
            texts.append(f"{len(theirs)} values of {field} in the file, {len(mine)} in the model")
        elif not torch.equal(theirs, mine):
            at = int((theirs != mine).nonzero()[0])
            where = f" of channel {at}" if len(mine) > 1 else ""
            texts.append(
                f"{field}{where} is {theirs[at]:.9g} in the file, {mine[at]:.9g} in the model"
            )
    return "; ".join(texts)


def _rows(
    ours: ModelRun,
    runs: Mapping[str, EngineRun],
    tensors: Mapping[str, Sequence[FileTensor]],
    chosen: Mapping[str, Entry],
    notes: Mapping[str, str],
) -> list[TensorDifference]:
    rows = []
    for name, number, value in _numbered(ours, tensors, chosen):
        one, entry = tensors[name][number], chosen[name]
        steps, share = {}, {}
        for way, run in runs.items():
            theirs = run.tensors.get(one.dequantized)
            if theirs is not None:
                steps[way], share[way] = _steps(name, value, theirs, entry)
        note = notes[name]
        rows.append(TensorDifference(name, one.source, entry.role, steps, share, note))
    return rows


def _numbered(
    ours: ModelRun, tensors: Mapping[str, Sequence[FileTensor]], chosen: Mapping[str, Entry]
) -> list[tuple[str, int, Tensor]]:
    """Each call in order: the quantizer's name, its number in the file, and its result.

    Calls that the file has once, as they quantize the same tensor again, are one.
    """
    by_name: dict[str, list[Tensor]] = {name: [] for name in chosen}
    order = []
    for name, value in ours.calls:
        wanted, seen = len(tensors[name]), by_name[name]
        again = len(seen) == wanted and any(torch.equal(value, other) for other in seen)
        if not again:
            order.append((name, len(seen), value))
            seen.append(value)
    for name, seen in by_name.items():
        if len(seen) != len(tensors[name]):
            raise ValueError(
                f"{_WHO}: expected {label_of(name)} to quantize {len(tensors[name])} tensors as in "
                f"the file, got {len(seen)} for this batch; export with arguments that take the "
                "same way through the forward"
            )
    return order


def _steps(name: str, ours: Tensor, theirs: Tensor, entry: Entry) -> tuple[float, float]:
    """The largest difference in steps, and the share of elements that differ."""
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{_WHO}: expected {label_of(name)} to quantize a tensor of shape {list(ours.shape)} "
            f"as in VALIDATION, got {list(theirs.shape)} in the file; export it again"
        )
    axis, groups = entry.params.ch_axis, entry.params.group_size
    scale = spread(entry.scale.double(), ours.shape, axis, groups)
    theirs = theirs.to(ours.dtype)  # a model in float16 quantizes to float16
    difference = (theirs.double() - ours.double()).abs() / scale
    same = (theirs == ours) | (theirs.isnan() & ours.isnan())
    difference = torch.where(same, 0.0, difference).nan_to_num(nan=math.inf, posinf=math.inf)
    if not difference.numel():
        return 0.0, 0.0
    return float(difference.max()), float((difference > _EQUAL).double().mean())


def _output(name: str, ours: Tensor, runs: Mapping[str, Tensor]) -> OutputDifference:
    largest, relative, same = {}, {}, {}
    plain = ours.double()
    for way, theirs in runs.items():
        difference = theirs.double().reshape(plain.shape) - plain
        largest[way] = float(difference.abs().max()) if difference.numel() else 0.0
        norm = float(plain.norm())
        relative[way] = float(difference.norm()) / norm if norm else float(difference.norm())
        same[way] = math.nan
        if ours.dim() > 1 and ours.numel():
            places = theirs.double().reshape(plain.shape).argmax(1) == plain.argmax(1)
            same[way] = float(places.double().mean())
    return OutputDifference(name, largest, relative, same)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
