"""Checks the keys that quantizers are made with."""

from __future__ import annotations

from collections.abc import Iterable

from torch_ext.ops.registry import observer_info
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.text import joined


def check_keys(who: str, given: Iterable[str], rule: str, known: Iterable[str]) -> None:
    """Raises ValueError for a key that is neither in ``known`` nor an option of the rule."""
    names = [*known, *(row["name"] for row in observer_info(rule)["options"])]
    for key in given:
        if key not in names:
            raise ValueError(f'{who}: unknown key "{key}"; known: {joined(names)}')


def check_learned(
    who: str, use_grad_scaling: object, learn_zero_point: object, alpha: object
) -> None:
    """Raises ValueError for arguments of lsq and pact, of a method that learns nothing."""
    if not parse_flag(who, "use_grad_scaling", use_grad_scaling):
        raise ValueError(
            f"{who}: expected use_grad_scaling to be True, got False: only lsq scales gradients"
        )
    if parse_flag(who, "learn_zero_point", learn_zero_point):
        raise ValueError(
            f"{who}: expected learn_zero_point to be False, got True: only lsq learns one"
        )
    if alpha is not None:
        raise ValueError(
            f"{who}: expected alpha to be None, got {bounded(alpha)}: only pact has one"
        )


def check_dynamic(who: str, dynamic: object, wanted: bool, scale_dtype: object) -> None:
    """Raises ValueError for ``dynamic`` of another class, and for what only that takes."""
    if parse_flag("FakeQuantize", "dynamic", dynamic) != wanted:
        raise ValueError(f"{who}: expected dynamic to be {wanted}, got {dynamic}")
    if scale_dtype is not None and not wanted:
        raise ValueError(
            f"{who}: expected scale_dtype to be None without dynamic=True, got "
            f"{bounded(scale_dtype)}"
        )
