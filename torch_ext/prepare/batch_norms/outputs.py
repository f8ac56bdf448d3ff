"""Whether a model that was changed in place computes what it computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torch_ext.prepare.module_classes import copied
from torch_ext.utils.modes import undisturbed

# Positional and keyword arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# What changes a model in place.
Change = Callable[[nn.Module], object]


class Outputs:
    """A model, and its outputs for the examples."""

    def __init__(
        self, who: str, model: nn.Module, examples: list[Arguments], least: torch.dtype
    ) -> None:
        """``least``: what lower precision becomes in the runs, if the model runs in it."""
        self.who, self.model, self.examples = who, model, examples
        dtypes = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
        self.double: bool | None = torch.float64 in {least, *dtypes}
        try:
            self.wanted = self._run(None)
        except Exception:  # the user's forward, which may ask for its own dtype
            self.double = None
            self.wanted = self._run(None)

    def are_kept_by(self, change: Change) -> bool:
        try:
            return _close(self._run(change), self.wanted)
        except Exception:  # such as where the forward reads attributes of a norm that is gone
            return False

    def difference(self, change: Change) -> float:
        """The largest difference that a change makes, relative to the largest value of a tensor."""
        largest = 0.0
        pairs = zip(tree_leaves(self._run(change)), tree_leaves(self.wanted), strict=True)
        for have, want in pairs:
            if isinstance(want, Tensor) and want.is_floating_point() and want.numel():
                size = float(want.abs().max()) or 1.0
                largest = max(largest, float((have - want).abs().max()) / size)
        return largest

    def _run(self, change: Change | None) -> list[Any]:
        trial = copied(self.who, self.model).eval()
        if self.double is not None:
            trial = trial.double() if self.double else trial.float()
        if change is not None:
            change(trial)
        outputs = []
        for example in self.examples:
            args, kwargs = tree_map(self._copied, example)
            with torch.no_grad(), undisturbed(self.model):
                outputs.append(trial(*args, **kwargs))
        return outputs

    def _copied(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if self.double is None or not value.is_floating_point():
            return value
        return value.double() if self.double else value.float()


def _close(have: Any, want: Any) -> bool:
    """Whether outputs are equal up to rounding; compares the tensors in collections and objects."""
    if isinstance(want, Tensor):
        if not isinstance(have, Tensor) or have.shape != want.shape:
            return False
        if not want.is_floating_point():
            return torch.equal(have, want)
        # A change rounds differently in each layer, by an amount that grows with the values' size.
        finite = want[want.isfinite()].abs()
        size = float(finite.max()) if finite.numel() else 0.0
        tolerance = 1e3 * torch.finfo(want.dtype).eps * max(size, torch.finfo(want.dtype).tiny)
        return torch.allclose(have, want, rtol=0.0, atol=tolerance, equal_nan=True)
    if type(have) is not type(want):
        return False
    if isinstance(want, Mapping):
        return have.keys() == want.keys() and all(_close(have[k], v) for k, v in want.items())
    if isinstance(want, (tuple, list)):
        return len(have) == len(want) and all(map(_close, have, want))
    if dataclasses.is_dataclass(want):
        return _close(vars(have), vars(want))
    return True
