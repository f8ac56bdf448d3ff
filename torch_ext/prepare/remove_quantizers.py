"""Turns a prepared model back into a float one."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from torch_ext.prepare.attach import detach_children
from torch_ext.prepare.insertion.running import untrack
from torch_ext.prepare.module_classes import (
    copied,
    keeps_parametrizations,
    restore_class,
    swapped_below,
)
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.arguments import parse_flag
from torch_ext.utils.text import label_of

_WHO = "remove_quantizers"
M = TypeVar("M", bound=nn.Module)


def remove_quantizers(model: M, inplace: bool = False) -> M:
    """Removes all quantizers of a prepared model; it is float again, with its present weights.

    Modules get their original classes back and parameters their original names. Ranges are lost;
    :func:`save_observer_params` keeps them. Batch norms that :func:`fuse` folded stay folded, and
    other parametrizations, such as ``weight_norm``, stay.

    Args:
        model: a prepared model, not wrapped.
        inplace: change ``model``; by default, a copy is changed and returned.

    Returns:
        The float model.

    Raises:
        TypeError: ``model`` is no module, or ``inplace`` no bool.
        ValueError: the model has no quantizers or is wrapped, or a module whose class
            ``prepare_qat`` derived was parametrized afterwards.
    """
    parse_flag(_WHO, "inplace", inplace)
    if PreparedModel(_WHO, model).root is not model:
        raise ValueError(
            f"{_WHO}: expected a plain model, got a {type(model).__name__}; unwrap it first"
        )
    for name, module in model.named_modules():
        if keeps_parametrizations(module) and swapped_below(module):
            raise ValueError(
                f"{_WHO}: expected {label_of(name)} to have no parametrization from after "
                "prepare_qat, got one; remove it first (torch.nn.utils.parametrize)"
            )
    result = model if inplace else copied(_WHO, model)
    for module in list(result.modules()):
        detach_children(module)
        untrack(module)
        restore_class(module)
    return result
