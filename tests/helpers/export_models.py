"""Solved models for the tests of exports."""

from __future__ import annotations

from typing import Any

from torch import nn

import torch_ext
from nets.tiny_net import TinyNet, images, prepared, tiny_net
from prepare_steps import run_calibration
from torch_ext import FakeQuantize, get_default_qconfig, prepare_qat

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
    """The model, calibrated on the given inputs, in VALIDATION."""
    run_calibration(model, *inputs)
    return model


def quantizer(model: nn.Module, name: str) -> FakeQuantize:
    found = model.get_submodule(name)
    assert isinstance(found, FakeQuantize)
    return found
