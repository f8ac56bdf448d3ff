"""Solved models for the tests of exports, and the ways in which writing a file can fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from nets import TinyNet, images, prepared, tiny_net
from torch_ext import FakeQuantize, get_default_qconfig, prepare_qat, set_fake_quantize

NARROW = {"quant_min": -127}


def solved(*methods: str, activation: Any = None, weight: Any = None, **keys: Any) -> TinyNet:
    """A tiny net in VALIDATION; `activation` and `weight` are qkwargs."""
    config = get_default_qconfig(
        *methods, activation_qkwargs=activation, weight_qkwargs=weight, **keys
    )
    return run(prepared(config), images())


def captured(activation: Any = None, weight: Any = None, fuse: bool = True) -> TinyNet:
    """The same by `example_inputs`, batch norms folded, so that layers read quantized values."""
    net = tiny_net().eval()
    net = torch_ext.fuse(net) if fuse else net
    net.qconfig = get_default_qconfig(activation_qkwargs=activation, weight_qkwargs=weight)
    return run(prepare_qat(net, example_inputs=images()), images())


def run(model: nn.Module, *inputs: Any) -> Any:
    """Calibrates, on the given inputs."""
    set_fake_quantize(model, "calibration")
    with torch.no_grad():
        model(*inputs)
    set_fake_quantize(model, "validation")
    return model


def quantizer(model: nn.Module, name: str) -> FakeQuantize:
    found = model.get_submodule(name)
    assert isinstance(found, FakeQuantize)
    return found


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
