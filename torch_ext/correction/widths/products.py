"""Counts a model's multiplications while it runs, by the quantizers that made the two factors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.utils.batches import Forward, to_device
from torch_ext.utils.modes import forked_rng, uncompiled

_aten = torch.ops.aten


class Product(NamedTuple):
    """Products of the values of two tensors: of a layer's input and weight, or of two inputs."""

    #: The names of the quantizers that made the factors; None for one that is float.
    factors: tuple[str | None, str | None]
    #: Multiplications, whose results are added up.
    macs: int


def count_products(
    model: nn.Module,
    quantizers: Mapping[str, FakeQuantize],
    batch: Any,
    forward: Forward,
    device: torch.device,
) -> list[Product]:
    """Runs a model in VALIDATION on a batch; returns its products, one for each pair of factors.

    Convolutions, linear layers, products of matrices and attention are counted, whether modules or
    functions make them. A quantized tensor that is only moved (a view, a copy, a weight divided by
    a norm's factor) counts as quantized.
    """
    counter = _Counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(forked_rng(model))
        stack.enter_context(uncompiled())
        stack.enter_context(_without_onednn())
        for name, quantizer in quantizers.items():
            stack.enter_context(quantizer.replaced(counter.marks(name), after=True))
        stack.enter_context(counter)
        forward(model, to_device(batch, device))
    return [Product(factors, macs) for factors, macs in counter.macs.items()]


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Makes products of an LSTM, which oneDNN runs as one operation.

    ``torch.backends.mkldnn.flags`` would set TF32 too, and warn.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each of torch's operations; `macs` by the quantizers of the factors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[tuple[str | None, str | None], int] = {}
        self._made_by: Any = WeakTensorKeyDictionary()  # tensor -> name of its quantizer

    def marks(self, name: str) -> Callable[[Tensor], Tensor]:
        """The function that notes what a quantizer made."""

        def mark(tensor: Tensor) -> Tensor:
            self._made_by[tensor] = name
            return tensor

        return mark

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in _PRODUCTS and func.namespace == "aten":
            with self:
                made = func.decompose(*args, **kwargs)
                if made is not NotImplemented:
                    return made
        made = func(*args, **kwargs)
        if packet in _PRODUCTS:
            for left, right, macs in _PRODUCTS[packet](args, made):
                factors = (self._maker(left), self._maker(right))
                self.macs[factors] = self.macs.get(factors, 0) + macs
        elif isinstance(made, Tensor) and (packet in _MOVES or _is_view(func)):
            name = self._maker(args[0]) if args else None
            if name is not None:
                self._made_by[made] = name
        return made

    def _maker(self, tensor: Any) -> str | None:
        return self._made_by.get(tensor) if isinstance(tensor, Tensor) else None


# The factors of a product and the number of multiplications.
_Factors = tuple[Tensor | None, Tensor | None, int]


def _convolution(args: Any, made: Tensor) -> Iterator[_Factors]:
    x, weight, transposed = args[0], args[1], args[6]
    taps = weight.numel() // weight.shape[0]
    yield x, weight, (x if transposed else made).numel() * taps


def _matrices(left: int) -> Callable[[Any, Tensor], Iterator[_Factors]]:
    def count(args: Any, made: Tensor) -> Iterator[_Factors]:
        a, b = args[left], args[left + 1]
        yield a, b, a.numel() * (b.shape[-1] if b.dim() > 1 else 1)

    return count


def _attention(args: Any, made: Any) -> Iterator[_Factors]:
    query, key, value = args[:3]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    yield query, key, scores * query.shape[-1]
    yield None, value, scores * value.shape[-1]


_PRODUCTS: dict[Any, Callable[[Any, Any], Iterator[_Factors]]] = {
    _aten.convolution: _convolution,
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.mv, _aten.dot), _matrices(0)),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addmv), _matrices(1)),
    **{
        packet: _attention
        for name in (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        )
        if (packet := getattr(_aten, name, None)) is not None
    },
}
# Beside views: what gives the values of its first argument, or a weight over a norm's factor.
_MOVES = {_aten.clone, _aten._unsafe_view, _aten._to_copy, _aten._reshape_alias, _aten.div}


def _is_view(func: Any) -> bool:
    """Whether the result shares memory with an argument that is not written to."""
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in func._schema.returns
    )
