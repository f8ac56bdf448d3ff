"""Prints the results of commands: JSON, text, and tables, which rich draws on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch_ext.files.quantizer_params import Params
from torch_ext.utils.text import span, text_table


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: by rich on a terminal, as plain text elsewhere or without rich."""
    if not sys.stdout.isatty():
        print(text_table(header, rows))
        return
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(text_table(header, rows))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, so that names in brackets are not markup
    Console().print(table)


def print_json(value: Any) -> None:
    """Prints a value as JSON, with null for infinite numbers and NaN."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def print_summary(summary: Any, as_json: bool) -> None:
    """Prints a dataclass that says what was done, as its text or as JSON."""
    if as_json:
        print_json(asdict(summary))
    else:
        print(summary)


def range_text(params: Params) -> str:
    """The least and the greatest end of all channels' ranges; empty without a range."""
    if not params.solved:
        return ""
    low, high = float(params["range"][:, 0].min()), float(params["range"][:, 1].max())
    return f"[{low:.6g}, {high:.6g}]"


def scale_text(params: Params) -> str:
    """The scale, or the least and the greatest of the channels; empty without a range."""
    return span(params["scale"].tolist()) if params.solved else ""


def zero_point_text(params: Params) -> str:
    """The zero point, or the least and the greatest of the channels; empty without a range."""
    return span(params["zero_point"].tolist()) if params.solved else ""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
