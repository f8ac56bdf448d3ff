"""Nets whose quantizers get widths, their data, and the error of the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import torch_ext
from nets.tiny_net import TinyNet, calibrated, images, prepared, tiny_net

DATA = [images(3, seed=7), images(2, seed=8)]


def net_of(rule: str = "percentile", **keys: Any) -> TinyNet:
    """In VALIDATION, with rules that keep a histogram."""
    return calibrated(torch_ext.get_default_qconfig(activation_observer=rule, **keys))


def learned() -> TinyNet:
    """With learned ranges of activations."""
    net = prepared(torch_ext.get_default_qconfig("lsq"))
    torch_ext.calibrate(net, [images()], progress=False)
    return net


@torch.no_grad()
def output_error(net: nn.Module) -> float:
    """The relative squared error of a tiny net's outputs on the data."""
    want = torch.cat([tiny_net().eval()(x) for x in DATA]).double()
    have = torch.cat([net(x) for x in DATA]).double()
    return float((have - want).square().sum() / want.square().sum())
