"""Warnings that show the user's line, however deep in torch they come up."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

_OURS = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(str(torch.__file__)).parent) + os.sep,
    "<",
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither this package's nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)
