"""Walks a prepared model's layers with quantized weights in the order of their execution.

The model's own forward runs. A layer is seen where its weight meets its input, in a convolution or
linear function of torch: there the input has been quantized, and nothing follows yet. For that the
weight is handed out in a class of tensors of ours, which torch's functions ask before they compute
(``__torch_function__``). What is computed does not change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from torch_ext.correction.walk.data_walk import DataWalk
from torch_ext.prepare.batch_norms.pair import LAYERS
from torch_ext.prepare.quantizable_modules import is_out_proj
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import (
    AnyWeightSource,
    HookedWeight,
    Pattern,
    PreparedModel,
    clean_name,
)
from torch_ext.utils.batches import Forward
from torch_ext.utils.text import shown

# The functions in which a layer's weight meets its input, and how many axes follow the channels'.
_SPATIAL: dict[Any, int] = {
    F.linear: 0,
    **{getattr(F, f"conv{n}d"): n for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): n for n in (1, 2, 3)},
}
_TENSORS = ("input", "weight", "bias")


class WalkedLayer(NamedTuple):
    """A convolution, transposed convolution or linear layer whose weight is quantized."""

    name: str
    module: nn.Module
    quantizer: FakeQuantize  # of its weight
    source: AnyWeightSource  # where the quantizer reads it


class LayerCall:
    """One call of a layer's function, which has not computed anything yet.

    Tensors are the forward's own: copy what is kept, as later operations may write into them.

    Attributes:
        layer: whose weight it is.
        input: as the function reads it, quantized if its quantizer quantizes now.
        weight: the same of the weight.
        bias: as it is given; None if there is none.
        function: the convolution or linear function of torch.
        options, named_options: its further arguments (stride, padding, ...).
    """

    def __init__(self, layer: WalkedLayer, function: Any, args: Any, kwargs: Any) -> None:
        self.layer = layer
        given = dict(zip(_TENSORS, args, strict=False)) | kwargs
        self.input: Tensor = given.pop("input")
        self.weight: Tensor = given.pop("weight")
        self.bias: Tensor | None = given.pop("bias", None)
        self.function = function
        self.options = args[len(_TENSORS) :]  # stride, padding, ...
        self.named_options = given

    @property
    def name(self) -> str:
        return self.layer.name

    @functools.cached_property
    def output(self) -> Tensor:
        """What the function makes of input, weight and bias as they were given to it."""
        return self.of(self.input, self.weight, self.bias)

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the function makes of another input, weight or bias."""
        made: Tensor = self.function(x, weight, bias, *self.options, **self.named_options)
        return made

    def again(self) -> Tensor:
        """The output with the weight and bias that the layer has by now."""
        module, source = self.layer.module, self.layer.source
        hooked = isinstance(source, HookedWeight)
        weight = self.weight if hooked else _plain(getattr(module, source.parameter))
        bias: Any = getattr(module, "bias", None)
        return self.of(self.input, weight, bias)

    @property
    def ch_axis(self) -> int:
        """The axis of the output that holds its channels, counted from the end."""
        return -1 - _SPATIAL[self.function]


class LayerWalk(DataWalk[LayerCall]):
    """A walk over the calls of layers with quantized weights.

    Attributes:
        layers: all that may be walked, by name.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        data: Any,
        *,
        pattern: Pattern | None = None,
        forward: Forward | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Raises TypeError for arguments of a wrong kind, ValueError where there is no layer.

        Args:
            prepared: of the public function that errors name.
            data: batches that can be run over again.
            pattern: of quantizers; the layers are those whose weight's quantizer matches.
            forward, device: as in ``calibrate``.
        """
        self.layers, left = find_layers(prepared, pattern)
        super().__init__(prepared, data, list(self.layers), left, forward, device)

    def leave(self, name: str, why: str) -> None:
        super().leave(name, why)
        del self.layers[name]

    @contextlib.contextmanager
    def watched(self, at_call: Callable[[LayerCall], Any]) -> Iterator[None]:
        """Hands out the layers' weights watched; at the end all is as before."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers.values():
                source, hook = layer.source, functools.partial(_watch, layer, at_call)
                if isinstance(source, HookedWeight):
                    # The watched weight is assigned to the module.
                    kept = vars(source.module)[source.parameter]
                    stack.callback(setattr, source.module, source.parameter, kept)
                    stack.callback(layer.quantizer.register_forward_hook(hook).remove)
                else:
                    stack.callback(source.chain.register_forward_hook(hook).remove)
            yield


def _watch(
    layer: WalkedLayer,
    at_call: Callable[[LayerCall], Any],
    _: nn.Module,
    __: object,
    weight: Tensor,
) -> Tensor:
    """A forward hook of what computes the layer's weight."""
    watched = weight.as_subclass(_WatchedWeight)
    watched.plain = weight
    watched.called = lambda *given: at_call(LayerCall(layer, *given))
    return watched


class _WatchedWeight(Tensor):
    """A weight that tells when a convolution or linear function reads it."""

    plain: Tensor
    called: Callable[[Any, Any, Any], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        args, kwargs = tree_map(_plain, (args, kwargs))
        if func in _SPATIAL and isinstance(weight, _WatchedWeight):
            return weight.called(func, args, kwargs)
        return func(*args, **kwargs)


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, _WatchedWeight) else value


def find_layers(
    prepared: PreparedModel, pattern: Pattern | None
) -> tuple[dict[str, WalkedLayer], dict[str, str]]:
    """The layers whose weight's quantizer matches, by name; and why each other module is none.

    Raises:
        TypeError, ValueError: as ``select`` does for the pattern; or no layer matches.
    """
    modules = {clean_name(name): module for name, module in prepared.root.named_modules()}
    layers: dict[str, WalkedLayer] = {}
    left: dict[str, str] = {}
    chosen = prepared.select(pattern)
    for quantizer in chosen.values():
        source = prepared.weights.get(quantizer)
        if source is None:
            continue
        name, module = source.owner, modules[source.owner]
        parent = modules.get(name.rpartition(".")[0]) if name else None
        if not isinstance(module, LAYERS) or source.parameter != "weight":
            left[name] = f"a {type(module).__name__} is no convolution nor linear layer"
        elif is_out_proj(parent, module):
            left[name] = "attention reads its weight without calling it"
        else:
            layers[name] = WalkedLayer(name, module, quantizer, source)
    if not layers:
        raise ValueError(
            f"{prepared.who}: expected convolutions or linear layers with quantized weights, got "
            f"none among {shown(list(chosen))}"
        )
    return layers, left
