"""Quantizers and a net with methods that learn."""

from __future__ import annotations

from typing import Any

import torch

from nets.tiny_net import tiny_net
from torch_ext import FakeQuantize, LearnedFakeQuantize, get_default_qconfig, prepare_qat


def in_state(state: str, **keys: Any) -> LearnedFakeQuantize:
    quantizer = FakeQuantize(**keys)
    assert isinstance(quantizer, LearnedFakeQuantize)
    quantizer.state = state
    return quantizer


def prepared(activation: str, weight: str, **qkwargs: Any) -> torch.nn.Module:
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig(activation, weight, **qkwargs)
    return prepare_qat(net)
