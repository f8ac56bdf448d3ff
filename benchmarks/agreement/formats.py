"""Number formats for weights and activations, rounded to nearest, by the ops alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import torch_ext
from torch_ext import ops

TENSOR, CHANNEL = -1, 0  # values that share a scale; else the size of a group
INT8, E4M3, E5M2 = "[-128,127] affine", "float8_e4m3", "float8_e5m2"
LEAST = 2.0**-126  # of a scale
FLOOR = "scale_rule=floor"  # the Open Compute Project's scale of a block


@dataclass(frozen=True)
class Format:
    """A format of weights, and the activations that go with it.

    Attributes:
        grid: as the ops take it.
        share: TENSOR, CHANNEL, or the size of the groups along a layer's inputs.
        rule: of the weights' scales, ``"min_max"`` or ``"mse"``.
        activations: the grid of activations, per tensor, calibrated by ``mse``; or ``"token"``,
            the weights' grid on all inputs of a position, or ``"groups"``, the weights' format.
            These two take their scale from the values at hand.
        bits: of a weight, its share of the scale included.
    """

    grid: str
    share: int
    rule: str
    activations: str
    bits: float

    @property
    def numbers(self) -> str:
        """The grid without the words about its scale."""
        return self.grid.partition(" ")[0]


def groups(grid: str, size: int) -> Format:
    bits = {"float8": 8, "float6": 6, "float4": 4}.get(grid.partition("_")[0], 8)
    return Format(grid, size, "min_max", "groups", bits + 8 / size)


FORMATS: dict[str, Format] = {
    "int8 per channel": Format("[-127,127] symmetric", CHANNEL, "min_max", INT8, 8),
    "int8 per tensor": Format("[-127,127] symmetric", TENSOR, "min_max", INT8, 8),
    "int8 per channel, per token": Format("[-127,127] symmetric", CHANNEL, "min_max", "token", 8),
    "FP8 E4M3 per channel": Format(E4M3, CHANNEL, "min_max", E4M3, 8),
    "FP8 E4M3 per tensor": Format(E4M3, TENSOR, "min_max", E4M3, 8),
    "FP8 E4M3 per channel, per token": Format(E4M3, CHANNEL, "min_max", "token", 8),
    "FP8 E5M2 per channel": Format(E5M2, CHANNEL, "min_max", E5M2, 8),
    "FP8 E5M2 per tensor": Format(E5M2, TENSOR, "min_max", E5M2, 8),
    "MXINT8": groups(f"[-127,127] symmetric {FLOOR}", 32),
    "MXFP8 E4M3, ceil": groups(f"{E4M3} power_of_two", 32),
    "MXFP8 E4M3, floor": groups(f"{E4M3} {FLOOR}", 32),
    "int6 per channel": Format("[-32,31] symmetric", CHANNEL, "mse", INT8, 6),
    "MXFP6 E2M3, floor": groups(f"float6_e2m3 {FLOOR}", 32),
    "MXFP6 E3M2, floor": groups(f"float6_e3m2 {FLOOR}", 32),
    "int4 per channel": Format("[-8,7] symmetric", CHANNEL, "mse", INT8, 4),
    "int4, groups of 32": Format("[-8,7] symmetric", 32, "min_max", INT8, 5),
    "int4, groups of 16": Format("[-8,7] symmetric", 16, "min_max", INT8, 6),
    "MXFP4, ceil": groups("float4_e2m1 power_of_two", 32),
    "MXFP4, floor": groups(f"float4_e2m1 {FLOOR}", 32),
    "NVFP4": groups("float4_e2m1 scale_dtype=float8_e4m3", 16),
}


def layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights and inputs are quantized, by name."""
    return {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def on_grid(rows: Tensor, form: Format, share: int, largest: Tensor) -> Tensor:
    """Rows [R, K] on a format's numbers; a group that the end of a row cuts short is a group too.

    Args:
        largest: the magnitude [1] of which NVFP4 takes the scale of the tensor.
    """
    if form.rule == "mse":
        scale, zero = ops.qparams(ops.mse(rows, grid=form.grid, ch_axis=0), grid=form.grid)
        return ops.fake_quant(rows, scale, zero, ch_axis=0, grid=form.numbers)
    flat = rows.reshape(1, -1) if share == TENSOR else rows
    width = flat.shape[1]
    size = share if share > 0 else width
    whole = (largest / (448 * 6)).clamp_min(LEAST) if "scale_dtype" in form.grid else None
    padded = nn.functional.pad(flat, (0, -width % size))
    made = ops.dynamic_fake_quant(padded, size, grid=form.grid, tensor_scale=whole)
    return made[:, :width].reshape(rows.shape)


def weight_on_grid(weight: Tensor, form: Format) -> Tensor:
    """A weight [O, I, ...]; groups lie along what an output reads, the inputs side by side."""
    moved = weight.movedim(1, -1)
    rows = on_grid(moved.flatten(1), form, form.share, weight.abs().amax()[None])
    return rows.reshape(moved.shape).movedim(-1, 1)


def with_weights(net: nn.Module, form: Format) -> nn.Module:
    """A copy with quantized weights."""
    model = copy.deepcopy(net)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.weight.copy_(weight_on_grid(layer.weight, form))
    return model


def noise(net: nn.Module, form: Format) -> dict[str, float]:
    """For each layer the power of its weight over that of the error, in dB."""
    found = {}
    for name, layer in layers(net).items():
        weight = layer.weight.detach()
        error = (weight_on_grid(weight, form).double() - weight.double()).square().sum()
        power = weight.double().square().sum()
        if error > 0:
            found[name] = float(10 * torch.log10(power / error))
    return found


# Activations --------------------------------------------------------------------------------------

Seen = dict[str, torch_ext.Observer]  # what each layer read


def observe(net: nn.Module, run: Callable[[nn.Module], object]) -> Seen:
    """What the layers read while `run` calls the net."""
    seen = {name: torch_ext.Observer("mse") for name in layers(net)}
    hooks = [
        layer.register_forward_pre_hook(_observing(seen[name]))
        for name, layer in layers(net).items()
    ]
    run(net)
    for hook in hooks:
        hook.remove()
    return seen


def _observing(observer: nn.Module) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
        observer(args[0])

    return hook


def quantize_inputs(model: nn.Module, form: Format, seen: Seen) -> None:
    """Lets each layer read quantized values from now on."""
    for name, layer in layers(model).items():
        layer.register_forward_pre_hook(_quantizing(seen[name], form))


def _quantizing(observer: torch_ext.Observer, form: Format) -> Callable[..., Tensor]:
    largest = observer.extrema.abs().amax()[None]
    if form.activations in ("token", "groups"):
        share = CHANNEL if form.activations == "token" else form.share

        def values(x: Tensor) -> Tensor:
            moved = x.movedim(1, -1) if x.dim() == 4 else x
            made = on_grid(moved.reshape(-1, moved.shape[-1]), form, share, largest)
            made = made.reshape(moved.shape)
            return made.movedim(-1, 1) if x.dim() == 4 else made

    else:
        grid = form.activations
        statistics = (observer.extrema, observer.tally, observer.counts)
        scale, zero = ops.qparams(ops.solve("mse", *statistics, grid=grid), grid=grid)
        numbers = grid.partition(" ")[0]

        def values(x: Tensor) -> Tensor:
            return ops.fake_quant(x, scale, zero, grid=numbers)

    def hook(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
        return values(args[0])

    return hook
