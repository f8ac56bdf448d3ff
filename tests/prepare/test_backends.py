"""The grids that each backend gets, and that the guide shows them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

import torch_ext
from paths import ROOT
from torch_ext import get_default_calib_qconfig, get_default_qconfig
from torch_ext.utils.backends import BACKENDS, Backend, BackendGrid, QuantizedResults

AFFINE, SYMMETRIC = torch.per_tensor_affine, torch.per_tensor_symmetric
UINT8 = (torch.uint8, AFFINE, 0, 255)

# What each engine documents: grid of activations, and the least weight (the greatest is 127).
EXPECTED: dict[Backend, tuple[tuple[Any, ...], int]] = {
    "onnxruntime": (UINT8, -127),
    "openvino": (UINT8, -127),
    "tensorrt": ((torch.int8, SYMMETRIC, -128, 127), -127),
    "ncnn": ((torch.int8, SYMMETRIC, -127, 127), -127),
    "x86": (UINT8, -128),
    "xnnpack": ((torch.int8, AFFINE, -128, 127), -127),
    "horizon": ((torch.int8, SYMMETRIC, -128, 127), -128),
}


def grids(config: torch_ext.QConfig) -> tuple[tuple[Any, ...], ...]:
    assert config.activation is not None
    assert config.weight is not None
    return tuple(
        (o.dtype, o.qscheme, o.quant_min, o.quant_max)
        for o in (config.activation().observer, config.weight().observer)
    )


@pytest.mark.parametrize("backend", get_args(Backend))
def test_grids(backend: Backend) -> None:
    activation, least = EXPECTED[backend]
    weight = (torch.int8, torch.per_channel_symmetric, least, 127)
    assert grids(get_default_qconfig(backend=backend)) == (activation, weight)
    config = get_default_calib_qconfig(backend=backend, weight_observer="mse")
    assert grids(config) == (activation, weight)
    assert config.activation is not None
    assert config.weight is not None
    assert config.activation().observer.name == "percentile"
    assert config.weight().observer.name == "mse"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "x86"])
def test_seven_bits_for_sums_of_sixteen(backend: Backend) -> None:
    activation, weight = grids(get_default_qconfig(backend=backend, reduce_range=True))
    assert activation == UINT8
    assert weight[2:] == (-63, 63)
    # Two products, the most that vpmaddubsw adds up before it saturates.
    assert 2 * activation[3] * weight[3] < 2**15 <= 2 * activation[3] * 127


def test_methods_that_learn() -> None:
    config = get_default_qconfig("lsq", "lsq", backend="onnxruntime")
    assert grids(config)[0] == UINT8
    pact = get_default_qconfig("pact", "pact", backend="tensorrt")
    assert grids(pact)[1] == (torch.int8, SYMMETRIC, -127, 127)  # pact has one level per tensor


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": (
        {"backend": "qnnpack"}, ValueError,
        r"get_default_qconfig: unknown backend 'qnnpack'; known: onnxruntime, .*horizon",
    ),
    "not text": ({"backend": 8}, ValueError, "unknown backend 8"),
    "as torch.ao takes it": (
        {"activation_fake_quant": "x86"}, ValueError, 'got the backend "x86"; pass backend="x86"'
    ),
    "seven bits without need": (
        {"backend": "xnnpack", "reduce_range": True}, ValueError,
        r'reduce_range=False with backend="xnnpack", got True: .*\(onnxruntime, openvino, x86\)',
    ),
    "seven bits of nothing": ({"reduce_range": True}, ValueError, "expected a backend"),
    "no bool": ({"backend": "x86", "reduce_range": 7}, TypeError, "reduce_range"),
    "two grids of activations": (
        {"backend": "x86", "activation_qkwargs": {"dtype": "int8"}}, ValueError,
        "get_default_qconfig: expected activation_qkwargs without dtype where a backend decides",
    ),
    "two grids of weights": (
        {"backend": "ncnn", "weight_qkwargs": {"quant_min": -7, "percentile": 1}}, ValueError,
        "weight_qkwargs without quant_min where",
    ),
    "pact is symmetric": (
        {"activation_fake_quant": "pact", "backend": "x86"}, ValueError, "per_tensor_symmetric"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case: str) -> None:
    keys, error, message = BAD[case]
    with pytest.raises(error, match=message):
        get_default_qconfig(**keys)


def shown(grid: BackendGrid) -> str:
    words = grid.qscheme.replace("per_channel", "per output channel").replace("_", " ")
    return f"{grid.dtype} [{grid.quant_min}, {grid.quant_max}], {words}"


def fused(results: QuantizedResults | None) -> str:
    if results is None:
        return "any, or the result stays in float"
    activations, layers = (
        " ".join(f"`{name}`" for name in names) for names in (results.activations, results.layers)
    )
    return f"{activations} behind {layers}"


def backend_table() -> str:
    """The table in Markdown."""
    lines = [
        "| backend | engine | activations | weights | in integers | with what behind a layer "
        "| export |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in BACKENDS.items():
        grids = (shown(row.activation), shown(row.weight))
        cells = (f"`{name}`", row.engine, *grids, row.layers, fused(row.results), row.export)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_guide_shows_the_table() -> None:
    assert set(get_args(Backend)) == set(BACKENDS)
    assert backend_table() in (ROOT / "docs" / "tutorials" / "export.md").read_text()
