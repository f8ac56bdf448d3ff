"""Changes quantizers' states: checks all of them first, then changes all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from torch_ext.quantizers.solve import (
    Q,
    Quantizer,
    ReadWeight,
    Solutions,
    has_range,
    solve_quantizers,
    solve_weights,
)
from torch_ext.quantizers.state_table import CHANGES, QUANTIZE, FakeQuantState
from torch_ext.utils.text import shown


class QuantizationWarning(UserWarning):
    """Warns of quantizers whose data, range or state is unusual; the message names them."""


def change_state(
    who: str,
    chosen: Mapping[str, Q],
    target: FakeQuantState,
    read_weight: ReadWeight[Q],
    allow_unobserved: bool = False,
) -> None:
    """Changes the state of quantizers; those that leave CALIBRATION are solved.

    For VALIDATION every weight is solved, whatever state its quantizer leaves; see
    :func:`solve_weights`.

    Args:
        who: the function that errors and warnings name.
        chosen: quantizers by name.
        target: the new state.
        read_weight: reads the weight of a weight quantizer.
        allow_unobserved: do not raise for quantizers without data or range.

    Raises:
        RuntimeError: a quantizer saw no data, or in VALIDATION has no range.
        ValueError: learned parameters that are not finite, or a contradictory statistic.

    If it raises, no quantizer has changed. The findings are given as a QuantizationWarning.
    """
    for name, quantizer in chosen.items():
        quantizer.check_enters(who, name, target)
    leaving = {
        name: quantizer
        for name, quantizer in chosen.items()
        if quantizer.state is FakeQuantState.CALIBRATION
        and target is not FakeQuantState.CALIBRATION
    }
    solutions = solve_quantizers(leaving, read_weight)
    if target is FakeQuantState.VALIDATION:
        others = {name: quantizer for name, quantizer in chosen.items() if name not in leaving}
        solutions.update(solve_weights(others, read_weight))
    if not allow_unobserved:
        _check_observed(who, solutions.unobserved)
    without = _without_range(chosen, solutions) if target is FakeQuantState.VALIDATION else []
    if not allow_unobserved:
        _check_have_range(who, [name for name in without if not _may_lack_range(chosen[name])])

    solutions.commit()
    for name, quantizer in chosen.items():
        if allow_unobserved and (name in solutions.unobserved or name in without):
            quantizer.unobserved_allowed = True
        quantizer.enter(target, pass_through=name in without)
    if notes := [*solutions.findings(), *_idle_inputs(without, chosen)]:
        warnings.warn("\n".join([f"{who}:", *notes]), QuantizationWarning, stacklevel=4)


def warn_of_state(saved_in: str | None, state: FakeQuantState) -> None:
    """Warns where a checkpoint of VALIDATION is loaded into a model in FLOAT."""
    if state is FakeQuantState.FLOAT and saved_in == FakeQuantState.VALIDATION.value:
        warnings.warn(
            "load_state_dict: the checkpoint was saved in VALIDATION, and the model is in FLOAT, "
            'where it computes without quantization; call set_fake_quantize(model, "validation")',
            QuantizationWarning,
            stacklevel=3,
        )


def check_export(state: str) -> None:
    """Raises RuntimeError during ``torch.export`` in a state that changes the quantizer.

    During ``torch.onnx.export``, which has no operator for a quantizer, it warns: that function
    catches exceptions and retries with another capture.
    """
    if state in CHANGES:
        raise RuntimeError(
            f"torch.export: expected quantizers to be in VALIDATION or FLOAT, got {state}: "
            "the program would go on changing its ranges; call "
            'set_fake_quantize(model, "validation") first'
        )
    compiling = torch.compiler.is_dynamo_compiling()
    if state in QUANTIZE and not compiling and torch.onnx.is_in_onnx_export():
        warnings.warn(
            "torch.onnx.export: expected a float model, got one in VALIDATION, whose quantizers "
            "are no operators of ONNX; torch_ext.export.onnx(model, example_inputs, path) writes "
            "them as QuantizeLinear and DequantizeLinear",
            QuantizationWarning,
            stacklevel=3,
        )


def _without_range(chosen: Mapping[str, Quantizer], solutions: Solutions) -> list[str]:
    """Names of the quantizers that have no range, and get none from ``solutions``."""
    flags = has_range(chosen)
    return [name for name in chosen if not flags[name] and name not in solutions.solved]


def _may_lack_range(quantizer: Quantizer) -> bool:
    return quantizer.optional or quantizer.unobserved_allowed


def _check_observed(who: str, unobserved: Mapping[str, str]) -> None:
    if unobserved:
        names = [f"{name} ({why})" if why else name for name, why in unobserved.items()]
        raise RuntimeError(
            f"{who}: expected every quantizer to have seen data, got none for "
            f"{shown(names, 1000)}; run data through them, or pass allow_unobserved=True"
        )


def _check_have_range(who: str, names: list[str]) -> None:
    if names:
        raise RuntimeError(
            f"{who}: expected every quantizer to have a range for VALIDATION, got none for "
            f"{shown(sorted(names), 1000)}; calibrate, train or load_observer_params first, or "
            "pass allow_unobserved=True"
        )


def _idle_inputs(without: list[str], chosen: Mapping[str, Quantizer]) -> list[str]:
    idle = sorted(
        name for name in without if chosen[name].optional and not chosen[name].unobserved_allowed
    )
    return [f"  quantizers that saw no floating tensor pass through: {shown(idle)}"] if idle else []
