"""A checkpoint that cannot be deleted at the end costs a warning, not what the call made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torch_ext
from rounded_net import data, made
from snapshots import same, snapshot


def calibrate(model: Any, path: Path | None) -> Any:
    found = torch_ext.calibrate(model, data(), checkpoint=path, progress=False)
    return str(found).partition("\n")[2]  # the first line has the seconds that it took


def sweep(model: Any, path: Path | None) -> Any:
    rules: Any = ["min_max"]
    return torch_ext.sweep(
        model, lambda _: 1.0, activation_observers=rules, checkpoint=path, progress=False
    )


def sensitivity(model: Any, path: Path | None) -> Any:
    return torch_ext.sensitivity(model, data(), checkpoint=path, progress=False)


def reconstruct(model: Any, path: Path | None) -> Any:
    return torch_ext.reconstruct(model, data(), checkpoint=path, progress=False)


def correct_bias(model: Any, path: Path | None) -> Any:
    return torch_ext.correct_bias(model, data(), keep="all", checkpoint=path, progress=False)


CALLS: list[Callable[[Any, Path | None], Any]] = [
    calibrate,
    sweep,
    sensitivity,
    reconstruct,
    correct_bias,
]


@pytest.mark.parametrize("call", CALLS)
def test_the_result_is_there(
    call: Callable[[Any, Path | None], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    plain, model = made(), made()
    want = call(plain, None)
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    text = rf"^{call.__name__}: complete, but its checkpoint could not be deleted: .*checkpoint"
    with pytest.warns(UserWarning, match=text):
        have = call(model, path)
    assert str(have) == str(want)
    assert same(snapshot(plain), snapshot(model))
