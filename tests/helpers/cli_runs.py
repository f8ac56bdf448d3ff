"""Files for the command line's tests, and what its tables say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torch_ext
from nets.tiny_net import TinyNet, images, prepared
from torch_ext import calibrate, save_observer_params
from torch_ext.cli.main import main

CONFIG = torch_ext.get_default_calib_qconfig()
BATCHES = [images(4, seed=i) * (i + 1) for i in range(4)]

Run = Callable[..., tuple[int, str, str]]


def calibrated(batches: list[torch.Tensor], qconfig: Any = CONFIG, **keys: Any) -> TinyNet:
    net = prepared(qconfig)
    calibrate(net, batches, **keys)
    return net


def write_files(folder: Path) -> None:
    """Those that the examples name."""
    for name, batches in {"a": BATCHES[:1], "b": BATCHES[1:3], "net": BATCHES}.items():
        save_observer_params(calibrated(batches), folder / f"{name}.safetensors")


def runner(capsys: Any) -> Run:
    """Runs a command in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return call


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table by the first of each row."""
    found = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    return {cells[0]: cells for cells in found if len(cells) > 2 and cells[0].strip("-")}
