"""Where groups lie that share a dynamic scale: along what each product sums over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from torch_ext.prepare.qconfig import Factory
from torch_ext.prepare.quantizable_modules import axis_of_argument
from torch_ext.quantizers.dynamic import DynamicFakeQuantize
from torch_ext.quantizers.fake_quantize import FakeQuantize


class Reader(NamedTuple):
    """What reads a value."""

    module: str  # the layer's name, or of the module whose forward calls the function
    what: str  # the operation
    groups: int = 1  # of a convolution
    is_function: bool = False


class DynamicAxes:
    """The axes of reads through quantizers with dynamic scales, and reads that do not fit.

    Attributes:
        problems: why a quantizer cannot read what it is to read, by its name and the reader.
        found: the axes of each quantizer's reads, by its name.
    """

    def __init__(self) -> None:
        self.problems: dict[tuple[str, Reader], str] = {}
        self.found: dict[str, set[int]] = {}
        # By the factory's address; with the factory, so that none is used twice.
        self._made: dict[int, tuple[Factory, DynamicFakeQuantize | None]] = {}

    def quantizer(self, factory: Factory) -> DynamicFakeQuantize | None:
        """One that the factory makes, if its scales are dynamic."""
        if id(factory) not in self._made:
            try:
                made = factory()
            except (TypeError, ValueError, RuntimeError):
                made = None  # raised by name where it is made for a place
            dynamic = made if isinstance(made, DynamicFakeQuantize) else None
            self._made[id(factory)] = (factory, dynamic)
        return self._made[id(factory)][1]

    def follows_readers(self, factory: Factory) -> bool:
        """Whether a value is quantized where it is read, as only readers tell the axis."""
        quantizer = self.quantizer(factory)
        return quantizer is not None and not quantizer.axis_given

    def divides(self, factory: Factory, shape: Sequence[int], axis: int | None) -> bool:
        """Whether groups fit along an axis that is not given; True where it is not known."""
        quantizer = self.quantizer(factory)
        if quantizer is None or quantizer.axis_given or quantizer.group_size is None:
            return True
        return axis is None or shape[axis] % quantizer.group_size == 0

    def of_read(
        self, reader: Reader, axis: int | None, shape: Sequence[int], factory: Factory, name: str
    ) -> int | None:
        """The axis of a read by a quantizer of that name; None if that is not to be told.

        ``axis``: what the reader sums over, None where that is not known.
        """
        quantizer = self.quantizer(factory)
        if quantizer is None:
            return None
        place = quantizer.axis if quantizer.axis_given else axis
        if place is None:
            why = f"what {reader.what} sums over is not known; give it ch_axis"
            self.problems[name, reader] = why
            return None
        self.check(name, reader, quantizer, shape, place)
        return None if quantizer.axis_given else place

    def check(
        self,
        name: str,
        reader: Reader,
        quantizer: DynamicFakeQuantize,
        shape: Sequence[int],
        axis: int,
    ) -> None:
        """Notes the axis of a read, and a problem if groups do not fit into the shape."""
        self.found.setdefault(name, set()).add(axis)
        size = quantizer.group_size
        what = f'{reader.what} in "{reader.module}" reads'
        if not -len(shape) <= axis < len(shape):
            self.problems[name, reader] = f"{what} {list(shape)}, which has no axis {axis}"
        elif size is not None:
            # A sum is of the channels of one group of a convolution.
            summed = shape[axis] if quantizer.axis_given else shape[axis] // reader.groups
            if summed % size:
                each = f", {summed} in each sum" if summed != shape[axis] else ""
                self.problems[name, reader] = (
                    f"{what} {shape[axis]} values along axis {axis}{each}, no multiple of "
                    f"group_size {size}"
                )

    def of_module(
        self, path: str, module: nn.Module, quantizer: DynamicFakeQuantize, names: Sequence[str]
    ) -> None:
        """Notes along which axis a module sums over what it reads through quantizers of names."""
        size = getattr(module, "in_features", getattr(module, "in_channels", None))
        reader = Reader(path, type(module).__name__, getattr(module, "groups", 1))
        for i, name in enumerate(names):
            axis = axis_of_argument(module, i)
            if not quantizer.axis_given:
                # Of other modules the size is not known before they are called.
                shape = [size or quantizer.group_size or 1] * -axis
                self.check(name, reader, quantizer, shape, axis)

    def set_axes(self, named: Mapping[str, FakeQuantize]) -> None:
        """Tells quantizers along which axis groups lie."""
        for name, axes in self.found.items():
            quantizer = named[name]
            if isinstance(quantizer, DynamicFakeQuantize) and len(axes) == 1:
                (quantizer.axis,) = axes  # else each read has its own
