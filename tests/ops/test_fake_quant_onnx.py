"""Bit equality with onnxruntime's QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fake_quant_values import SPECIAL, around, assert_same_bits
from reference import Grid
from torch_ext import ops

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ONNXRUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))

TYPES: dict[str, tuple[Grid, int]] = {  # grid, first opset that has the type
    "INT8": (Grid(), 13),
    "UINT8": (Grid(0, 255), 13),
    "INT16": (Grid(-32768, 32767), 21),
    "UINT16": (Grid(0, 65535), 21),
    "INT4": (Grid(-8, 7), 21),
    "UINT4": (Grid(0, 15), 21),
}


def engine(kind: str, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """x through QuantizeLinear and DequantizeLinear, without graph optimisation."""
    helper, proto = onnx.helper, onnx.TensorProto
    item = proto.FLOAT16 if x.dtype == torch.float16 else proto.FLOAT
    shape = [] if axis is None else [scale.numel()]
    initial = [
        helper.make_tensor("s", item, shape, scale.tolist()),
        helper.make_tensor("z", getattr(proto, kind), shape, zero_point.tolist()),
    ]
    given: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **given),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **given),
    ]
    ends = [helper.make_tensor_value_info(n, item, list(x.shape)) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initial)
    first = TYPES[kind][1] if item == proto.FLOAT else 19
    opset = helper.make_opsetid("", first)
    model = helper.make_model(graph, opset_imports=[opset])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def inputs(grid: Grid, scale: float, zero_point: int, rng: np.random.Generator) -> Tensor:
    step = max(1, grid.steps // 500)
    levels = torch.arange(grid.quant_min - zero_point - 2, grid.quant_max - zero_point + 3, step)
    spread = grid.steps * scale
    noise = torch.from_numpy(rng.standard_normal(20_000) * spread).float()
    special = torch.tensor([*SPECIAL, torch.inf, -torch.inf])
    return torch.cat([around(levels, scale, torch.float32), noise, special])


@pytest.mark.parametrize("scale", [0.1, 0.013, 1 / 3, 1.7])
@pytest.mark.parametrize("offset", [0, 3, -5])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_per_tensor(kind: str, offset: int, scale: float, rng: np.random.Generator):
    grid = TYPES[kind][0]
    zero_point = min(max(offset + (grid.steps // 2 if grid.unsigned else 0), 0), grid.quant_max)
    s, z = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    x = inputs(grid, float(s), zero_point, rng)
    have = ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max)
    assert_same_bits(have, engine(kind, x, s, z, None))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_per_channel(kind: str, axis: int, rng: np.random.Generator):
    grid = TYPES[kind][0]
    s = torch.tensor([0.1, 0.037, 1.7])
    z = torch.tensor([0, 3, 5], dtype=torch.int32)
    rows = [inputs(grid, float(v), 0, rng)[:20_000] for v in s]
    x = torch.stack(rows, axis)
    have = ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max, axis)
    assert_same_bits(have, engine(kind, x, s, z, axis))


@pytest.mark.parametrize("scale", [2.0**-3, 0.0999755859375, 1.7001953125])
@pytest.mark.parametrize("kind", ["INT8", "UINT8"])
def test_every_half_value(kind: str, scale: float):
    """fp16 graphs carry an fp16 scale: these are exact in it. NaN and inf: see below."""
    if ONNXRUNTIME < (1, 30):
        pytest.skip("before 1.30 onnxruntime rounds x / scale + zero_point to half precision first")
    grid = TYPES[kind][0]
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()]
    s, z = torch.tensor([scale]), torch.tensor([grid.quant_max // 3], dtype=torch.int32)
    have = ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max)
    assert_same_bits(have, engine(kind, x, s.half(), z, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["INT8", "UINT8"])
def test_infinities_saturate(kind: str, dtype: torch.dtype):
    """As the ONNX standard has it: y = saturate(x / scale + zero_point)."""
    grid = TYPES[kind][0]
    s, z = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)
    x = torch.tensor([torch.inf, -torch.inf, 6e4, -6e4], dtype=dtype)
    want = [0.5 * grid.quant_max, 0.5 * grid.quant_min] * 2
    assert ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max).tolist() == want
    if dtype == torch.float16 and ONNXRUNTIME < (1, 32):
        x = x[1:]  # these releases take +inf in half precision for the least level
    assert engine(kind, x, s.to(dtype), z, None).tolist() == want[-len(x) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_stays_nan(dtype: torch.dtype):
    """No integer stands for NaN and the standard does not choose one: an engine gives any level."""
    s, z = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)
    x = torch.full([20], torch.nan, dtype=dtype)
    assert ops.fake_quant(x, s, z, -128, 127).isnan().all()
    levels = engine("INT8", x, s.to(dtype), z, None) / 0.5
    assert torch.equal(levels, levels.round().clamp(-128, 127))


def test_multiplying_by_the_reciprocal_would_not_be_equal(rng: np.random.Generator):
    x = inputs(Grid(), 0.1, 0, rng)
    s, z = torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)
    other = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)
    with pytest.raises(AssertionError):
        assert_same_bits(other, engine("INT8", x, s, z, None))
