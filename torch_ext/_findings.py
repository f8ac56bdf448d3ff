"""What deserves a look about solved quantizers: non-finite data, dead tensors, cut negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torch_ext.fake_quant import FakeQuantize

_SHOWN = 8


class Found(NamedTuple):
    quantizer: FakeQuantize
    range: Tensor


def findings(solved: Mapping[str, Found]) -> list[str]:
    """One line per quantizer and kind of finding."""
    notes: list[str] = []
    for name, (quantizer, range_) in solved.items():
        observer = quantizer.observer
        label = name or "(the model itself)"
        if observer.statistic == "none":
            continue
        extrema, tally = observer.extrema.cpu(), observer.tally.sum(0).tolist()
        if tally[3] or tally[4]:
            notes.append(f"  {label}: {tally[3]} infinite and {tally[4]} NaN values were left out")
        one_sided = observer.symmetric and observer.quant_min >= 0
        dead = dead_channels(range_.cpu(), one_sided)
        if dead:
            where = "" if len(range_) == 1 else f" in {listed(dead)} of {len(range_)} channels"
            notes.append(f"  {label}: nothing to scale{where}, scale 1")
        if one_sided and bool((extrema[:, 0] < 0).any()):
            least = float(extrema[:, 0].min())
            notes.append(f"  {label}: negative values, down to {least:g}, clip to 0")
    return notes


def dead_channels(range_: Tensor, one_sided: bool) -> list[int]:
    alive = range_[:, 1] > 0 if one_sided else (range_ != 0).any(1)
    dead: list[int] = torch.nonzero(~alive).flatten().tolist()
    return dead


def listed(channels: list[int]) -> str:
    more = ", ..." if len(channels) > _SHOWN else ""
    return "[" + ", ".join(map(str, channels[:_SHOWN])) + more + "]"
