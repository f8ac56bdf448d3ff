"""Puts calibrated quantizers on the grids of another engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from torch_ext.ops.registry import fake_quant_info
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.grid import Grid, dtype_name, parse_dtype, parse_qscheme
from torch_ext.quantizers.observer import Observer
from torch_ext.utils.backends import BackendGrid
from torch_ext.utils.text import label_of


@contextlib.contextmanager
def changed_grids(
    who: str,
    backend: str,
    grids: tuple[BackendGrid, BackendGrid],
    chosen: Mapping[str, FakeQuantize],
) -> Iterator[None]:
    """Gives quantizers a backend's grids; if what follows raises, they get their own back.

    Statistics stay, and so do ranges and scales, which the caller has to solve again.

    Args:
        who: the function that errors name.
        backend: the backend's name.
        grids: those of activations and of weights.
        chosen: the quantizers by name.

    Raises:
        ValueError: by name, for quantizers that cannot change; nothing has changed then.
    """
    wanted = {name: _wanted(who, quantizer, grids) for name, quantizer in chosen.items()}
    problems = {
        name: problem
        for name, quantizer in chosen.items()
        if (quantizer.is_dynamic or not _same(quantizer.observer, wanted[name]))
        and (problem := _why_not(quantizer, wanted[name]))
    }
    if problems:
        lines = [f"  {label_of(name)}: {why}" for name, why in problems.items()]
        raise ValueError(
            f'{who}: expected every quantizer to be one that can change to the grids of "{backend}"'
            f", got {len(problems)} that cannot; prepare with get_default_qconfig(backend="
            f'"{backend}") and calibrate, or leave them out by pattern\n' + "\n".join(lines)
        )
    before = [quantizer.observer.kept_settings() for quantizer in chosen.values()]
    try:
        for name, quantizer in chosen.items():
            quantizer.observer.set_grid(wanted[name])
        yield
    except BaseException:
        for restore in before:
            restore()
        raise


def on_backend_grid(
    who: str, quantizer: FakeQuantize, grids: tuple[BackendGrid, BackendGrid]
) -> bool:
    """Whether a quantizer has the grid of a backend, given those of activations and weights."""
    return _same(quantizer.observer, _wanted(who, quantizer, grids))


def _wanted(who: str, quantizer: FakeQuantize, grids: tuple[BackendGrid, BackendGrid]) -> Grid:
    """The backend's grid for a quantizer, with its channels if it has some in common."""
    observer, keys = quantizer.observer, grids[quantizer.transient].keys()
    if quantizer.transient and observer.ch_axis < 0:  # engines take a weight per tensor too
        keys["qscheme"] = keys["qscheme"].replace("per_channel", "per_tensor")
    channels = (observer.ch_axis, observer.channel_len)  # a backend has no groups
    dtype, qscheme = (
        parse_dtype(who, keys["dtype"])[0],
        parse_qscheme(who, keys["qscheme"]),
    )
    return Grid(dtype, qscheme, keys["quant_min"], keys["quant_max"], *channels)


def _why_not(quantizer: FakeQuantize, wanted: Grid) -> str:
    """Why a quantizer cannot change to the grid of an engine."""
    if quantizer.is_dynamic:
        return "its scales are dynamic, and the engine's are fixed"
    return why_grid_stays(quantizer, wanted)


def why_grid_stays(quantizer: FakeQuantize, wanted: Grid) -> str:
    """Why a quantizer cannot change to another grid without data; empty if it can."""
    observer = quantizer.observer
    grid = f"{dtype_name(wanted.dtype)} [{wanted.quant_min}, {wanted.quant_max}]"
    if observer.group_size != wanted.group_size:
        return f"it has a scale for each group of {observer.group_size}, and {grid} one per channel"
    if fake_quant_info(quantizer.method)["learned"]:
        return f"it learns its range ({quantizer.method}), on another grid than {grid}"
    if quantizer.is_dynamic:
        return "" if quantizer.rangeless else "its scales are relative to one of the whole tensor"
    if observer.statistic == "none":
        return f"its scale is given ({observer.name}), for another grid than {grid}"
    if observer.ch_axis >= 0 and not quantizer.transient and _is_per_tensor(wanted):
        return (
            f"its statistic is per channel (axis {observer.ch_axis}), and the grid, {grid}, is per "
            "tensor"
        )
    if not quantizer.transient and bool(quantizer.solved) and not observer.saw_data:
        return f"it has a range but no statistic to solve {grid} from"
    if quantizer.holds_range:
        return f"its weight was rounded (reconstruct), to another grid than {grid}"
    if quantizer.transient and quantizer.averaging_constant == 0:
        return f"it keeps its range (averaging_constant=0), for another grid than {grid}"
    return ""


def _is_per_tensor(grid: Grid) -> bool:
    return grid.qscheme in (torch.per_tensor_symmetric, torch.per_tensor_affine)


def _same(observer: Observer, wanted: Grid) -> bool:
    return observer.grid == wanted and observer.scale_rule == "grid" and not observer.power_of_two
