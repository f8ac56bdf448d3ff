"""Keeps the dtypes of quantizers' tensors when a model is converted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TensorMap = Callable[[Tensor], Tensor]


def keep_dtype(fn: TensorMap) -> TensorMap:
    """Wraps the function that ``Module._apply`` gets so that it changes devices but not dtypes.

    Statistics stay int64 and float32 whatever the model computes in; ``model.half()`` would round
    scales to float16.
    """

    def moved(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        return out if out.dtype == tensor.dtype else tensor.to(out.device)

    return moved
