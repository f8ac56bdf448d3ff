"""Which modules are quantized, and what of them."""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import nn
from torch.nn.modules import activation as _activation

from torch_ext.modules import Add, Cat, MatMul, Mul, QuantStub


class Target(NamedTuple):
    """The weights of a module that are quantized, their output axis, and whether its output is."""

    weights: tuple[str, ...]
    ch_axis: int
    output: bool


OUTPUT_ONLY = Target((), 0, True)
WEIGHTED = Target(("weight",), 0, True)
# Weights are [in, out / groups, ...]: with groups, channel j of every group shares one scale.
TRANSPOSED = Target(("weight",), 1, True)
_EMBEDDING = Target(("weight",), 0, False)
# The output of its out_proj is the attention's own; see `skips_output`.
_ATTENTION = Target(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0, True)

# Log-probabilities feed a loss, not a layer.
_NO_ACTIVATIONS = {"MultiheadAttention", "LogSoftmax"}

_TABLE: dict[type[nn.Module], Target] = {
    nn.Conv1d: WEIGHTED,
    nn.Conv2d: WEIGHTED,
    nn.Conv3d: WEIGHTED,
    nn.Linear: WEIGHTED,
    nn.ConvTranspose1d: TRANSPOSED,
    nn.ConvTranspose2d: TRANSPOSED,
    nn.ConvTranspose3d: TRANSPOSED,
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _EMBEDDING,
    nn.MultiheadAttention: _ATTENTION,
    **dict.fromkeys((Add, Cat, MatMul, Mul, QuantStub), OUTPUT_ONLY),
    **{
        getattr(_activation, name): OUTPUT_ONLY
        for name in _activation.__all__
        if name not in _NO_ACTIVATIONS
    },
}


def _from_torch_ao(module: str, name: str) -> type[nn.Module] | None:
    # A model that holds one has imported its module; nothing is imported for the others.
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def is_float_functional(module: nn.Module) -> bool:
    """torch.ao's FloatFunctional, which runs ``activation_post_process`` on each result."""
    kind = _from_torch_ao("torch.ao.nn.quantized.modules.functional_modules", "FloatFunctional")
    return kind is not None and isinstance(module, kind)


def is_quant_stub(module: nn.Module) -> bool:
    """Ours or torch.ao's, which asks for its output to be quantized."""
    stub = _from_torch_ao("torch.ao.quantization.stubs", "QuantStub")
    return isinstance(module, QuantStub) or (stub is not None and isinstance(module, stub))


def target_of(module: nn.Module) -> Target | None:
    """What of a module is quantized; None for a kind that is not listed."""
    if is_float_functional(module) or is_quant_stub(module):
        return OUTPUT_ONLY
    for kind in type(module).__mro__:
        if kind in _TABLE:
            return _TABLE[kind]
    return None


def skips_output(parent: nn.Module | None, module: nn.Module) -> bool:
    """Whether a parent uses the module's weight without calling it."""
    return isinstance(parent, nn.MultiheadAttention) and module is parent.out_proj
