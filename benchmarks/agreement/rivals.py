"""Other projects' quantization after training, on the same nets, bits and inputs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agreement.grids import Bits
from agreement.nets import BATCH

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """Another project's way.

    Attributes:
        make: from the float net, the bits and inputs to a function of one batch.
        what: one line about it.
        package: what has to be installed.
        bits: the bits that it takes.
        not_for: nets of which it leaves layers float.
    """

    make: Callable[[nn.Module, Bits, Tensor], Call]
    what: str
    package: str
    bits: tuple[str, ...]
    not_for: tuple[str, ...] = ()

    def why_not(self) -> str:
        """What is not installed; empty if it is."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the logs, warnings and progress bars of the packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(sink):
                yield
    finally:
        logging.disable(before)


# onnxruntime --------------------------------------------------------------------------------------


class _Reader:
    """A CalibrationDataReader over batches; onnxruntime asks for ranges to bound its memory."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = batches
        self.set_range(0, len(batches))

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._left, None)
        return None if batch is None else {"x": batch.numpy()}


def onnxruntime_static(method: str) -> Callable[[nn.Module, Bits, Tensor], Call]:
    """quantize_static: uint8 affine activations, int8 weights per channel, its optimised engine."""

    def make(net: nn.Module, bits: Bits, calibration: Tensor) -> Call:
        import onnxruntime
        from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        batches = list(calibration.split(BATCH))
        with tempfile.TemporaryDirectory() as folder, quiet():
            plain, ready, made = (
                Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "made")
            )
            torch.onnx.export(
                net, (batches[0],), plain, input_names=["x"], dynamo=True, external_data=False
            )
            quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
            quantize_static(
                str(ready),
                str(made),
                _Reader(batches),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8 if bits.weight == 8 else QuantType.QInt4,
                calibrate_method=getattr(CalibrationMethod, method),
                extra_options={"CalibStridedMinMax": 1},
            )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            if not has_vnni():  # its integer kernels would add up in 16 bits and saturate
                options.graph_optimization_level = (
                    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                )
            session = onnxruntime.InferenceSession(
                made.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return make


def has_vnni() -> bool:
    """Whether the CPU adds up products of bytes in 32 bits."""
    try:
        return "_vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# NNCF ---------------------------------------------------------------------------------------------


class _Wrapped(nn.Module):
    """NNCF adds a child to the model, which a Sequential would call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x)
        return scores


def nncf_quantize(net: nn.Module, bits: Bits, calibration: Tensor) -> Call:
    """nncf.quantize, affine activations: its defaults correct biases; it takes 8 bits alone."""
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"  # its first run compiles
    with quiet():
        import nncf

        model = nncf.quantize(
            _Wrapped(copy.deepcopy(net)).eval(),
            nncf.Dataset(list(calibration.split(1))),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
        )
    quantized: Call = model.eval()
    return quantized


# torchao ------------------------------------------------------------------------------------------


def torchao_pt2e(net: nn.Module, bits: Bits, calibration: Tensor) -> Call:
    """torchao's PT2E with the quantizer for x86: HistogramObserver, weights by min and max."""
    with quiet():
        from dataclasses import replace

        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        usual = x86.get_default_x86_inductor_quantization_config()
        low, high = bits.weight_range
        activation = replace(usual.input_activation, quant_max=2**bits.activation - 1)
        config = x86.QuantizationConfig(
            activation,
            activation,
            replace(usual.weight, quant_min=low, quant_max=high),
            usual.bias,
            usual.is_qat,
        )
        batches = list(calibration.split(BATCH))
        program = torch.export.export(net, (batches[0],), strict=False).module()
        prepared = prepare_pt2e(program, x86.X86InductorQuantizer().set_global(config))
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
        quantized = convert_pt2e(prepared)
    layers = [node for node in quantized.graph.nodes if node.target in _LAYERS]
    left = [n.name for n in layers if "dequantize" not in str(n.args[1])]
    if left:
        raise RuntimeError(f"torchao left {len(left)} of {len(layers)} layers float: {left[:3]}")
    call: Call = quantized
    return call


_LAYERS = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.linear.default,
)


EIGHT, EVERY = ("W8A8",), ("W8A8", "W6A8", "W4A8", "W4A4")
RIVALS: dict[str, Rival] = {
    f"onnxruntime {label}": Rival(
        onnxruntime_static(method),
        f"`quantize_static`, {method}, uint8 affine, weights per channel",
        "onnxruntime",
        EIGHT,
    )
    for label, method in (
        ("minmax", "MinMax"),
        ("entropy", "Entropy"),
        ("percentile", "Percentile"),
    )
} | {
    "nncf": Rival(nncf_quantize, "`nncf.quantize`, preset mixed, biases corrected", "nncf", EIGHT),
    # It finds convolutions by their class, not EfficientNet's subclasses of it.
    "torchao x86": Rival(
        torchao_pt2e,
        "PT2E with `X86InductorQuantizer`",
        "torchao",
        EVERY,
        ("efficientnet_lite0", "efficientnet_lite1"),
    ),
}
