"""The module types that are quantized: which of their weights, arguments and outputs."""

from __future__ import annotations

import enum
import sys
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import activation as _activation
from torch.nn.modules.conv import _ConvNd as _Convolution

from torch_ext.modules import Add, Cat, MatMul, Mul, QuantStub


class Reads(enum.Enum):
    """Which arguments of its forward a module reads quantized."""

    NOTHING = 0
    FIRST = 1  # the input of a layer; its other arguments are sizes
    EACH = 2  # without a default value
    PAIR = 3  # each, if all are floating tensors


class Target(NamedTuple):
    """What is quantized of a module."""

    weights: tuple[str, ...]  # names of parameters
    ch_axis: int = 0  # the axis of the weights' output channels
    reads: Reads = Reads.NOTHING
    output: bool = False  # whether the output is quantized
    in_axis: int = 1  # the axis of the weights' inputs


OUTPUT_ONLY = Target((), output=True)
WEIGHTED = Target(("weight",), 0, Reads.FIRST)
# Weights are [in, out / groups, ...]; see `grouped_shape`.
TRANSPOSED = Target(("weight",), 1, Reads.FIRST, in_axis=0)
_EMBEDDING = Target(("weight",))
_ATTENTION = Target(
    ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0, Reads.EACH
)
_CELL = Target(("weight_ih", "weight_hh"))
_OPERANDS, _PAIR = Target((), reads=Reads.EACH), Target((), reads=Reads.PAIR)
NOTHING = Target(())

# In torch's list of activations, but with an entry of its own.
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(_activation, name) for name in _activation.__all__ if name != "MultiheadAttention"
)

_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_TABLE: dict[type[nn.Module], Target] = {
    nn.Conv1d: WEIGHTED,
    nn.Conv2d: WEIGHTED,
    nn.Conv3d: WEIGHTED,
    nn.Linear: WEIGHTED,
    **dict.fromkeys(_TRANSPOSED_CONVOLUTIONS, TRANSPOSED),
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _EMBEDDING,
    nn.MultiheadAttention: _ATTENTION,
    **dict.fromkeys((nn.LSTMCell, nn.GRUCell, nn.RNNCell), _CELL),
    **dict.fromkeys((Cat, MatMul), _OPERANDS),
    **dict.fromkeys((Add, Mul), _PAIR),
    QuantStub: OUTPUT_ONLY,
    **dict.fromkeys(_ACTIVATIONS, NOTHING),
}


def _from_torch_ao(module: str, name: str) -> type[nn.Module] | None:
    # A model with such a module has imported its class, so nothing has to be imported here.
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) else None


def is_float_functional(module: nn.Module) -> bool:
    """Whether it is torch.ao's FloatFunctional, which calls ``activation_post_process`` itself."""
    kind = _from_torch_ao("torch.ao.nn.quantized.modules.functional_modules", "FloatFunctional")
    return kind is not None and isinstance(module, kind)


def is_quant_stub(module: nn.Module) -> bool:
    """Whether it is this package's QuantStub or torch.ao's."""
    stub = _from_torch_ao("torch.ao.quantization.stubs", "QuantStub")
    return isinstance(module, QuantStub) or (stub is not None and isinstance(module, stub))


def is_activation(module: nn.Module) -> bool:
    """Whether it is an activation function of torch; a subclass may do more."""
    return type(module) in _ACTIVATIONS


def target_of(module: nn.Module) -> Target | None:
    """What is quantized of a module; None if its type and their bases are not in the table."""
    if is_float_functional(module) or is_quant_stub(module):
        return OUTPUT_ONLY
    if isinstance(module, nn.RNNBase):  # LSTM, GRU, RNN: the names depend on layers and directions
        names = (name for name in module._flat_weights_names if name.startswith("weight"))
        return Target(tuple(names))
    for kind in type(module).__mro__:
        if kind in _TABLE:
            return _TABLE[kind]
    return None


def grouped_shape(module: nn.Module, shape: torch.Size) -> tuple[int, torch.Size]:
    """The groups of a transposed convolution, and its weight's shape [in / groups, out, ...].

    Other layers have 1 and the shape itself: with groups, their axis 0 has every output channel.
    """
    if not isinstance(module, _TRANSPOSED_CONVOLUTIONS) or module.groups == 1:
        return 1, shape
    groups = module.groups
    return groups, torch.Size((shape[0] // groups, shape[1] * groups, *shape[2:]))


def is_out_proj(parent: nn.Module | None, module: nn.Module) -> bool:
    """Whether the parent is an attention that reads the module's weight without calling it."""
    return isinstance(parent, nn.MultiheadAttention) and module is parent.out_proj


def is_sum(module: nn.Module) -> bool:
    """Whether it computes no product of its operands' channels, such as a sum."""
    return isinstance(module, (Add, Mul, Cat))


def axis_of_argument(module: nn.Module, position: int) -> int:
    """The axis, from the end, that a layer sums over in what it reads."""
    if isinstance(module, MatMul):
        return -1 - position
    return -1 - len(module.kernel_size) if isinstance(module, _Convolution) else -1
