"""The states of a quantizer, and what each does according to the native table."""

from __future__ import annotations

import enum
from typing import Literal

from torch_ext import _C

StateName = Literal["calibration", "qat", "validation", "float"]


class FakeQuantState(enum.Enum):
    """What a quantizer does with its input.

    ============  =============================================================================
    CALIBRATION   adds it to the observer's statistic and returns it unchanged
    QAT           updates the range from the batch, and fake-quantizes with a gradient
    VALIDATION    fake-quantizes with a fixed range
    FLOAT         returns it unchanged; the state after ``prepare_qat``
    ============  =============================================================================
    """

    CALIBRATION = "calibration"
    QAT = "qat"
    VALIDATION = "validation"
    FLOAT = "float"


_TABLE = _C.state_table()
if set(_TABLE) != {state.value for state in FakeQuantState}:
    raise ImportError(f"torch_ext: the native state table has other states: {', '.join(_TABLE)}")

# The values of the states in which a quantizer does each thing.
ACCUMULATE = frozenset(name for name, row in _TABLE.items() if row["accumulate"])
FOLLOW = frozenset(name for name, row in _TABLE.items() if row["follow"])
# A forward pass changes the quantizer in these.
CHANGES = ACCUMULATE | FOLLOW
DIFFERENTIATE = frozenset(name for name, row in _TABLE.items() if row["differentiate"])
QUANTIZE = frozenset(name for name, row in _TABLE.items() if row["quantize"])


def parse_state(who: str, state: object) -> FakeQuantState:
    """The state of a value such as ``"qat"``; raises ValueError with the known ones."""
    try:
        return FakeQuantState(state)
    except ValueError:
        known = ", ".join(member.value for member in FakeQuantState)
        raise ValueError(f"{who}: unknown state {state!r}; known: {known}") from None
