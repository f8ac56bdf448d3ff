"""Where groups lie that share a dynamic scale: along what each product sums over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from torch_ext.prepare.qconfig import Factory
from torch_ext.prepare.quantizable_modules import axis_of_argument
from torch_ext.quantizers.dynamic import DynamicFakeQuantize
from torch_ext.quantizers.fake_quantize import FakeQuantize


class DynamicAxes:
    """The axes of reads through quantizers with dynamic scales, and reads that do not fit.

    Attributes:
        problems: why a quantizer cannot read what it is to read, by its name.
        found: the axes of each quantizer's reads, by its name.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
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

    def of_read(
        self, what: str, axis: int | None, shape: Sequence[int], factory: Factory, name: str
    ) -> int | None:
        """The axis of a read by a quantizer of that name; None if that is not to be told.

        ``what``: the reading operation; ``axis``: what it sums over, None where that is not known.
        """
        quantizer = self.quantizer(factory)
        if quantizer is None:
            return None
        place = quantizer.axis if quantizer.axis_given else axis
        if place is None:
            self.problems[name] = f"what {what} sums over is not known; give it ch_axis"
            return None
        self.check(name, f"{what} reads", quantizer, shape, place)
        return None if quantizer.axis_given else place

    def check(
        self, name: str, what: str, quantizer: DynamicFakeQuantize, shape: Sequence[int], axis: int
    ) -> None:
        """Notes the axis of a read, and a problem if groups do not fit into the shape."""
        self.found.setdefault(name, set()).add(axis)
        if not -len(shape) <= axis < len(shape):
            self.problems[name] = f"{what} {list(shape)}, which has no axis {axis}"
        elif quantizer.group_size is not None and shape[axis] % quantizer.group_size:
            self.problems[name] = (
                f"{what} {shape[axis]} values along axis {axis}, no multiple of group_size "
                f"{quantizer.group_size}"
            )

    def of_module(
        self, module: nn.Module, quantizer: DynamicFakeQuantize, names: Sequence[str]
    ) -> None:
        """Notes along which axis a module sums over what it reads through quantizers of names."""
        size = getattr(module, "in_features", getattr(module, "in_channels", None))
        for i, name in enumerate(names):
            axis = axis_of_argument(module, i)
            if not quantizer.axis_given:
                # Of other modules the size is not known before they are called.
                shape = [size or quantizer.group_size or 1] * -axis
                self.check(name, f"{type(module).__name__} reads", quantizer, shape, axis)

    def set_axes(self, who: str, named: Mapping[str, FakeQuantize]) -> None:
        """Tells quantizers along which axis groups lie; raises ValueError where they do not fit."""
        if self.problems:
            lines = [f"  {name}: {why}" for name, why in self.problems.items()]
            raise ValueError(
                f"{who}: expected groups of dynamic scales to fit what is read, got "
                f"{len(lines)} that do not; give these modules qconfig=None, or another by "
                "mapping\n" + "\n".join(lines)
            )
        for name, axes in self.found.items():
            quantizer = named[name]
            if isinstance(quantizer, DynamicFakeQuantize) and len(axes) == 1:
                (quantizer.axis,) = axes  # else each read has its own
