"""The ONNX type in which the levels of a quantizer's grid are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.grid import dtype_name, is_float, parse_dtype
from torch_ext.utils.text import joined

PLAIN_OPSET = 18  # the least that torch.onnx exports
_FLOAT_OPSET = 19  # the first whose QuantizeLinear has float8
_WIDE_OPSET = 21  # the first whose QuantizeLinear has 4 and 16 bits, and blocks
# A float format -> the name of ONNX's type in small letters, and Torch's dtype.
_FLOATS = {
    "float8_e4m3": ("float8e4m3fn", torch.float8_e4m3fn),
    "float8_e5m2": ("float8e5m2", torch.float8_e5m2),
}


@dataclass(frozen=True)
class OnnxGrid:
    """A quantizer's grid, and the ONNX type that stores its levels."""

    type: str  # name of TensorProto's type in small letters: "int8"
    least: int  # value of the type
    most: int  # value of the type
    quant_min: int
    quant_max: int
    axis: int  # of the channels, or along which blocks lie; -1: per tensor
    dtype: torch.dtype | None = None  # Torch's dtype of a float format
    block: int | None = None  # so many values along the axis share a scale

    @staticmethod
    def problem(quantizer: FakeQuantize) -> str:
        """Why no type holds a quantizer's grid; empty if one does."""
        dtype = quantizer.observer.dtype
        name = dtype_name(dtype)
        if not is_float(dtype) or name in _FLOATS:
            return ""
        return f"its format is {name}; of floats, QuantizeLinear has {joined(_FLOATS)}"

    @classmethod
    def of(cls, quantizer: FakeQuantize) -> OnnxGrid:
        """A quantizer's grid in the smallest type of 4, 8 or 16 bits that holds it.

        For one of which :meth:`problem` says nothing.
        """
        observer = quantizer.observer
        name = dtype_name(observer.dtype)
        ends = (observer.quant_min, observer.quant_max)
        if name in _FLOATS:
            kind, dtype = _FLOATS[name]
            return cls(kind, *ends, *ends, observer.ch_axis, dtype, observer.group_size)
        bits = int(name.partition("int")[2])
        size = next(size for size in (4, 8, 16) if bits <= size)
        kind = f"{'u' if name.startswith('u') else ''}int{size}"
        _, least, most = parse_dtype("export.onnx", kind)
        return cls(kind, least, most, *ends, observer.ch_axis, None, observer.group_size)

    @property
    def is_float(self) -> bool:
        return self.dtype is not None

    @property
    def opset(self) -> int:
        """The least opset whose QuantizeLinear has the type and the blocks."""
        if self.block is not None:
            return _WIDE_OPSET
        if self.is_float:
            return _FLOAT_OPSET
        return PLAIN_OPSET if self.type.endswith("int8") else _WIDE_OPSET

    @property
    def whole(self) -> bool:
        """Whether the grid has every value of the type, so that nothing has to be clipped."""
        return (self.quant_min, self.quant_max) == (self.least, self.most)
