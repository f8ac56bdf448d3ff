"""The way back from a prepared model to a float one."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from torch_ext.prepare.attach import detach_children
from torch_ext.prepare.module_classes import (
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
    """A prepared model without its quantizers: float, with the weights that it has now.

    Undoes what ``prepare_qat`` did: modules have their own classes again, parameters their own
    names, and the hooks of quantizers are gone. The float weights stay as training left them.
    Ranges are lost: ``save_observer_params`` keeps them. Batch norms that ``fuse`` folded stay
    folded. What something else parametrizes (``weight_norm``) stays parametrized by that.

    Args:
        model: a prepared model, not wrapped.
        inplace: change ``model``; otherwise a copy is changed and returned.

    Raises:
        TypeError: ``model`` is no module, or ``inplace`` no bool.
        ValueError: a model without quantizers, a wrapped one, or a parametrization that was
            registered after ``prepare_qat`` on a module whose class it made.
    """
    parse_flag(_WHO, "inplace", inplace)
    if PreparedModel(_WHO, model).root is not model:
        raise ValueError(
            f"{_WHO}: expected a plain model, got a {type(model).__name__}; unwrap it first"
        )
    for name, module in model.named_modules():
        if keeps_parametrizations(module) and swapped_below(module):
            raise ValueError(
                f"{_WHO}: expected {label_of(name)} to have no parametrization of later than "
                "prepare_qat, got one; remove it first (torch.nn.utils.parametrize)"
            )
    result = model if inplace else copy.deepcopy(model)
    for module in list(result.modules()):
        detach_children(module)
        restore_class(module)
    return result
