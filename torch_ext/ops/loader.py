"""Loads the two native libraries, and explains the likely causes when that fails.

Importing this module loads them; the package imports it before anything else. No other module
uses ``torch.ops``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1]  # of the package
OP_LIBRARY = FOLDER / "libtorch_ext.so"
_BUILD = "pip install -e . --no-build-isolation"


def _release(version: str) -> str:
    """Major and minor release; Torch's C++ interface changes with them."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _fail(what: str, cause: BaseException | None = None) -> ImportError:
    lines = [
        f"torch_ext: {what}",
        f"  package  {FOLDER}",
        f"  python   {sys.version.split()[0]} ({sys.executable})",
        f"  torch    {torch.__version__} ({Path(torch.__file__).parent})",
    ]
    if cause is not None:
        lines.append(f"  reason   {type(cause).__name__}: {cause}")
    lines += [
        "Likely causes:",
        "  1. the native code has not been built for this interpreter and this Torch:",
        f"     in a checkout, run `{_BUILD}`",
        "  2. Torch was installed anew after the build: build again, with the same command",
        "  3. Python runs beside a folder named torch_ext that is not the installed package:",
        "     start it from elsewhere",
    ]
    return ImportError("\n".join(lines))


def _registered() -> bool:
    return hasattr(torch.ops.torch_ext, "observe_")


def load() -> Any:
    """Imports ``torch_ext._C``, registers the ops and returns their namespace in ``torch.ops``.

    If the process has the ops already (an application that is linked with the op library), the
    library is not loaded again: registering the ops twice would abort the process.

    Raises:
        ImportError: a library is missing, cannot be loaded or was built for another release of
            torch. The message gives versions, paths and likely causes.
    """
    try:
        native = importlib.import_module("torch_ext._C")
    except ImportError as error:
        raise _fail("the extension module torch_ext._C cannot be imported", error) from error

    built_for = str(native.build_info()["torch"])
    if _release(built_for) != _release(torch.__version__):
        raise _fail(f"built for torch {built_for}, but torch {torch.__version__} is running")

    if _registered():
        return torch.ops.torch_ext
    if not OP_LIBRARY.is_file():
        raise _fail(f"the op library {OP_LIBRARY.name} is missing")
    try:
        torch.ops.load_library(str(OP_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise _fail(f"the op library {OP_LIBRARY.name} cannot be loaded", error) from error
    if not _registered():
        raise _fail(f"the op library {OP_LIBRARY.name} registered no ops")
    return torch.ops.torch_ext


NATIVE = load()
