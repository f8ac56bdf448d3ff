"""What the command line prints: JSON, and tables, by rich where a terminal is."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from torch_ext.utils.text import text_table


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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
        table.add_row(*map(Text, row))  # not as markup, which names could be taken for
    Console().print(table)


def print_json(value: Any) -> None:
    """One JSON value; null for what JSON has no number for."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
