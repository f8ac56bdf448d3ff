"""Native observers and fake-quantization for PyTorch, and the workflow around them."""

from torch_ext import _library as _library
from torch_ext import ops
from torch_ext._C import build_info, fake_quants, observers
from torch_ext.describe import describe
from torch_ext.fake_quant import FakeQuantize
from torch_ext.modules import Add, Cat, MatMul, Mul, QuantStub
from torch_ext.observer import Observer
from torch_ext.prepare import prepare_qat
from torch_ext.qconfig import QConfig, get_default_calib_qconfig, get_default_qconfig
from torch_ext.state import (
    FakeQuantState,
    QuantizationWarning,
    fake_quantize_states,
    reset_statistics,
    set_fake_quantize,
)

__version__ = build_info()["version"]

__all__ = [
    "Add",
    "Cat",
    "FakeQuantState",
    "FakeQuantize",
    "MatMul",
    "Mul",
    "Observer",
    "QConfig",
    "QuantStub",
    "QuantizationWarning",
    "build_info",
    "describe",
    "fake_quantize_states",
    "fake_quants",
    "get_default_calib_qconfig",
    "get_default_qconfig",
    "observers",
    "ops",
    "prepare_qat",
    "reset_statistics",
    "set_fake_quantize",
]
