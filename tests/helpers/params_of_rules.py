"""Calibrated nets whose activations and weights have one rule, and what a quantizer saves."""

from __future__ import annotations

from typing import Any

import torch_ext
from nets.tiny_net import TinyNet, calibrated
from torch_ext import get_default_qconfig

RULES = torch_ext.observers()
STATISTIC = ("observer.extrema", "observer.tally", "observer.counts")
PARAMETERS = ("range", "scale", "zero_point", "solved")


def config(rule: str, **keys: Any) -> torch_ext.QConfig:
    return get_default_qconfig(activation_observer=rule, weight_observer=rule, **keys)


def solved_net(rule: str, **keys: Any) -> TinyNet:
    return calibrated(config(rule, **keys))
