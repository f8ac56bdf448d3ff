"""Where groups lie that share a dynamic scale: along what each product sums over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from torch_ext.prepare.insertion.operations import operation, summed_axis
from torch_ext.prepare.insertion.run_graph import RunGraph
from torch_ext.prepare.qconfig import Factory
from torch_ext.quantizers.dynamic import DynamicFakeQuantize


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

    def of_read(
        self, run: RunGraph, reader: fx.Node, operand: fx.Node, place: int | str,
        factory: Factory, name: str,
    ) -> int | None:  # fmt: skip
        """The axis of a read by a quantizer of that name; None if its scales are not dynamic."""
        quantizer = self.quantizer(factory)
        if quantizer is None:
            return None
        axis = quantizer.axis if quantizer.axis_given else summed_axis(run, reader, place)
        what = operation(run, reader)
        if axis is None:
            self.problems[name] = f"what {what} sums over is not known; give it ch_axis"
            return None
        self.check(name, f"{what} reads", quantizer, run.values[operand].shape, axis)
        return None if quantizer.axis_given else axis

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

    def refuse(self, who: str) -> None:
        """Raises ValueError that lists the problems, if there are some."""
        if self.problems:
            lines = [f"  {name}: {why}" for name, why in self.problems.items()]
            raise ValueError(
                f"{who}: expected groups of dynamic scales to fit what is read, got "
                f"{len(lines)} that do not; give these modules qconfig=None, or another by "
                "mapping\n" + "\n".join(lines)
            )
