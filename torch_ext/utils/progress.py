"""The progress bar of every long loop, with rate and remaining time."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(
    items: Iterable[T], total: int | None, label: str, progress: bool | None
) -> Iterable[T]:
    """The same items, shown with a tqdm bar on standard error.

    Args:
        items: what the loop runs over.
        total: their number; None if it is not known.
        label: the text before the bar.
        progress: whether to show the bar; None shows it if standard error is a terminal. Without
            tqdm there is no bar.
    """
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
