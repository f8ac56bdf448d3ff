"""Checks the keys that quantizers are made with."""

from __future__ import annotations

from collections.abc import Iterable

from torch_ext.ops.registry import observer_info
from torch_ext.utils.text import joined


def check_keys(who: str, given: Iterable[str], rule: str, known: Iterable[str]) -> None:
    """Raises ValueError for a key that is neither in ``known`` nor an option of the rule."""
    names = [*known, *(row["name"] for row in observer_info(rule)["options"])]
    for key in given:
        if key not in names:
            raise ValueError(f'{who}: unknown key "{key}"; known: {joined(names)}')
