"""What gets a width of its own, quantizers alone or several together, and what the widths cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from torch_ext.calibration.change_bits import bits_of
from torch_ext.correction.widths.bit_choice import Bits, Budget
from torch_ext.correction.widths.bit_search import BitCosts
from torch_ext.correction.widths.products import Product
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel

_FLOAT_BITS = 32  # of a factor that is not quantized
_BYTE = 8


class BitUnit(NamedTuple):
    """Quantizers that have the same width, and the widths on offer."""

    names: tuple[str, ...]
    offered: tuple[Bits, ...]
    widths: tuple[int, ...]  # those on offer as numbers


class BitPlan:
    """The units that a budget chooses for, and the cost of their widths.

    Quantizers that are in no unit cost what they cost with the bits that they have.

    Args:
        prepared: the model.
        chosen: the quantizers that may be in a unit, by name.
        of: what the cost is.
        offered: the widths on offer.
        products: what the forward multiplies, by :func:`count_products`; needed for operations and
            with ``pairs``.
        samples: the samples of the batch that they were counted on.
        pairs: whether factors of one product are in the same unit.

    Attributes:
        units: in the order of the model's quantizers.
        costs: by unit: bytes, or bit operations of one sample.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        chosen: Mapping[str, FakeQuantize],
        of: Budget,
        offered: tuple[Bits, ...],
        products: Sequence[Product],
        samples: int,
        pairs: bool,
    ) -> None:
        self._quantizers = prepared.quantizers
        self._sizes = _sizes(prepared)  # values and float bits of each weight
        self._products = products
        self._samples = samples
        factors = {name for product in products for name in product.factors}
        counted = self._sizes if of == "size" else factors
        groups = _groups(chosen, products if pairs else ())
        self.units = [
            self._unit(group, offered, of)
            for group in groups
            if any(name in counted for name in group)
        ]
        self._place = {name: i for i, unit in enumerate(self.units) for name in unit.names}
        self.costs = BitCosts(len(self.units))
        if of == "size":
            for name, (values, _) in self._sizes.items():
                self._add(values / _BYTE, (name,))
        else:
            for product in products:
                self._add(product.macs / samples, product.factors)

    def at(self, bits: int) -> float:
        """The cost with all units at one width."""
        return self.costs.total(np.full(len(self.units), float(bits)))

    def least(self) -> float:
        """The cost with all units at the fewest bits on offer."""
        return self.costs.total(np.array([float(min(unit.widths)) for unit in self.units]))

    def of_options(self, options: Sequence[int]) -> float:
        """The cost with one option for each unit."""
        widths = [u.widths[option] for u, option in zip(self.units, options, strict=True)]
        return self.costs.total(np.array(widths, float))

    def size(self, name: str, given: Mapping[str, Bits]) -> float:
        """The bytes of a quantizer's weight with given widths; 0 for an activation."""
        if name not in self._sizes:
            return 0.0
        values, in_float = self._sizes[name]
        return values * _number(given[name], in_float) / _BYTE

    def operations(self, name: str, given: Mapping[str, Bits]) -> float | None:
        """The bit operations, for one sample, of the products that a quantizer is a factor of.

        None if no products were counted.
        """
        if not self._products:
            return None
        return sum(
            product.macs * self._bits(product.factors[0], given)
            * self._bits(product.factors[1], given)
            for product in self._products
            if name in product.factors
        ) / self._samples  # fmt: skip

    def _bits(self, name: str | None, given: Mapping[str, Bits]) -> int:
        if name is None:
            return _FLOAT_BITS
        return _number(given.get(name, bits_of(self._quantizers[name])), _FLOAT_BITS)

    def _unit(self, names: tuple[str, ...], offered: tuple[Bits, ...], of: Budget) -> BitUnit:
        in_float = [self._sizes[name][1] for name in names if name in self._sizes]
        wide = max(in_float) if of == "size" else _FLOAT_BITS
        return BitUnit(names, offered, tuple(_number(bits, wide) for bits in offered))

    def _add(self, amount: float, factors: Sequence[str | None]) -> None:
        units = []
        for name in factors:
            if name in self._place:
                units.append(self._place[name])
            else:
                amount *= self._bits(name, {})
        self.costs.add(amount, units)


def _number(bits: Bits, in_float: int) -> int:
    return in_float if bits == "float" else bits


def _sizes(prepared: PreparedModel) -> dict[str, tuple[int, int]]:
    """The number of values of each quantized weight, and the bits of one in float."""
    sizes = {}
    for name, quantizer in prepared.quantizers.items():
        weight = prepared.read_weight(quantizer) if quantizer.transient else None
        if weight is not None:
            sizes[name] = (weight.numel(), _BYTE * weight.element_size())
    return sizes


def _groups(names: Iterable[str], products: Iterable[Product]) -> list[tuple[str, ...]]:
    """The names, those that are factors of one product together, also by way of others."""
    group = {name: [name] for name in names}
    for product in products:
        left, right = (group.get(factor or "", []) for factor in product.factors)
        if left and right and left is not right:
            left += right
            group |= dict.fromkeys(right, left)
    order = {name: place for place, name in enumerate(group)}
    found = {id(members): sorted(members, key=order.__getitem__) for members in group.values()}
    return [tuple(members) for members in found.values()]
