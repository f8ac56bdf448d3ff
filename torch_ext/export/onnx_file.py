"""Exports a model to ONNX, with QuantizeLinear and DequantizeLinear in place of its quantizers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from typing import Any

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
from torch_ext.export.common.onnx_bytes import model_bytes
from torch_ext.export.common.onnx_metadata import METADATA_KEY
from torch_ext.export.common.packages import onnx_packages
from torch_ext.export.common.plain_program import spare_tracing
from torch_ext.export.common.trace import TracedInput, simplify, symbols, trace, translations
from torch_ext.export.onnx_grid import PLAIN_OPSET, OnnxGrid
from torch_ext.export.onnx_profiles import (
    PROFILES,
    Profile,
    quantize_before_pads,
    quantize_behind_concats,
    quantize_biases,
    refuse_file,
    refuse_grids,
)
from torch_ext.export.onnx_qdq import Rewriter
from torch_ext.files.storage import PathLike, write_atomically
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.arguments import bounded


def onnx(
    model: nn.Module,
    example_inputs: Any,
    path: PathLike,
    profile: Profile | None = None,
    quantized_weights: bool = False,
    opset: int | None = None,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Exports the model to ONNX, each quantizer as QuantizeLinear and DequantizeLinear.

    Such a pair gives bit for bit what the quantizer gives in VALIDATION, for every finite input.
    Grids of 2 to 4 bits are stored as int4 or uint4, up to 8 bits as int8 or uint8, up to 16 as
    int16 or uint16; before a grid that is narrower than its type, values are clipped. Float formats
    of 8 bits are stored as float8e4m3fn or float8e5m2, with ``saturate=1``; those of 6 and 4 bits
    raise. Groups of a weight are blocks (``block_size``). float16 and bfloat16 are cast to float32
    to be quantized, as in PyTorch. Nodes and tensors are named after the quantizers
    (``conv1.activation_quantizer/quantized``); the file's metadata ``torch_ext`` is JSON that lists
    the quantizers, see
    :func:`read_onnx_metadata`. The model is traced by ``torch.export`` in eval mode and stays as it
    was.

    Args:
        model: calibrated, in VALIDATION.
        example_inputs: arguments of the model's forward, as a tensor, a tuple of positional or a
            mapping of keyword arguments.
        path: ends in ``.onnx``; the file appears complete or not at all.
        profile: None (default) for any grids. ``"onnxruntime"`` stores biases of linear layers as
            int32, has onnxruntime optimise the result, and raises if it would compute a quantized
            layer in float; a mean, an addition or an activation may still be. ``"openvino"`` has
            OpenVINO compile the result and raises in the same way, and for grids that it never
            takes. ``"tensorrt"`` raises for a model that TensorRT would not take: it needs int8,
            zero points of 0, activations per tensor and weights per tensor or per output channel,
            see :func:`tensorrt_violations`. Grids for each come from
            ``get_default_qconfig(backend=...)``. ``"float"`` leaves the quantizers out; the
            metadata says which tensors they quantize, for ``tensorrt_cache(..., names=path)``.
        quantized_weights: True stores weights as integers with DequantizeLinear alone, in a quarter
            of the size; False (default) stores them in float with both nodes.
        opset: ONNX opset: at least 18, 19 if a grid is of a float format, or 21 if one has less
            than 5 or more than 8 bits, or groups; by default the least possible. onnxruntime takes
            int8 beside MaxPool only below 21, or with the session's entry
            ``session.qdqisint8allowed``.
        dynamic_batch: True (default) leaves the size of the inputs' first axis open; the example
            then needs a size of 2 or more. False keeps the example's size.

    Returns:
        Which quantizers are in the file, and which were left out and why.

    Raises:
        ValueError: by name, for quantizers that ONNX or the profile has no representation for, and
            for layers that the profile's engine would compute in float, with the way out; for a
            model that torch.export or torch.onnx cannot export; for unknown profiles and opsets.
        FileNotFoundError: if the folder of ``path`` does not exist.
        ImportError: if the packages onnx and onnxscript are missing.

    Warns:
        QuantizationWarning: scales below 1e-30, where onnxruntime's fused kernels compute something
            else; the profiles ``"onnxruntime"`` and ``"openvino"`` without the package of that
            name, so that nothing judges the result.
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
    unknown = {name: OnnxGrid.problem(entry.quantizer) for name, entry in chosen.items()}
    refuse(who, {name: why for name, why in unknown.items() if why}, TO_FLOAT)
    grids = {name: OnnxGrid.of(entry.quantizer) for name, entry in chosen.items()}
    refuse_grids(who, profile, chosen, grids)
    least = max(grid.opset for grid in grids.values()) if quantizes else PLAIN_OPSET
    opset = _check_opset(who, opset, least, packages)

    with symbols({name: entry.quantizer for name, entry in chosen.items()}) as seen:
        program = trace(who, model, example_inputs, dynamic_batch)
    refuse(who, _untraced(chosen, seen), "torch.export has to trace every quantizer in float32")
    proto = _translate(who, packages, program, opset)
    rewriter = Rewriter(packages, proto, chosen, grids, prepared.weights, seen, quantized_weights)
    tensors = rewriter.quantize() if quantizes else rewriter.remove()
    used = tuple(name for name in chosen if name in tensors)
    if profile == "onnxruntime":
        quantize_biases(packages, proto)
        quantize_behind_concats(packages, proto)
        moved = quantize_before_pads(packages, proto)
        for note in tensors.values():
            note["tensors"] = [moved.get(name, name) for name in note["tensors"]]
    _describe(proto, profile, opset, tensors, left_out)
    data = _checked(who, packages, proto)
    refuse_file(who, profile, packages, proto, data)
    write_atomically(target, data)
    return ExportReport(str(target), "ONNX", used, left_out)


def _check_opset(who: str, opset: int | None, least: int, packages: Any) -> int:
    """The opset, by default `least`; raises ValueError if the grids or onnx do not allow it."""
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
    """Quantizers of float64, which ONNX cannot express, and those that were not traced."""
    problems = {}
    for name in chosen:
        if torch.float64 in seen[name].dtypes:
            problems[name] = "it quantizes float64, which QuantizeLinear does not take"
        elif not seen[name].dtypes:
            problems[name] = "the forward does not call it with these example_inputs"
    return problems


def _translate(who: str, packages: Any, program: Any, opset: int) -> Any:
    """The ModelProto that torch.onnx makes; raises ValueError if it cannot."""
    names = [f"output_{i}" for i in range(len(program.graph_signature.user_outputs))]
    try:
        spare_tracing(program)
        simplify(program)
        # torch.onnx prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                output_names=["output"] if len(names) == 1 else names,
                verbose=False,
                custom_translation_table=translations(packages),
            )
        assert exported is not None
        return exported.model_proto
    except Exception as error:  # torch.onnx has many classes of errors
        raise ValueError(
            f"{who}: torch.onnx cannot export the model: {type(error).__name__}: "
            f"{str(error).strip()[:2000]}"
        ) from error


def _describe(
    proto: Any,
    profile: str | None,
    opset: int,
    tensors: Mapping[str, Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> None:
    """Adds the metadata and the producer's name; raises ValueError for another opset."""
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
    opsets = [entry.version for entry in proto.opset_import if entry.domain == ""]
    if opsets != [opset]:
        raise ValueError(
            f"export.onnx: expected torch.onnx to make opset {opset}, got {opsets}; pass another "
            "opset"
        )


def _checked(who: str, packages: Any, proto: Any) -> bytes:
    """The model as bytes; raises ValueError if it is too large or not valid ONNX."""
    data = model_bytes(who, proto, "the result", "quantized_weights=True makes it smaller")
    try:
        packages.checker.check_model(proto)
    except packages.checker.ValidationError as error:
        raise ValueError(f"{who}: the result is not valid ONNX: {error}") from error
    return data
