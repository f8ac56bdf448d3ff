"""The engines that a model can be quantized for: the grids that each computes with in integers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch_ext.utils.arguments import parse_flag
from torch_ext.utils.text import joined

Backend = Literal["onnxruntime", "openvino", "tensorrt", "ncnn", "x86", "xnnpack", "horizon"]

# Keys of a quantizer that a backend decides.
GRID_KEYS = (
    "dtype", "qscheme", "quant_min", "quant_max", "scale_rule", "power_of_two", "group_size",
    "dynamic", "scale_dtype",
)  # fmt: skip
# Products of two weights of 7 bits and two activations of uint8 fit into 16 bits.
_SEVEN_BITS = 63


@dataclass(frozen=True)
class BackendGrid:
    """A grid that a backend gives to the quantizers of one side."""

    dtype: str
    qscheme: str
    quant_min: int
    quant_max: int

    def keys(self) -> dict[str, Any]:
        """The grid as keys of an ``Observer``."""
        return asdict(self)


@dataclass(frozen=True)
class QuantizedResults:
    """Layers that a backend computes in integers only if their result is quantized at once.

    Both are torch's names of functions. ``clamp`` is one from 0 on.
    """

    layers: tuple[str, ...]
    activations: tuple[str, ...]  # what it computes with them, before it quantizes
    branches: bool = False  # whether quantizers may be behind several views of one value


@dataclass(frozen=True)
class BackendRow:
    """What a backend computes in integers, and from which file."""

    engine: str
    activation: BackendGrid
    weight: BackendGrid
    layers: str  # those that the engine computes in integers
    export: str
    short_sums: bool = False  # on CPUs without VNNI it adds up products in 16 bits
    results: QuantizedResults | None = None  # None: results of layers may stay in float


_UINT8 = BackendGrid("uint8", "per_tensor_affine", 0, 255)
_INT8 = BackendGrid("int8", "per_tensor_symmetric", -128, 127)
_WEIGHT = BackendGrid("int8", "per_channel_symmetric", -127, 127)
_WHOLE_WEIGHT = BackendGrid("int8", "per_channel_symmetric", -128, 127)
_PLAIN = "convolutions, linear layers, products, sums"
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")

BACKENDS: dict[Backend, BackendRow] = {
    "onnxruntime": BackendRow(
        "onnxruntime on CPUs", _UINT8, _WEIGHT,
        _PLAIN, '`export.onnx(..., profile="onnxruntime")`', short_sums=True,
        results=QuantizedResults(_CONVOLUTIONS, ("relu", "relu6", "clamp")),
    ),
    "openvino": BackendRow(
        "OpenVINO on CPUs", _UINT8, _WEIGHT,
        _PLAIN, "`export.onnx`", short_sums=True,
    ),
    "tensorrt": BackendRow(
        "TensorRT 10 and newer", _INT8, _WEIGHT,
        "what TensorRT chooses", '`export.onnx(..., profile="tensorrt")`',
    ),
    "ncnn": BackendRow(
        "ncnn", BackendGrid("int8", "per_tensor_symmetric", -127, 127), _WEIGHT,
        "Conv2d and Linear", "`export.ncnn_table`",
    ),
    "x86": BackendRow(
        "Inductor on x86 (`torch.compile` of a PT2E program)", _UINT8, _WHOLE_WEIGHT,
        "convolutions and linear layers", '`export.pt2e(..., backend="x86")`', short_sums=True,
    ),
    "xnnpack": BackendRow(
        "ExecuTorch with XNNPACK",
        BackendGrid("int8", "per_tensor_affine", -128, 127), _WEIGHT,
        "convolutions and linear layers", '`export.pt2e(..., backend="xnnpack")`',
        results=QuantizedResults(
            ("linear", "conv1d", "conv2d", "conv_transpose2d"),
            ("relu", "relu6", "hardtanh"), branches=True,
        ),
    ),
    "horizon": BackendRow(
        "Horizon's BPU", _INT8, _WHOLE_WEIGHT,
        "what its toolchain chooses", "`export.json`",
    ),
}  # fmt: skip


def backend_row(who: str, backend: object) -> BackendRow:
    """The row of a backend; ValueError lists the known ones."""
    if backend not in get_args(Backend):
        raise ValueError(f"{who}: unknown backend {backend!r}; known: {joined(BACKENDS)}")
    return BACKENDS[backend]  # type: ignore[index]


def backend_grids(who: str, backend: object, reduce_range: object = False) -> tuple[Any, Any]:
    """The :class:`BackendGrid` of a backend's activations, and that of its weights.

    Raises:
        TypeError: `reduce_range` is no bool.
        ValueError: the backend is unknown, or has no use for `reduce_range`.
    """
    row = backend_row(who, backend)
    if not parse_flag(who, "reduce_range", reduce_range):
        return row.activation, row.weight
    if not row.short_sums:
        takers = joined([name for name, other in BACKENDS.items() if other.short_sums])
        raise ValueError(
            f'{who}: expected reduce_range=False with backend="{backend}", got True: it is for '
            f"engines that add up in 16 bits on CPUs without VNNI ({takers})"
        )
    weight = row.weight
    return row.activation, BackendGrid(weight.dtype, weight.qscheme, -_SEVEN_BITS, _SEVEN_BITS)
