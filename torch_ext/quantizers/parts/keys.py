"""Checks the keys that quantizers are made with."""

from __future__ import annotations

from collections.abc import Iterable

from torch_ext.ops.registry import observer_info
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.text import joined

_SCALE_RULES = ("grid", "tvm", "floor", "even")
#: The scale rules whose scales are powers of two already.
POWERS_OF_TWO = ("floor", "even")


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


def check_scale_rule(who: str, scale_rule: object, power_of_two: bool) -> None:
    """Raises ValueError for an unknown rule, or one that leaves nothing to ``power_of_two``."""
    if scale_rule not in _SCALE_RULES:
        raise ValueError(
            f"{who}: unknown scale_rule {bounded(scale_rule)}; known: {joined(_SCALE_RULES)}"
        )
    if power_of_two and scale_rule in POWERS_OF_TWO:
        raise ValueError(
            f"{who}: expected power_of_two to be False with scale_rule={scale_rule}, got True: "
            "each rounds a scale to a power of two in its own way"
        )
