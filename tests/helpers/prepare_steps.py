"""Configurations and short cuts shared by the tests of prepare_qat."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_ext import (
    FakeQuantize,
    QConfig,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)

CONFIG = get_default_qconfig()
OTHER = get_default_qconfig(activation_observer="percentile", weight_qkwargs={"dtype": "int4"})


def names(model: nn.Module) -> set[str]:
    return set(named_quantizers(model))


def ready(model: nn.Module, config: QConfig | None = CONFIG, **keys: Any) -> nn.Module:
    model.qconfig = config  # type: ignore[assignment]
    return prepare_qat(model, **keys)


def rule_of(model: nn.Module, name: str) -> str:
    quantizer = model.get_submodule(name)
    assert isinstance(quantizer, FakeQuantize)
    return quantizer.observer.name


def run_calibration(model: nn.Module, *inputs: Any) -> None:
    set_fake_quantize(model, "calibration")
    with torch.no_grad():
        model(*inputs)
    set_fake_quantize(model, "validation")
