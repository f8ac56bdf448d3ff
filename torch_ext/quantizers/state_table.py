"""The states of a quantizer and what each does, as the native table says."""

from __future__ import annotations

import enum
from typing import Literal

from torch_ext import _C

StateName = Literal["calibration", "qat", "validation", "float"]


class FakeQuantState(enum.Enum):
    """What quantizers do with what passes through them.

    ============  =============================================================================
    CALIBRATION   observe; the output is the float model's, bit for bit
    QAT           the range follows the batches; fake-quantize, with a gradient
    VALIDATION    fake-quantize with fixed parameters; nothing changes
    FLOAT         pass everything through; the state after ``prepare_qat``
    ============  =============================================================================
    """

    CALIBRATION = "calibration"
    QAT = "qat"
    VALIDATION = "validation"
    FLOAT = "float"


_TABLE = _C.state_table()
if set(_TABLE) != {state.value for state in FakeQuantState}:
    raise ImportError(f"torch_ext: the native state table has other states: {', '.join(_TABLE)}")

ACCUMULATE = frozenset(name for name, row in _TABLE.items() if row["accumulate"])
FOLLOW = frozenset(name for name, row in _TABLE.items() if row["follow"])
# Those in which a forward pass changes the quantizer.
CHANGES = ACCUMULATE | FOLLOW
DIFFERENTIATE = frozenset(name for name, row in _TABLE.items() if row["differentiate"])
QUANTIZE = frozenset(name for name, row in _TABLE.items() if row["quantize"])


def parse_state(who: str, state: object) -> FakeQuantState:
    try:
        return FakeQuantState(state)
    except ValueError:
        known = ", ".join(s.value for s in FakeQuantState)
        raise ValueError(f"{who}: unknown state {state!r}; known: {known}") from None
