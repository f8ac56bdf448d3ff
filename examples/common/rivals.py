"""Other projects' calibrators: each takes a stream of batches and gives its threshold."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rival:
    """`threshold` maps the batches, in order, to the largest magnitude that is kept."""

    name: str
    threshold: Callable[[Sequence[Tensor]], float]


def available() -> tuple[list[Rival], list[str]]:
    """The calibrators that can be imported here, and a sentence for each that cannot."""
    rivals: list[Rival] = []
    missing: list[str] = []
    try:
        from torch.ao.quantization import MovingAverageMinMaxObserver  # noqa: F401

        rivals.append(Rival("torch.ao MovingAverageMinMax", moving_average))
    except ImportError as error:
        missing.append(f"torch.ao is not part of this torch, its row is left out ({error})")
    try:
        import onnxruntime.quantization.calibrate  # noqa: F401

        rivals.append(Rival("onnxruntime entropy", onnxruntime_entropy))
        rivals.append(Rival("onnxruntime percentile 99.99", onnxruntime_percentile))
    except ImportError as error:
        missing.append(
            "onnxruntime is not installed, its rows are left out "
            f"(pip install onnxruntime onnx): {error}"
        )
    return rivals, missing


def moving_average(batches: Sequence[Tensor]) -> float:
    """torch.ao's observer for QAT, with its default averaging constant of 0.01."""
    from torch.ao.quantization import MovingAverageMinMaxObserver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its move to torchao
        observer = MovingAverageMinMaxObserver(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-128, quant_max=127
        )
        for batch in batches:
            observer(batch)
        return max(abs(float(observer.min_val)), abs(float(observer.max_val)))


def onnxruntime_entropy(batches: Sequence[Tensor]) -> float:
    """onnxruntime's EntropyCalibrater, with its default of 128 bins."""
    return _collect(batches, "entropy", num_bins=128)


def onnxruntime_percentile(batches: Sequence[Tensor]) -> float:
    """onnxruntime's PercentileCalibrater, with its defaults of 2048 bins and 99.99 percent."""
    return _collect(batches, "percentile", num_bins=2048)


def _collect(batches: Sequence[Tensor], method: str, num_bins: int) -> float:
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=method,
        symmetric=True,
        num_bins=num_bins,
        num_quantized_bins=128,
        percentile=99.99,
        scenario="same",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every batch
        for batch in batches:
            collector.collect({"x": [batch.numpy()]})
        low, high = collector.compute_collection_result()["x"][:2]
    return max(abs(float(low)), abs(float(high)))
