"""The progress bar of every long loop: rate and remaining time, silent where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(
    items: Iterable[T], total: int | None, label: str, progress: bool | None
) -> Iterable[T]:
    """The same items with a bar on standard error; ``None`` shows one where that is a terminal."""
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, total=total, desc=label)
    return bar
