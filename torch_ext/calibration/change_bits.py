"""Puts calibrated quantizers on grids of more or fewer bits, without data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from torch_ext.calibration.change_grid import why_grid_stays
from torch_ext.ops.registry import OptionValue, observer_info
from torch_ext.ops.registry_names import Rule
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.grid import MAX_BITS, MIN_BITS, dtype_bits, grid_of_bits
from torch_ext.quantizers.solve import solve_quantizers
from torch_ext.utils.arguments import bounded, parse_integer
from torch_ext.utils.text import label_of, shown

# Where a rule takes fewer bits: a finer grid has levels enough for the whole range.
_WIDE_RULE: Rule = "min_max"


def parse_bits(who: str, bits: object) -> tuple[int, ...]:
    """Widths in ascending order, each once, from one or several.

    Raises:
        TypeError: `bits` holds something else than integers.
        ValueError: there are none, or one is not a width of a grid.
    """
    given = [bits] if isinstance(bits, int) else bits
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise TypeError(f"{who}: expected bits to be integers, got {bounded(bits)}")
    parsed = {parse_integer(who, "bits", entry, MIN_BITS, MAX_BITS) for entry in given}
    if not parsed:
        raise ValueError(f"{who}: expected bits to be integers, got none")
    return tuple(sorted(parsed))


def bits_of(quantizer: FakeQuantize) -> int:
    """The number of bits of a quantizer's grid."""
    return dtype_bits(quantizer.observer.dtype)


class Width(NamedTuple):
    """A number of bits, and the rule with all its options that a range is solved by then."""

    bits: int
    rule: Rule
    options: Mapping[str, OptionValue]


def width_of(quantizer: FakeQuantize, bits: int) -> Width:
    """A quantizer's width: its own rule, or ``min_max`` where that does not take so many bits."""
    observer = quantizer.observer
    if bits != bits_of(quantizer) and bits > observer_info(observer.name)["max_bits"]:
        return Width(bits, _WIDE_RULE, {})
    return Width(bits, observer.name, observer.options)


def check_bits(who: str, chosen: Mapping[str, FakeQuantize], bits: Sequence[int]) -> None:
    """Raises ValueError that names the quantizers that cannot change to one of the widths."""
    wanted = {name: [width_of(q, width) for width in bits] for name, q in chosen.items()}
    check_widths(who, chosen, wanted)


def check_widths(
    who: str, chosen: Mapping[str, FakeQuantize], wanted: Mapping[str, Sequence[Width]]
) -> None:
    """Raises ValueError that names the quantizers that cannot have one of the widths wanted."""
    problems = {
        name: problem
        for name, quantizer in chosen.items()
        for width in wanted[name]
        if (problem := _problem(quantizer, width))
    }
    if problems:
        lines = [f"  {label_of(name)}: {why}" for name, why in problems.items()]
        raise ValueError(
            f"{who}: expected every quantizer to be one that can change its bits, got "
            f"{len(problems)} that cannot; leave them out by pattern\n" + "\n".join(lines)
        )


def set_widths(prepared: PreparedModel, wanted: Mapping[str, Width]) -> None:
    """Changes quantizers to other widths, and solves their ranges from what they have seen.

    Quantizers that are as wanted already stay as they are. If it raises, the caller restores them.

    Args:
        prepared: the model; errors name its function.
        wanted: widths by quantizer's name, which :func:`check_widths` accepts.

    Raises:
        RuntimeError: a quantizer saw no data, or a weight has no finite value.
    """
    changed: dict[str, FakeQuantize] = {}
    for name, width in wanted.items():
        quantizer = prepared.quantizers[name]
        if not _has(quantizer, width):
            _set_grid(quantizer, width.bits)
            quantizer.observer.set_rule(width.rule, **width.options)
            changed[name] = quantizer
    solutions = solve_quantizers(changed, prepared.read_weight)
    if solutions.unobserved:
        names = shown([f"{name} ({why})" for name, why in solutions.unobserved.items()])
        raise RuntimeError(
            f"{prepared.who}: expected finite values to solve from, got none for {names}"
        )
    with torch.no_grad():
        solutions.commit()


def _has(quantizer: FakeQuantize, width: Width) -> bool:
    observer = quantizer.observer
    return (bits_of(quantizer), observer.name, observer.options) == width


def _set_grid(quantizer: FakeQuantize, bits: int) -> None:
    observer = quantizer.observer
    grid = grid_of_bits(observer.grid, bits)
    observer.set_grid(grid, observer.scale_rule, observer.power_of_two)


def _problem(quantizer: FakeQuantize, width: Width) -> str:
    """Why a quantizer cannot have a width; empty if it can."""
    observer = quantizer.observer
    wanted = grid_of_bits(observer.grid, width.bits)
    if _has(quantizer, width):
        return ""
    if wanted != observer.grid and (why := why_grid_stays(quantizer, wanted)):
        return why
    reads = observer_info(width.rule)["statistic"] == "histogram"
    if reads and not (quantizer.transient or observer.has_histogram):
        return f"{width.rule} reads a histogram, but none was kept"
    restore = observer.kept_settings()
    try:
        _set_grid(quantizer, width.bits)
        observer.check_rule(width.rule, **width.options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        restore()
    return ""
