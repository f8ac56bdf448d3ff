"""Which axes of a weight its scales are of: of channels, or of the groups that lie along one."""

from __future__ import annotations

import torch

from torch_ext.prepare.quantizable_modules import Target
from torch_ext.quantizers.dynamic import DynamicFakeQuantize
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.parts.groups import INPUT_AXIS


class WeightAxes:
    """Finds the keys of weights' quantizers, and notes the weights that groups do not divide.

    Attributes:
        undivided: the module's name, and what is wrong.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self.undivided: list[tuple[str, str]] = []

    def keys(
        self, where: str, made: FakeQuantize, target: Target, shape: torch.Size, owner: str
    ) -> dict[str, object]:
        """The keys that a factory gets for a weight, with its axes as in ``target``.

        Args:
            where: the quantizer's name, for errors.
            made: a quantizer that the factory made.
            target: the weight's axes.
            shape: the weight's.
            owner: the name of the module that has the weight.
        """
        axis, size = made.observer.ch_axis, made.observer.group_size
        if isinstance(made, DynamicFakeQuantize):
            axis, size = made.axis if made.axis_given else INPUT_AXIS, made.group_size
        elif axis < 0:
            return {"transient": True}
        # Axis 0 in a QConfig means the output channels, and 1 of groups the inputs.
        if axis == 0:
            axis = target.ch_axis
        elif axis == INPUT_AXIS and size is not None:
            axis = target.in_axis
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{self._who}: {where}: expected ch_axis to be below {len(shape)}, got {axis}; 0 "
                "means the output channels of every layer"
            )
        if size is not None and shape[axis] % size:
            problem = f"{where}: {shape[axis]} on axis {axis}, group_size {size}"
            self.undivided.append((owner, problem))
        if made.is_dynamic:
            return {"transient": True, "ch_axis": axis}
        channels = shape[axis] if size is None else max(1, shape.numel() // size)
        return {"transient": True, "ch_axis": axis, "channel_len": channels}

    def computed_keys(
        self, where: str, made: FakeQuantize, target: Target, shape: torch.Size, owner: str
    ) -> dict[str, object]:
        """The keys for a weight that the forward computes, which is observed like an activation.

        Its groups have dynamic scales: they are those that ``min_max`` gives to groups of a weight.
        """
        keys = self.keys(where, made, target, shape, owner) | {"transient": False}
        if made.is_dynamic or made.observer.group_size is None:
            return keys
        if (made.method, made.observer.name) != ("fake_quant", "min_max"):
            raise ValueError(
                f"{self._who}: {where}: expected method fake_quant and observer min_max with "
                "group_size for a weight that the forward computes, got "
                f"{made.method} and {made.observer.name}: scales of its groups come from the "
                "values of each call; give its module a QConfig without group_size, or with "
                "min_max, by mapping"
            )
        kind = "symmetric" if made.observer.symmetric else "affine"
        del keys["channel_len"]
        return keys | {"dynamic": True, "qscheme": f"per_tensor_{kind}"}
