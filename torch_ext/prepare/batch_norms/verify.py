"""Whether a model with folded batch norms computes what it computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torch_ext.prepare.batch_norms.fold import fold
from torch_ext.prepare.batch_norms.pair import Norms, Pair
from torch_ext.prepare.module_classes import copied
from torch_ext.utils.modes import undisturbed

# Positional and keyword arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def verified(model: nn.Module, norms: Norms, examples: list[Arguments]) -> Norms:
    """Keeps the pairs that do not change the outputs for the examples, in eval mode."""
    if not norms.pairs:
        return norms
    if _Outputs(model, examples, torch.float32).are_kept_by(norms.pairs):
        return norms
    # Float64 is slow, and tells a wrong pair from rounding that a deep model amplifies.
    outputs = _Outputs(model, examples, torch.float64)
    if outputs.are_kept_by(norms.pairs):
        return norms
    pairs: list[Pair] = []
    left = dict(norms.left)
    for pair in norms.pairs:
        if outputs.are_kept_by([*pairs, pair]):
            pairs.append(pair)
        else:
            left[pair.norm] = f"folded into {pair.layer}, the model gives other outputs"
    return Norms(pairs, left)


class _Outputs:
    """A model, and its outputs for the examples."""

    def __init__(self, model: nn.Module, examples: list[Arguments], least: torch.dtype) -> None:
        """``least``: what lower precision becomes in the runs, if the model runs in it."""
        self.model, self.examples = model, examples
        dtypes = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
        self.double: bool | None = torch.float64 in {least, *dtypes}
        try:
            self.wanted = self._run([])
        except Exception:  # the user's forward, which may ask for its own dtype
            self.double = None
            self.wanted = self._run([])

    def are_kept_by(self, pairs: list[Pair]) -> bool:
        try:
            return _close(self._run(pairs), self.wanted)
        except Exception:  # such as where the forward reads attributes of a norm that is gone
            return False

    def _run(self, pairs: list[Pair]) -> list[Any]:
        trial = copied("fuse", self.model).eval()
        if self.double is not None:
            trial = trial.double() if self.double else trial.float()
        for pair in pairs:
            fold(trial, pair)
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
        # Folding rounds differently in each layer, by an amount that grows with the values' size.
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
