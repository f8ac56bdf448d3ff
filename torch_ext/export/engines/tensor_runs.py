"""Runs a model in VALIDATION and its file in an engine, and keeps every quantized tensor."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ext.export.common.entries import Entry
from torch_ext.export.common.onnx_bytes import model_bytes, model_copy
from torch_ext.export.common.sessions import onnxruntime_session
from torch_ext.export.engines.file_tensors import CARRIERS, FileTensor
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.arguments import bound_arguments
from torch_ext.utils.batches import model_device, tensors_in, to_device
from torch_ext.utils.modes import eval_mode, uncompiled

SMALLER = "export it with quantized_weights=True"
_SEEN = "/seen_by_comparison"
# Operators of integers: where their results' scale and zero point stand among the inputs.
_RESULT_GRIDS = {
    "QuantizeLinear": 1, "QLinearConv": 6, "QLinearMatMul": 6, "QGemm": 7, "QLinearAdd": 6,
    "QLinearMul": 6, "QLinearConcat": 0, "QLinearAveragePool": 3, "QLinearGlobalAveragePool": 3,
    "QLinearLeakyRelu": 3, "QLinearSigmoid": 3, "QLinearSoftmax": 3, "QLinearReduceMean": 3,
}  # fmt: skip


class ModelRun(NamedTuple):
    """What a model computes in VALIDATION."""

    #: Each quantization, in order: the quantizer's name, and its result on the CPU.
    calls: list[tuple[str, Tensor]]
    #: The tensors of the model's result, on the CPU.
    outputs: list[Tensor]


class EngineRun(NamedTuple):
    """What an engine computes of a file."""

    #: The dequantized tensors that it has, by their name in the file.
    tensors: dict[str, Tensor]
    #: The file's outputs, in order.
    outputs: list[Tensor]


def run_model(prepared: PreparedModel, chosen: Mapping[str, Entry], batch: Any) -> ModelRun:
    """Runs the model in eval mode, without gradients; `chosen` are the quantizers to watch."""
    root = prepared.root
    given = to_device(
        bound_arguments(prepared.who, root, batch, "batch"), model_device(prepared.who, root, None)
    )
    calls: list[tuple[str, Tensor]] = []
    bound = inspect.signature(root.forward).bind_partial()
    bound.arguments.update(given)

    def watcher(name: str) -> Any:
        def see(y: Tensor) -> Tensor:
            calls.append((name, y.detach().cpu()))
            return y

        return see

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(eval_mode(root))
        stack.enter_context(torch.no_grad())
        for name, entry in chosen.items():
            stack.enter_context(entry.quantizer.replaced(watcher(name), after=True))
        result = root(*bound.args, **bound.kwargs)
    outputs = [tensor.detach().cpu() for tensor in tensors_in(_plain(result))]
    return ModelRun(calls, outputs)


def _plain(result: Any) -> Any:
    """A model's result as mappings, tuples and lists; transformers' are classes of their own."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def run_as_written(
    who: str, path: Path, packages: Any, proto: Any, tensors: Sequence[FileTensor], feeds: Any
) -> EngineRun:
    """Runs the file in onnxruntime without graph optimisations: each node by itself."""
    copy = model_copy(who, proto, path, SMALLER)
    return _run(
        who, path, packages, copy, {one.dequantized: one.dequantized for one in tensors}, feeds
    )


def run_optimised(
    who: str,
    path: Path,
    packages: Any,
    proto: Any,
    tensors: Mapping[str, Sequence[FileTensor]],
    written: EngineRun,
    feeds: Any,
) -> EngineRun:
    """Runs the graph that onnxruntime's optimiser makes of the file; the outputs as by default.

    To ask for a tensor in the file itself would keep the optimiser from some of its work. So the
    optimised graph (level "extended") is read, and what it still has of the quantized tensors is
    made an output of that one. `proto` is the file, `written` what :func:`run_as_written` gave.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        onnxruntime_session(who, path, path, level="ORT_ENABLE_EXTENDED", save=target)
        optimised = packages.load(str(target))
    moved = {name for node in proto.graph.node if node.op_type in CARRIERS for name in node.output}
    candidates = _candidates(optimised, tensors, moved)
    shown = {}
    for places in candidates.values():
        for place in places:
            seen = f"{place.name}{_SEEN}"
            if seen not in shown:
                keys = {} if place.axis is None else {"axis": place.axis}
                keys |= {"block_size": place.block} if place.block else {}
                inputs = [place.name, place.scale, place.zero_point]
                node = packages.helper.make_node(
                    "DequantizeLinear", inputs, [seen], name=seen, **keys
                )
                optimised.graph.node.append(node)
                shown[seen] = seen
    seen_tensors = _run(who, path, packages, optimised, shown, feeds).tensors
    found = {}
    for one in (one for calls in tensors.values() for one in calls):
        values = [seen_tensors[f"{p.name}{_SEEN}"] for p in candidates.get(one.dequantized, ())]
        fitting = [v for v in values if v.shape == written.tensors[one.dequantized].shape]
        if fitting:
            found[one.dequantized] = fitting[0]
    plain = onnxruntime_session(who, path, path)
    outputs = [torch.from_numpy(y) for y in plain.run(None, feeds)]
    return EngineRun(found, outputs)


class _Integers(NamedTuple):
    """A tensor of integers in a graph, with the tensors of its grid."""

    name: str
    scale: str
    zero_point: str
    axis: int | None  # of the channels, or along which blocks lie
    block: int = 0  # so many values along the axis share a scale; 0: no blocks


def _candidates(
    optimised: Any, tensors: Mapping[str, Sequence[FileTensor]], moved: set[str]
) -> dict[str, list[_Integers]]:
    """By dequantized tensor of the file: what an optimised graph may have in its place, best first.

    That has its name; or the same DequantizeLinear reads it, where int8 became uint8; or it has the
    same scale, where the optimiser moved a pair across an operator that keeps the grid. `moved` are
    the results of such operators in the file. Only a tensor of the right shape is the one.
    """
    grids: dict[str, _Integers] = {}
    constants = {tensor.name: tensor for tensor in optimised.graph.initializer}

    def axis_of(node: Any, scale: str) -> int | None:
        per_tensor = scale not in constants or not constants[scale].dims
        return None if per_tensor else next((a.i for a in node.attribute if a.name == "axis"), 1)

    for node in optimised.graph.node:
        first = _RESULT_GRIDS.get(node.op_type)
        if first is not None and len(node.input) >= first + 2:
            name = node.output[0]
            scale, zero_point = node.input[first : first + 2]
            axis = axis_of(node, scale) if node.op_type == "QuantizeLinear" else None
            grids[name] = _Integers(name, scale, zero_point, axis)
        elif node.op_type in (*CARRIERS, "Pad") and node.input[0] in grids:
            source = grids[node.input[0]]
            if source.axis is None:
                grids |= {name: source._replace(name=name) for name in node.output if name}
        elif (
            node.op_type == "DequantizeLinear"
            and node.input[0] in constants
            and len(node.input) == 3
        ):
            name, scale, zero_point = node.input
            block = next((a.i for a in node.attribute if a.name == "block_size"), 0)
            grids[name] = _Integers(name, scale, zero_point, axis_of(node, scale), block)
    readers = {
        node.output[0]: node.input[0]
        for node in optimised.graph.node
        if node.op_type == "DequantizeLinear"
    }
    by_scale: dict[str, list[_Integers]] = {}
    for place in grids.values():
        by_scale.setdefault(place.scale, []).append(place)
    found = {}
    for calls in tensors.values():
        others = by_scale.get(calls[0].scale, [])
        for i, one in enumerate(calls):
            names = (one.quantized, readers.get(one.dequantized, ""))
            places = [grids[name] for name in names if name in grids]
            if len(calls) == 1:
                # QuantizeLinear moves up and DequantizeLinear down across carriers.
                places += others[::-1] if one.source in moved else others
            elif len(others) == len(calls):
                places.append(others[i])
            found[one.dequantized] = places
    return found


def _run(
    who: str, path: Path, packages: Any, proto: Any, shown: Mapping[str, str], feeds: Any
) -> EngineRun:
    """Runs a ModelProto, which it changes; `shown`: tensors to make outputs, by a key of each."""
    listed = [output.name for output in proto.graph.output]
    own = len(listed)
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants.update(value.name for value in proto.graph.input)
    names = {}
    for key, name in shown.items():
        if name in constants:
            copy = f"{name}{_SEEN}"
            proto.graph.node.append(
                packages.helper.make_node("Identity", [name], [copy], name=copy)
            )
            name = copy
        if name not in listed:
            proto.graph.output.add(name=name)
            listed.append(name)
        names[key] = name
    data = model_bytes(who, proto, path, SMALLER)
    session = onnxruntime_session(who, data, path, level="ORT_DISABLE_ALL")
    results = dict(zip(listed, session.run(listed, feeds), strict=True))
    tensors = {key: torch.from_numpy(results[name]) for key, name in names.items()}
    return EngineRun(tensors, [torch.from_numpy(results[name]) for name in listed[:own]])
