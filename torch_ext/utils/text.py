"""Text for messages and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as their longest cell, with the header underlined."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def joined(names: Iterable[str]) -> str:
    """Known names for the end of an error about an unknown one; "none" if there are none."""
    return ", ".join(names) or "none"


def label_of(name: str) -> str:
    """A module's name for a message; the root's, which is empty, reads "(the model itself)"."""
    return name or "(the model itself)"


def span(values: Sequence[float]) -> str:
    """The least and the greatest value as text: "1 to 2", or "1" if they are equal."""
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def shown(names: Mapping[str, object] | Sequence[str], limit: int = 20) -> str:
    """The first ``limit`` names for a message, and how many more there are."""
    listed = [label_of(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
