"""Models brought into a state, for every kind of configuration, and what each state does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nets.tiny_net import TinyNet, images, prepared, tiny_net
from torch_ext import FakeQuantState, get_default_qconfig, set_fake_quantize

CALIBRATION, QAT = FakeQuantState.CALIBRATION, FakeQuantState.QAT
VALIDATION, FLOAT = FakeQuantState.VALIDATION, FakeQuantState.FLOAT

QCONFIGS: dict[str, dict[str, Any]] = {
    "min_max": {},
    "histogram": {"activation_observer": "percentile", "weight_observer": "kl"},
    "frozen": {"activation_qkwargs": {"averaging_constant": 0.0}},
    "affine": {
        "activation_qkwargs": {"dtype": "uint8", "qscheme": torch.per_tensor_affine},
        "weight_qkwargs": {"qscheme": torch.per_tensor_affine, "dtype": "int4"},
    },
    "given": {"activation_observer": "fixed_scale", "activation_qkwargs": {"scale": 0.125}},
    "weights only": {"activation_fake_quant": None},
    "activations only": {"weight_fake_quant": None},
}

# What a forward in each state does to the quantizers: the statistic grows, the range moves, the
# output differs from the float model's.
EFFECT = {
    CALIBRATION: (True, False, False),
    QAT: (False, True, True),
    VALIDATION: (False, False, True),
    FLOAT: (False, False, False),
}


def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)  # the same dropout for all
    with torch.no_grad():
        out: torch.Tensor = net(x)
    return out


def bring(kind: str, state: FakeQuantState) -> tuple[TinyNet, TinyNet]:
    """A calibrated model in the state, and the float model it came from."""
    config = get_default_qconfig(**QCONFIGS[kind])
    net = prepared(config)
    set_fake_quantize(net, CALIBRATION)
    forward(net, images())
    if state is not CALIBRATION:
        set_fake_quantize(net, state)
    return net, tiny_net().eval()
