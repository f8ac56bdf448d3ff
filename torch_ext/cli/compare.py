"""``torch-ext compare``: shows ranges and scales of two files side by side."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch_ext.cli.arguments import Commands, add_command, count, tolerance
from torch_ext.cli.terminal import print_json, print_table, range_text, scale_text
from torch_ext.files.compare import Comparison, Difference, compare
from torch_ext.files.observer_params import read_observer_params
from torch_ext.files.quantizer_params import Params
from torch_ext.utils.text import label_of

_HEADER = (
    "quantizer", "difference", "range A", "range B", "scale A", "scale B", "zero point",
    "observers",
)  # fmt: skip


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        run,
        "shows ranges and scales of two files side by side, the largest difference first",
        "compare a.safetensors b.safetensors --tolerance 0.01",
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--top", type=count, metavar="N", help="only the N that differ most")
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="X",
        help="exit with 1 if a range or scale differs by more than X (relative), or if the names "
        "of the quantizers differ",
    )


def run(arguments: argparse.Namespace) -> int:
    first, second = (read_observer_params(file) for file in (arguments.a, arguments.b))
    comparison = compare(first, second)
    if arguments.json:
        print_json(_record(comparison, first, second))
    else:
        _print(comparison, first, second, arguments.top)
    within = arguments.tolerance is None or comparison.within(arguments.tolerance)
    return 0 if within else 1


def _print(
    comparison: Comparison,
    first: Mapping[str, Params],
    second: Mapping[str, Params],
    top: int | None,
) -> None:
    """Prints the comparison as a table of at most `top` rows, and a summary."""
    rows = [_cells(row, first[row.name], second[row.name]) for row in comparison.rows]
    shown = rows[:top]
    if shown:
        print_table(_HEADER, shown)
    if len(shown) < len(rows):
        print(f"... and {len(rows) - len(shown)} that differ less")
    for side, names in (("A", comparison.only_first), ("B", comparison.only_second)):
        if names:
            print(f"only in {side}: {', '.join(map(label_of, names))}")
    differing = sum(row.largest > 0 for row in comparison.rows)
    print(f"{len(rows)} quantizers in both, {differing} of them differ")


def _cells(row: Difference, first: Params, second: Params) -> list[str]:
    observers = dict.fromkeys((first.observer, second.observer))
    return [
        *(label_of(row.name), _difference(row)),
        *(range_text(first), range_text(second), scale_text(first), scale_text(second)),
        *(f"{row.zero_point} apart" if row.zero_point else "", ", ".join(observers)),
    ]


def _record(
    comparison: Comparison, first: Mapping[str, Params], second: Mapping[str, Params]
) -> dict[str, Any]:
    """The comparison for ``--json``."""

    def side(params: Params) -> dict[str, Any]:
        fields = ("range", "scale", "zero_point")
        values = {field: params[field].tolist() for field in fields} if params.solved else {}
        return {"observer": params.observer, **values}

    rows = [
        {**asdict(row), "a": side(first[row.name]), "b": side(second[row.name])}
        for row in comparison.rows
    ]
    return {
        "quantizers": rows,
        "only_a": comparison.only_first,
        "only_b": comparison.only_second,
    }


def _difference(row: Difference) -> str:
    """The largest difference, with the note if there is one, which may stand alone."""
    if not row.note:
        return _percent(row.largest)
    numbers = 0 < row.largest < math.inf
    return f"{_percent(row.largest)}, {row.note}" if numbers else row.note


def _percent(difference: float) -> str:
    return f"{100 * difference:.3g} %" if difference else "equal"
