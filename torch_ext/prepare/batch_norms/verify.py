"""Whether a model with folded batch norms computes what it computed before."""

from __future__ import annotations

import torch
from torch import nn

from torch_ext.prepare.batch_norms.fold import fold
from torch_ext.prepare.batch_norms.outputs import Arguments, Change, Outputs
from torch_ext.prepare.batch_norms.pair import Norms, Pair


def verified(model: nn.Module, norms: Norms, examples: list[Arguments]) -> Norms:
    """Keeps the pairs that do not change the outputs for the examples, in eval mode."""
    if not norms.pairs:
        return norms
    if Outputs("fuse", model, examples, torch.float32).are_kept_by(_folding(norms.pairs)):
        return norms
    # Float64 is slow, and tells a wrong pair from rounding that a deep model amplifies.
    outputs = Outputs("fuse", model, examples, torch.float64)
    if outputs.are_kept_by(_folding(norms.pairs)):
        return norms
    pairs: list[Pair] = []
    left = dict(norms.left)
    for pair in norms.pairs:
        if outputs.are_kept_by(_folding([*pairs, pair])):
            pairs.append(pair)
        else:
            left[pair.norm] = f"folded into {pair.layer}, the model gives other outputs"
    return Norms(pairs, left)


def _folding(pairs: list[Pair]) -> Change:
    def change(model: nn.Module) -> None:
        for pair in pairs:
            fold(model, pair)

    return change
