"""Calibrations that are killed at random moments; run by test_killed.py, which says what for.

    python tests/helpers/killed_calibrations.py FOLDER KILLS SEED

Each calibration is a fork of this process, so that PyTorch is imported once. Prints one JSON
object: what was killed when, and whether the last one's statistics are the uninterrupted ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import images, tiny_net
from snapshots import same, snapshot

BATCHES = 400


def data() -> Iterator[Tensor]:
    return (images(2 + i % 2, seed=i) for i in range(BATCHES))


def never_done() -> Iterator[Tensor]:
    """All but the last batch, for calibrations that are there to be killed."""
    for _, batch in zip(range(BATCHES - 1), data(), strict=False):
        yield batch
    time.sleep(600)


def net() -> nn.Module:
    model = tiny_net().eval()
    model.qconfig = torch_ext.get_default_calib_qconfig()
    prepared: nn.Module = torch_ext.prepare_qat(model)
    return prepared


def fork(path: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            torch_ext.calibrate(net(), never_done(), checkpoint=path, every=1)
        finally:
            os._exit(0)
    return child


def killed_once(path: Path, rng: random.Random) -> dict[str, Any]:
    child = fork(path)
    time.sleep(rng.uniform(0.005, 0.3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    names = [name for name in os.listdir(path.parent) if name != path.name]
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "checkpoint": path.exists(),
        "partial": len(names),
    }


def main(folder: str, kills: str, seed: str) -> None:
    path, rng = Path(folder) / "calibration", random.Random(int(seed))
    torch.set_num_threads(1)
    kills_done = [killed_once(path, rng) for _ in range(int(kills))]
    resumed = net()
    summary = torch_ext.calibrate(resumed, data(), checkpoint=path, every=50)
    whole = net()
    torch_ext.calibrate(whole, data())
    found = {
        "kills": kills_done,
        "resumed_from": summary.resumed_from,
        "equal": same(snapshot(resumed), snapshot(whole)),
        "left": os.listdir(folder),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
