"""The weight of a convolution or linear layer, as rows of output channels by input channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from torch_ext.prepare.insertion.operations import added_weight, operation, weight_of
from torch_ext.prepare.insertion.recording import Recording

# The axis of a layer's channels, from the back, in its input and in its output.
CHANNELS = {
    "linear": -1,
    "addmm": -1,
    **{f"conv{n}d": -1 - n for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": -1 - n for n in (1, 2, 3)},
}


class LayerWeight(NamedTuple):
    """One in one model. ``weight`` and ``bias`` are names of parameters; the bias may be none."""

    name: str  # of the layer
    weight: str
    bias: str
    kind: str  # torch's name of its function
    groups: int
    bordered: bool  # whether zeros are read around the input
    taps_vary: bool  # whether places of the output sum different numbers of products

    @property
    def axis(self) -> int:
        """The axis of the channels of its input and of its output, from the back."""
        return CHANNELS[self.kind]

    def as_rows(self, weight: Tensor) -> Tensor:
        """The weight as [out, in / groups, ...]."""
        if self.kind == "addmm":
            return weight.t()
        if not self.kind.startswith("conv_transpose"):
            return weight
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])  # [g, in / g, out / g, ...]
        return grouped.transpose(1, 2).flatten(0, 1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The layer's own layout of what :meth:`as_rows` gives."""
        if self.kind == "addmm":
            return rows.t()
        if not self.kind.startswith("conv_transpose"):
            return rows
        grouped = rows.reshape(self.groups, -1, *rows.shape[1:])  # [g, out / g, in / g, ...]
        return grouped.transpose(1, 2).flatten(0, 1)

    def spread(self, columns: Tensor, rows: Tensor) -> Tensor:
        """One value an input channel, [in], as it meets the entries of [out, in / groups, ...]."""
        grouped = columns.view(self.groups, 1, -1)
        spread = grouped.expand(-1, rows.shape[0] // self.groups, -1).reshape(rows.shape[:2])
        return spread.view(*rows.shape[:2], *[1] * (rows.dim() - 2))

    def by_input(self, magnitudes: Tensor) -> Tensor:
        """The largest of [out, in / groups] for each input channel: [in]."""
        grouped = magnitudes.view(self.groups, -1, magnitudes.shape[1])
        return grouped.amax(1).flatten()

    def of_constant(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """What the layer gives without its bias, [out], where each input channel is constant."""
        return (
            (rows.flatten(2).sum(2) if rows.dim() > 2 else rows)
            .mul(self.spread(inputs, rows).view(rows.shape[:2]))
            .sum(1)
        )


def layer_weight(recording: Recording, node: fx.Node) -> LayerWeight | str | None:
    """The weight of a layer's node, why it cannot be changed, or None for other nodes."""
    kind = operation(recording, node)
    if kind not in CHANNELS:
        return None
    if node.op == "call_module":
        name = str(node.target)
        module = recording.model.get_submodule(name)
        return LayerWeight(
            name,
            f"{name}.weight",
            f"{name}.bias",
            kind,
            getattr(module, "groups", 1),
            _is_bordered(getattr(module, "padding", 0), getattr(module, "padding_mode", "zeros")),
            "transpose" in kind,
        )
    if kind == "addmm":
        added = added_weight(recording, node)
        if added is None:
            return None  # a product of two computed values
        source: fx.Node | None = added[0]
        kind = "addmm" if added[1] else "linear"
        bias: object = node.args[0] if node.args else node.kwargs.get("input")
    else:
        source, bias = weight_of(node), _argument(node, 2, "bias")
    owner = recording.owners[node] or "the model"
    if source is None or source.op != "get_attr":
        return f"the forward of {owner} computes its weight"
    weight = str(source.target)
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return f"the forward of {owner} computes its bias"
    groups = _argument(node, 6, "groups")
    holder, _, own = weight.rpartition(".")
    return LayerWeight(
        holder if own == "weight" else weight,  # such as the three projections of attention
        weight,
        str(bias.target) if isinstance(bias, fx.Node) else "",
        kind,
        groups if isinstance(groups, int) and kind.startswith("conv") else 1,
        kind.startswith("conv") and _is_bordered(_argument(node, 4, "padding"), "zeros"),
        "transpose" in kind,
    )


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _is_bordered(padding: object, mode: object) -> bool:
    if padding is None or padding == "valid" or mode != "zeros":
        return False
    if isinstance(padding, str):
        return True
    sizes = padding if isinstance(padding, (tuple, list)) else (padding,)
    return any(size != 0 for size in sizes)


def tensor_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by name; behind quantizers the one that they read."""
    holder_name, _, own = name.rpartition(".")
    holder = model.get_submodule(holder_name)
    chains = getattr(holder, "parametrizations", None)
    if isinstance(chains, nn.ModuleDict) and own in chains:
        original = chains[own].original
        return original if isinstance(original, Tensor) else None
    return holder._parameters.get(own, holder._buffers.get(own))


@torch.no_grad()
def magnitudes(weight: Tensor, layer: LayerWeight) -> Tensor:
    """The largest magnitude of each pair of channels, [out, in / groups]."""
    rows = layer.as_rows(weight).abs()
    largest = rows.flatten(2).amax(2) if rows.dim() > 2 else rows
    return largest.to(torch.promote_types(rows.dtype, torch.float32))
