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
from torch_ext.quantizers.state_table import ACCUMULATE, CHANGES, QUANTIZE, FakeQuantState
from torch_ext.utils.mask_values import mask_advice, mask_fill
from torch_ext.utils.modes import is_exporting
from torch_ext.utils.text import label_of, shown
from torch_ext.utils.user_warning import warn_user

INPUTS = "input_quantizers"  # the child that holds the quantizers of a module's arguments
OUTPUTS = "output_quantizers"  # the child that holds those of what the model returns
_OPERANDS = f".{INPUTS}."


class QuantizationWarning(UserWarning):
    """Warns of quantizers whose data, range or state is unusual; the message names them."""


def change_state(
    who: str,
    chosen: Mapping[str, Q],
    target: FakeQuantState,
    read_weight: ReadWeight[Q],
    allow_unobserved: bool = False,
) -> None:
    """Changes the state of quantizers; those that leave CALIBRATION are solved, but for held ones.

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
        ValueError: learned parameters that are not finite.
        RuntimeError: a contradictory statistic.

    If it raises, no quantizer has changed. The findings are given as a QuantizationWarning.
    """
    for name, quantizer in chosen.items():
        quantizer.check_enters(who, name, target)
    leaving = {
        name: quantizer
        for name, quantizer in chosen.items()
        if quantizer.state is FakeQuantState.CALIBRATION
        and target is not FakeQuantState.CALIBRATION
        and not quantizer.holds_range
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

    masks = _followed_masks(chosen, target)
    solutions.commit()
    for name, quantizer in chosen.items():
        if allow_unobserved and (name in solutions.unobserved or name in without):
            quantizer.unobserved_allowed = True
        quantizer.enter(target, pass_through=name in without)
    if notes := [*solutions.findings(), *masks, *_idle_inputs(without, chosen)]:
        warnings.warn("\n".join([f"{who}:", *notes]), QuantizationWarning, stacklevel=4)


def warn_of_state(saved_in: str | None, state: FakeQuantState) -> None:
    """Warns where a checkpoint of VALIDATION is loaded into a model in FLOAT."""
    if state is FakeQuantState.FLOAT and saved_in == FakeQuantState.VALIDATION.value:
        warn_user(
            "load_state_dict: the checkpoint was saved in VALIDATION, and the model is in FLOAT, "
            'where it computes without quantization; call set_fake_quantize(model, "validation")',
            QuantizationWarning,
        )


def check_copied(name: str, state: str) -> None:
    """Raises RuntimeError if DataParallel copies a quantizer that collects data."""
    if state in ACCUMULATE:
        raise RuntimeError(
            f"DataParallel: expected quantizers that collect no data, got {label_of(name)} in "
            "CALIBRATION: copies on other devices are thrown away with what they saw; calibrate "
            "model.module, or use DistributedDataParallel and sync_observers"
        )


def check_export(state: str) -> None:
    """Raises RuntimeError during ``torch.export`` in a state that changes the quantizer.

    During ``torch.onnx.export``, which has no operator for a quantizer, it raises too; with
    ``dynamo=True`` it warns, as that function catches exceptions and retries with another capture.
    """
    if state in CHANGES:
        raise RuntimeError(
            f"torch.export: expected quantizers to be in VALIDATION or FLOAT, got {state}: "
            "the program would go on changing its ranges; call "
            'set_fake_quantize(model, "validation") first'
        )
    compiling = torch.compiler.is_dynamo_compiling()
    if state in QUANTIZE and not compiling and torch.onnx.is_in_onnx_export():
        text = (
            "torch.onnx.export: expected a float model, got one in VALIDATION, whose quantizers "
            "are no operators of ONNX; torch_ext.export.onnx(model, example_inputs, path) writes "
            "them as QuantizeLinear and DequantizeLinear"
        )
        if not is_exporting():  # by TorchScript, which does not retry
            raise RuntimeError(text)
        warn_user(text, QuantizationWarning)


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


def _followed_masks(chosen: Mapping[str, Quantizer], target: FakeQuantState) -> list[str]:
    """Lines for a warning on leaving QAT: ranges that followed a mask; one transfer per device."""
    if target is FakeQuantState.QAT:
        return []
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, quantizer in chosen.items():
        follows = quantizer.state is FakeQuantState.QAT and not quantizer.keeps_range
        if follows and not quantizer.transient:
            low, high = quantizer.range.unbind(1)
            ends = torch.stack([low.min(), high.max()])
            by_device.setdefault(ends.device, {})[name] = ends
    found = {
        name: fill
        for rows in by_device.values()
        for name, row in zip(rows, torch.stack(list(rows.values())).tolist(), strict=True)
        if (fill := mask_fill(*row))
    }
    notes = [
        f"  {label_of(name)}: its range reaches {fill}, as masks do" for name, fill in found.items()
    ]
    return [*notes, mask_advice(list(found))] if found else []


def _idle_inputs(without: list[str], chosen: Mapping[str, Quantizer]) -> list[str]:
    # Operands of a layer, such as query and key, may be one tensor, which one quantizer sees.
    seen = {name.rpartition(_OPERANDS)[0] for name in chosen if name not in set(without)}
    idle = sorted(
        name
        for name in without
        if chosen[name].optional
        and not chosen[name].unobserved_allowed
        and (name.rpartition(_OPERANDS)[0] or None) not in seen
    )
    if not idle:
        return []
    return [f"  saw no floating tensor of their own, pass through: {shown(idle)}"]
