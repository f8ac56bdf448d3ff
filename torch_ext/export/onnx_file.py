"""ONNX: a model with QuantizeLinear and DequantizeLinear in place of its quantizers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from torch_ext._C import build_info
from torch_ext.export.common.entries import (
    TO_FLOAT,
    Entry,
    ExportReport,
    check_path,
    entries,
    refuse,
)
from torch_ext.export.common.onnx_metadata import METADATA_KEY
from torch_ext.export.common.packages import onnx_packages
from torch_ext.export.common.trace import TracedInput, symbols, trace
from torch_ext.export.onnx_qdq import PLAIN_OPSET, OnnxGrid, Rewriter
from torch_ext.export.tensorrt.onnx_rules import grid_problem, violations
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.arguments import bounded

Profile = Literal["tensorrt", "float"]
PROFILES = (None, *get_args(Profile))
_LIMIT = 2**31 - 2**20  # protobuf holds no more in one message


def onnx(
    model: nn.Module,
    example_inputs: Any,
    path: PathLike,
    profile: Profile | None = None,
    quantized_weights: bool = False,
    opset: int | None = None,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Writes the model as ONNX with QuantizeLinear and DequantizeLinear; the model in VALIDATION.

    Each quantizer becomes such a pair, whose output is bit for bit that of VALIDATION for every
    finite input; grids that are part of their type's are clipped to before it. Grids of 2 to 4
    bits are stored as int4 or uint4, up to 8 as int8 or uint8, up to 16 as int16 or uint16. Half
    types are quantized in float32, as here. Nodes and tensors are named after the quantizers
    (``conv1.activation_quantizer/quantized``), and the file's metadata ``torch_ext`` is JSON that
    lists them all. The model is traced by ``torch.export`` in eval mode and stays as it was.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        path: ends in ``.onnx``; appears complete or not at all.
        profile: ``"tensorrt"`` keeps to what TensorRT takes (int8, zero points 0, activations per
            tensor, weights per output channel), see :func:`tensorrt_violations`. ``"float"``
            leaves the quantizers out, and the metadata says which tensors they quantize: what
            ``tensorrt_cache(..., names=path)`` belongs to.
        quantized_weights: store the weights as integers, in a quarter of the size; otherwise in
            float, with both nodes.
        opset: at least 18; at least 21 where grids of less than 5 or more than 8 bits are; by
            default the least. onnxruntime takes int8 beside MaxPool only below 21, or with the
            session's entry ``session.qdqisint8allowed``.
        dynamic_batch: the first axis of the inputs is free; the example needs 2 or more on it.

    Raises:
        ValueError: quantizers that do not suit the profile, by name; a model that torch.export or
            torch.onnx does not take.
        ImportError: without the packages onnx and onnxscript.
    """
    who = "export.onnx"
    target = check_path(who, path, ".onnx")
    if profile not in PROFILES:
        raise ValueError(f"{who}: unknown profile {profile!r}; known: {PROFILES}")
    if profile == "float" and quantized_weights:
        raise ValueError(f'{who}: expected quantized_weights=False with profile="float", got True')
    packages = onnx_packages(who)
    prepared = PreparedModel(who, model)
    chosen, left_out = entries(prepared)
    quantizes = profile != "float"
    grids = {name: OnnxGrid.of(entry.quantizer) for name, entry in chosen.items()}
    if profile == "tensorrt":
        problems = {n: why for n, e in chosen.items() if (why := grid_problem(e, grids[n]))}
        refuse(who, problems, f'take dtype="int8" and a symmetric qscheme; or {TO_FLOAT}')
    least = max(grid.opset for grid in grids.values()) if quantizes else PLAIN_OPSET
    opset = _check_opset(who, opset, least, packages)

    with symbols({name: entry.quantizer for name, entry in chosen.items()}) as seen:
        program = trace(who, model, example_inputs, dynamic_batch)
    refuse(who, _untraced(chosen, seen), "torch.export has to see every quantizer in float32")
    proto = _translate(who, program, opset)
    rewriter = Rewriter(packages, proto, chosen, grids, prepared.weights, seen, quantized_weights)
    tensors = rewriter.quantize() if quantizes else rewriter.remove()
    used = tuple(name for name in chosen if name in tensors)
    _describe(proto, profile, opset, tensors, left_out)
    if profile == "tensorrt":
        refuse(who, violations(packages, proto), "these nodes are not what TensorRT takes")
    data = _checked(who, packages, proto)
    write_atomically(target, data)
    return ExportReport(str(target), "ONNX", used, left_out)


def _check_opset(who: str, opset: int | None, least: int, packages: Any) -> int:
    newest = packages.defs.onnx_opset_version()
    if opset is None:
        return least
    if isinstance(opset, bool) or not isinstance(opset, int) or not least <= opset <= newest:
        raise ValueError(
            f"{who}: expected opset to be between {least}, which the grids need, and {newest}, "
            f"got {bounded(opset)}"
        )
    return opset


def _untraced(chosen: Mapping[str, Entry], seen: Mapping[str, TracedInput]) -> dict[str, str]:
    """Those that ONNX has no type for, or that the example did not reach."""
    problems = {}
    for name in chosen:
        if torch.float64 in seen[name].dtypes:
            problems[name] = "it quantizes float64, which QuantizeLinear does not take"
        elif not seen[name].dtypes:
            problems[name] = "the forward does not call it with these example_inputs"
    return problems


def _translate(who: str, program: Any, opset: int) -> Any:
    names = [f"output_{i}" for i in range(len(program.graph_signature.user_outputs))]
    try:
        # What it prints is for those who write exporters.
        with contextlib.redirect_stdout(io.StringIO()):
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                output_names=["output"] if len(names) == 1 else names,
                verbose=False,
            )
        assert made is not None
        return made.model_proto
    except Exception as error:  # torch.onnx has a tree of exceptions of its own
        raise ValueError(
            f"{who}: torch.onnx does not take the model: {type(error).__name__}: "
            f"{str(error).strip()[:2000]}"
        ) from error


def _describe(
    proto: Any,
    profile: str | None,
    opset: int,
    tensors: Mapping[str, Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> None:
    version = build_info()["version"]
    content = {
        "version": 1,
        "torch_ext": version,
        "profile": profile,
        "quantizers": tensors,
        "left_out": left_out,
    }
    proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(content, ensure_ascii=False))
    proto.producer_name, proto.producer_version = "torch_ext", version
    found = [one for one in proto.opset_import if one.domain == ""]
    if [one.version for one in found] != [opset]:
        raise ValueError(
            f"export.onnx: expected torch.onnx to make opset {opset}, got "
            f"{[one.version for one in found]}; pass another opset"
        )


def _checked(who: str, packages: Any, proto: Any) -> bytes:
    size = proto.ByteSize()
    if size > _LIMIT:
        raise ValueError(
            f"{who}: expected a model of at most {_LIMIT} bytes, got {size}; "
            "quantized_weights=True makes it smaller"
        )
    try:
        packages.checker.check_model(proto)
    except packages.checker.ValidationError as error:
        raise ValueError(f"{who}: the result is not valid ONNX: {error}") from error
    data: bytes = proto.SerializeToString()
    return data
