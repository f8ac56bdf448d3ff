"""The lines of the user's code that lead from a module's forward to a function call.

A call of a function is found again by these lines: counters would shift where a forward makes more
calls in one mode than in the other.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

_PACKAGE = str(Path(__file__).parents[2]) + os.sep
_TORCH = str(Path(str(torch.__file__)).parent) + os.sep
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
_GENERATED = ("<eval_with_key>", "<frozen ")  # "<stdin>" and the like are the user's
_SITE = ("site-packages", "dist-packages")
# The modules of ``torch_ext.modules`` stand in the user's place.
_OURS_THAT_COUNT = _PACKAGE + "modules.py"
_MODULE_FILE, _CALL = nn.modules.module.__file__, "_call_impl"
_COMPILE_FILE = torch._dynamo.eval_frame.__file__
_PARAMETRIZE_FILE = parametrize.__file__

# Code of the forwards that begin the call of a tracked module, by id, as its hash is that of all
# its contents; and the same by file and name.
_BEGINNINGS: dict[int, CodeType] = {}
_NAMED_BEGINNINGS: set[tuple[str, str]] = set()


class Lines(NamedTuple):
    """``text``: files and lines, innermost first. ``apart``: not in the module's own forward.

    Apart are hooks, parametrizations and modules without a place in the plan.
    """

    text: str
    apart: bool


def begins_call(code: CodeType) -> None:
    """Marks the code of a function that begins the call of a tracked module."""
    _BEGINNINGS[id(code)] = code
    _NAMED_BEGINNINGS.add((code.co_filename, code.co_name))


@functools.lru_cache(maxsize=4096)  # asked for every frame at every call of a planned function
def is_users(filename: str) -> bool:
    """Whether code is neither torch's, Python's nor ours."""
    if filename.startswith((_TORCH, *_GENERATED)) or filename == _OURS_THAT_COUNT:
        return filename == _OURS_THAT_COUNT
    if filename.startswith(_PACKAGE):
        return False
    return not filename.startswith(_STANDARD) or any(part in filename for part in _SITE)


def calling_lines() -> Lines:
    """The lines between the innermost tracked module's forward and the function called now."""
    frame: FrameType | None = sys._getframe(1)
    text, apart = "", False
    while frame is not None and id(frame.f_code) not in _BEGINNINGS:
        filename = frame.f_code.co_filename
        if is_users(filename):
            text += f" {filename}:{frame.f_lineno}"
        elif not apart:
            apart = _leaves_forward(filename, frame.f_code.co_name) and not _of_instance(frame)
        frame = frame.f_back
    return Lines(text, apart)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def traced_lines() -> tuple[str, bool]:
    """The same of what ``torch.compile`` is tracing."""
    text, apart = "", False
    for frame in reversed(torch._guards.TracingContext.extract_stack()):
        if (frame.filename, frame.name) in _NAMED_BEGINNINGS:
            break
        if is_users(frame.filename):
            text += f" {frame.filename}:{frame.lineno}"
        else:
            apart = apart or _leaves_forward(frame.filename, frame.name)
    return text, apart


def nearest_line() -> str:
    """The innermost line of the user's that leads here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return "torch.nn" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def traced_nearest_line() -> str:
    """The same of what ``torch.compile`` is tracing."""
    frames: Any = torch._guards.TracingContext.extract_stack()
    return user_line((frame.filename, frame.lineno) for frame in frames)


def instructions(skipped: int = 0) -> tuple[tuple[str, str, int], ...]:
    """As ``calling_lines``, but each by the very instruction, which tells calls of a line apart.

    ``skipped``: frames above the caller's to begin behind, such as that of a call that begins.
    """
    frame: FrameType | None = sys._getframe(1 + skipped)
    found = []
    while frame is not None and id(frame.f_code) not in _BEGINNINGS:
        if is_users(frame.f_code.co_filename):
            found.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def in_compiled_function() -> bool:
    """Whether the forward called a function or module that ``torch.compile`` made."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and id(frame.f_code) not in _BEGINNINGS:
        if frame.f_code.co_filename == _COMPILE_FILE:
            return True
        frame = frame.f_back
    return False


def user_line(frames: Iterable[tuple[str, int]]) -> str:
    """The last of ``(file, line)`` that is the user's; for messages."""
    line = "torch.nn"
    for filename, number in frames:
        if is_users(filename):
            line = f"{filename}:{number}"
    return line


def _leaves_forward(filename: str, name: str) -> bool:
    return (filename == _MODULE_FILE and name == _CALL) or filename == _PARAMETRIZE_FILE


def _of_instance(frame: FrameType) -> bool:
    """Whether a module is called whose forward is an attribute of the instance: it has no place."""
    module = frame.f_locals.get("self")
    return isinstance(module, nn.Module) and "forward" in vars(module)
