"""What the engines that take quantized programs of PT2E run in integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from torch_ext.export.common.aten import aten_name
from torch_ext.export.common.entries import Entry
from torch_ext.quantizers.grid import dtype_name
from torch_ext.utils.backends import BACKENDS, BackendGrid, QuantizedResults, backend_grids

ProgramBackend = Literal["x86", "xnnpack"]
OUTPUT_IN_FLOAT = "its output is not quantized"  # a reason of `float_reason`

#: ATen's names of the layers that have a weight.
LAYERS = (
    "linear", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
_TRANSPOSED_GROUPS = 6  # the position of `groups` among a transposed convolution's arguments


@dataclass(frozen=True)
class ProgramEngine:
    """An engine's grids, and its layers."""

    name: str  # for messages
    activation: BackendGrid
    weight: BackendGrid
    layers: tuple[str, ...]  # ATen's names of those that it runs in integers
    results: QuantizedResults | None  # those of which the result has to be quantized too
    torchao: bool  # whether torchao lowers programs to it, which takes some shapes only

    @property
    def dtype(self) -> torch.dtype:
        """That of activations."""
        made: torch.dtype = getattr(torch, self.activation.dtype)
        return made


PROGRAM_ENGINES = {
    "x86": ProgramEngine(
        "Inductor", *backend_grids("export.pt2e", "x86"),
        layers=("linear", "conv1d", "conv2d"), results=BACKENDS["x86"].results, torchao=True,
    ),
    "xnnpack": ProgramEngine(
        "XNNPACK", *backend_grids("export.pt2e", "xnnpack"),
        layers=("linear", "conv1d", "conv2d", "conv_transpose2d"),
        results=BACKENDS["xnnpack"].results, torchao=False,
    ),
}  # fmt: skip


def engine_problem(entry: Entry, engine: ProgramEngine) -> str:
    """Why the engine does not take a quantizer's grid; empty if it does."""
    params, channels = entry.params, len(entry.scale)
    if entry.groups:
        return entry.groups
    if entry.is_weight:
        if bool(entry.zero_point.any()):
            return "its zero point is not 0"
        least, most = engine.weight.quant_min, engine.weight.quant_max
        if params.quant_min < least or params.quant_max > most:
            return f"its grid is {params.values}, not within [{least}, {most}]"
        return ""
    if params.ch_axis >= 0 or channels > 1:
        return f"it quantizes an activation per channel (axis {params.ch_axis})"
    kind = "" if params.is_float else f"{dtype_name(entry.quantizer.observer.dtype)} "
    want = engine.activation
    if (params.quant_min, params.quant_max) != (want.quant_min, want.quant_max):
        wanted = f"{want.dtype} [{want.quant_min}, {want.quant_max}]"
        return f"its grid is {kind}{params.values}, not {wanted}"
    return ""


def float_reason(
    layer: fx.Node, engine: ProgramEngine, quantizers: dict[fx.Node, Entry], weight: fx.Node
) -> str:
    """Why the engine computes a node that reads a quantized weight in float; empty if it does not.

    `quantizers` has the entries of all quantizers' nodes.
    """
    kind = aten_name(layer)
    if kind not in LAYERS or layer.args[1] is not weight:
        return f"its weight is read by {kind or layer.name}"
    if kind not in engine.layers:
        return f"{engine.name} has no {kind} of integers"
    if kind.startswith("conv_transpose") and _groups(layer) > 1:
        return f"{engine.name} has no {kind} of integers with groups"
    if not isinstance(layer.args[0], fx.Node) or layer.args[0] not in quantizers:
        return "its input is not quantized"
    results = engine.results
    if results and kind in results.layers and not _output_quantized(layer, results, quantizers):
        return OUTPUT_IN_FLOAT
    return ""


def _groups(layer: fx.Node) -> int:
    args = layer.args
    given = (
        args[_TRANSPOSED_GROUPS] if len(args) > _TRANSPOSED_GROUPS else layer.kwargs.get("groups")
    )
    return given if isinstance(given, int) else 1


def _output_quantized(
    layer: fx.Node, results: QuantizedResults, quantizers: dict[fx.Node, Entry]
) -> bool:
    """Whether the only reader of a layer, behind an activation that is fused with it, quantizes."""
    readers = list(layer.users)
    if len(readers) == 1 and aten_name(readers[0]) in results.activations:
        readers = list(readers[0].users)
    return len(readers) == 1 and readers[0] in quantizers
