"""What a prepared model's quantizers see in a run: they are stale where a change changes that."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torch_ext.prepare.batch_norms.outputs import Arguments
from torch_ext.prepare.module_classes import copied
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.modes import undisturbed

# Of the largest value: below a step of 8 bits, and above what a deep model makes of rounding.
_SAME = 1e-3


class Seen(NamedTuple):
    """Values by quantizer: those of activations one for each example that it saw."""

    values: dict[str, list[Tensor]]

    def differing(self, other: Seen) -> list[str]:
        """The quantizers that saw something else."""
        return [n for n, own in self.values.items() if _differ(own, other.values.get(n, []))]


def _differ(left: list[Tensor], right: list[Tensor]) -> bool:
    if [x.shape for x in left] != [x.shape for x in right]:
        return True
    for one, two in zip(left, right, strict=True):
        size = float(one.abs().max()) if one.numel() else 0.0
        if not torch.allclose(one, two, rtol=0.0, atol=_SAME * size, equal_nan=True):
            return True
    return False


@torch.no_grad()
def seen_by_quantizers(who: str, root: nn.Module, examples: list[Arguments]) -> Seen:
    """Runs a copy of the model on the examples, in eval mode and CALIBRATION."""
    model = copied(who, root).eval()
    prepared = PreparedModel(who, model)
    found: dict[str, list[Tensor]] = {name: [] for name in prepared.quantizers}
    for name, quantizer in prepared.quantizers.items():
        if quantizer.transient:
            weight = prepared.read_weight(quantizer)
            found[name] += [] if weight is None else [weight.clone()]
            continue
        quantizer.enter(FakeQuantState.CALIBRATION)
        quantizer.register_forward_pre_hook(_noting(found[name]))
    for example in examples:
        args, kwargs = tree_map(_cloned, example)
        with undisturbed(model):
            model(*args, **kwargs)
    return Seen(found)


def _noting(values: list[Tensor]) -> Any:
    def hook(_: FakeQuantize, args: tuple[Any, ...]) -> None:
        values.append(args[0].detach().clone())

    return hook


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
