"""Exports a model to a quantized program of PT2E, which Inductor and ExecuTorch lower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from torch_ext.export.common.aten import functional
from torch_ext.export.common.entries import TO_FLOAT, entries, refuse
from torch_ext.export.common.trace import TracedInput, quantizer_calls, symbols, trace
from torch_ext.export.programs.engine_layers import (
    OUTPUT_IN_FLOAT,
    PROGRAM_ENGINES,
    ProgramBackend,
    ProgramEngine,
    engine_problem,
)
from torch_ext.export.programs.graph import QuantizedProgram
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.grid import dtype_name
from torch_ext.quantizers.transition import QuantizationWarning
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.text import label_of
from torch_ext.utils.user_warning import warn_user


def pt2e(
    model: nn.Module,
    example_inputs: Any,
    backend: ProgramBackend = "x86",
    dynamic_batch: bool = False,
) -> ExportedProgram:
    """Exports the model to a program that an engine of PyTorch runs in integers.

    Its quantizers are ``quantized_decomposed`` quantize and dequantize nodes, as
    ``convert_pt2e`` makes them, with the scales that VALIDATION quantizes with. Weights are int8.
    Before and behind operations that only move values (max pooling, reshape) the nodes are
    repeated, which changes no value: the engines look for them beside each operation. The model is
    traced by ``torch.export`` in eval mode and stays as it was; what the program holds is a copy.

    Args:
        model: calibrated, in VALIDATION.
        example_inputs: arguments of the model's forward, as a tensor, a tuple of positional or a
            mapping of keyword arguments.
        backend: the engine: ``"x86"`` is Inductor on x86 processors
            (``lower_pt2e_quantized_to_x86`` of torchao, then ``torch.compile``), ``"xnnpack"``
            ExecuTorch's XNNPACK. Their grids differ, ``get_default_qconfig(backend=...)`` has both.
        dynamic_batch: True leaves the size of the inputs' first axis open; the example then needs
            a size of 2 or more. False (default) keeps the example's size.

    Returns:
        The program.

    Raises:
        ValueError: by name, for quantizers whose grid the engine does not take; for a model that
            torch.export cannot trace; for an unknown backend.

    Warns:
        QuantizationWarning: layers with a quantized weight that the engine computes in float.
    """
    who = "export.pt2e"
    if backend not in tuple(PROGRAM_ENGINES):
        known = ", ".join(PROGRAM_ENGINES)
        raise ValueError(f"{who}: unknown backend {bounded(backend)}; known: {known}")
    parse_flag(who, "dynamic_batch", dynamic_batch)
    engine = PROGRAM_ENGINES[backend]
    prepared = PreparedModel(who, model)
    chosen, _ = entries(prepared)
    problems = {
        name: problem
        for name, entry in chosen.items()
        if (problem := engine_problem(entry, engine))
    }
    refuse(who, problems, f'take get_default_qconfig(backend="{backend}"); or {TO_FLOAT}')
    not_finite = {
        f"{source.owner}.{source.parameter}".strip("."): "it is not finite"
        for quantizer, source in prepared.weights.items()
        if any(entry.quantizer is quantizer for entry in chosen.values())
        and not bool(source.read().isfinite().all())
    }
    refuse(who, not_finite, "weights have to be finite")
    with symbols({name: entry.quantizer for name, entry in chosen.items()}) as seen:
        program = trace(who, model, example_inputs, dynamic_batch, keywords=True)
    refuse(who, _inside_others(program), "only the outermost graph is rewritten")
    refuse(who, _untraced(seen), "torch.export has to trace every quantizer in float32")
    rewriter = QuantizedProgram(functional(program), chosen, prepared.weights, engine)
    rewriter.place()
    if in_float := rewriter.float_layers():
        _warn(who, engine, in_float)
    return rewriter.finish()


def _warn(who: str, engine: ProgramEngine, in_float: Mapping[str, str]) -> None:
    layers = ", ".join(f"{label_of(name)} ({why})" for name, why in in_float.items())
    advice = (
        'get_default_qconfig(backend="xnnpack") lets prepare_qat, given example_inputs, quantize '
        "results of layers, and output_qconfig what the model returns"
    )
    advice = f"; {advice}" if OUTPUT_IN_FLOAT in in_float.values() else ""
    warn_user(
        f"{who}: {engine.name} computes these in float: {layers}{advice}", QuantizationWarning
    )


def _untraced(seen: Mapping[str, TracedInput]) -> dict[str, str]:
    """Quantizers of other types than float32, and those that were not traced."""
    problems = {}
    for name, traced in seen.items():
        if not traced.dtypes:
            problems[name] = "the forward does not call it with these example_inputs"
        for dtype in traced.dtypes - {torch.float32}:
            problems[name] = f"it quantizes {dtype_name(dtype)}; model.float() makes it float32"
    return problems


def _inside_others(program: ExportedProgram) -> dict[str, str]:
    """Quantizers in the graphs of branches and loops."""
    return {
        called: "it is called inside torch.cond, autocast or the like"
        for name, module in program.graph_module.named_modules()
        if name and isinstance(module, fx.GraphModule)
        for called, _ in quantizer_calls(module.graph)
    }
