"""The ways in which writing a file can fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def check_failing_writes(
    write: Callable[[Path], object],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moments: tuple[str, ...] = ("fsync", "replace"),
) -> None:
    """A full disk, a folder without permission or that is missing: an error, and nothing there."""
    path.write_bytes(b"before")
    for moment in moments:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, moment, full)
        with pytest.raises(OSError, match="No space left"):
            write(path)
        monkeypatch.undo()

    def forbidden(name: Any, *_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(os, "open", forbidden)  # the tests may run as root
    with pytest.raises(PermissionError, match=path.name):
        write(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError, match="nowhere to exist"):
        write(path.parent / "nowhere" / path.name)
    write(path)
    assert path.read_bytes() != b"before"
