"""Arguments that every op accepts; the first of each has 3 channels, on axis 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torch_ext
from sample_data import sample
from statistic_tensors import observed

Arguments = dict[str, Any]
Make = Callable[[], Arguments]


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (sample("gauss", 24) * 3).repeat(8)[: torch.Size(shape).numel()].reshape(shape).to(dtype)


def zero_points(channels: int) -> Tensor:
    return torch.arange(channels, dtype=torch.int32)


def fake_quant(x: Tensor, ch_axis: int, **more: Any) -> Arguments:
    channels = x.shape[ch_axis] if ch_axis >= 0 else 1
    scale, zero_point = torch.linspace(0.1, 0.3, channels), zero_points(channels)
    given = {"x": x, "scale": scale, "zero_point": zero_point, "ch_axis": ch_axis}
    return {**given, "grid": "[-128,127]", **more}


def statistic(x: Tensor, ch_axis: int, prefix: str = "", **layout: Any) -> Arguments:
    names = [prefix + name for name in ("extrema", "tally", "counts")]
    return dict(zip(names, observed(x, ch_axis, **layout), strict=True))


def solve(x: Tensor, ch_axis: int, rule: str, **more: Any) -> Arguments:
    return {"rule": rule, **statistic(x, ch_axis), "grid": "[-128,127] symmetric", **more}


def solve_many() -> Arguments:
    states = [observed(data(30)), observed(data(2, 3), 1)]
    return {
        "rules": ["percentile", "min_max"],
        "extrema": [s.extrema for s in states],
        "tally": [s.tally for s in states],
        "counts": [s.counts for s in states],
        "grids": ["[-128,127] symmetric", "[0,255] affine"],
        "options": [99.9],
    }


def follow(x: Tensor, ch_axis: int, solved: int = 1, **more: Any) -> Arguments:
    channels = x.shape[ch_axis] if ch_axis >= 0 else 1
    return {
        "x": x,
        "range": torch.tensor([[-1.0, 1.0]]).repeat(channels, 1),
        "scale": torch.full((channels,), 2 / 255),
        "zero_point": torch.zeros(channels, dtype=torch.int32),
        "solved": torch.tensor([solved], dtype=torch.uint8),
        "averaging_constant": 0.1,
        "rule": "mse",
        "grid": "[-128,127] symmetric",
        "ch_axis": ch_axis,
        **more,
    }


def with_gradient(make: Make) -> Make:
    def made() -> Arguments:
        arguments = make()
        return arguments | {"x": arguments["x"].requires_grad_()}

    return made


HALF = torch.float16
FAKE_QUANT: list[Make] = [
    lambda: fake_quant(data(2, 3), 1),
    lambda: fake_quant(data(5), -1, mask="paper"),
    lambda: fake_quant(data(2, 3, 4, 2).to(memory_format=torch.channels_last), 1),
    lambda: fake_quant(data(3, 4).t(), 0, grid="[-128,127] rounding=half_away"),
    lambda: fake_quant(data(1, 4).expand(3, 4), -1, grid="[-128,127] rounding=floor_half_up"),
    lambda: fake_quant(data(0, 3), 1),
    lambda: fake_quant(torch.tensor(1.5), -1),
    lambda: fake_quant(data(4, 5, dtype=HALF), -1),
    lambda: fake_quant(data(4, 5, dtype=torch.float64), 0),
]


def dynamic(x: Tensor, group_size: int, grid: str = "float8_e4m3", **more: Any) -> Arguments:
    return {"x": x, "group_size": group_size, "grid": grid, **more}


NVFP4 = "float4_e2m1 scale_dtype=float8_e4m3"
DYNAMIC: list[Make] = [
    lambda: dynamic(data(2, 3), 3),
    lambda: dynamic(data(2, 3, 4, 4).to(memory_format=torch.channels_last), 2, "[0,15] affine"),
    lambda: dynamic(data(4, 3).t(), -1, "[-8,7] symmetric rounding=half_away"),
    lambda: dynamic(data(3, 32), 16, NVFP4, tensor_scale=torch.full((1,), 0.01)),
    lambda: dynamic(data(0, 3), -1),
    lambda: dynamic(data(64, dtype=HALF), 32, "float4_e2m1 scale_rule=floor"),
    lambda: dynamic(data(4, 5, dtype=torch.float64), 5),
]
FOLLOW: list[Make] = [
    lambda: follow(data(2, 3), 1),
    lambda: follow(data(40), -1, solved=0, rule="percentile", options=[99.0]),
    lambda: follow(data(40, dtype=HALF), -1, averaging_constant=0.0),
    with_gradient(lambda: follow(data(4, 5), -1, rule="min_max")),
]


def learned(x: Tensor, scale: Tensor, zero_point: Tensor, **more: Any) -> Arguments:
    return {"x": x, "scale": scale, "zero_point": zero_point, "grid": "[-8,7]", **more}


def backward_of(make: Make) -> Make:
    """The same arguments for the op of its gradients, which has none itself."""

    def made() -> Arguments:
        given = {k: v.detach() if torch.is_tensor(v) else v for k, v in make().items()}
        return {"grad": data(*given["x"].shape, dtype=given["x"].dtype), **given}

    return made


def tangent_of(make: Make) -> Make:
    """The same arguments for the op of the tangent, of all inputs or of one."""

    def made() -> Arguments:
        given = {k: v.detach() if torch.is_tensor(v) else v for k, v in make().items()}
        x, parameter = given["x"], given["parameter"]
        per_channel = torch.linspace(-1, 1, parameter.numel())
        return {
            "x_tangent": data(*x.shape, dtype=x.dtype),
            "parameter_tangent": None if x.numel() == 5 else per_channel,
            "zero_point_tangent": None if x.numel() == 7 else per_channel.flip(0),
            "mixed_tangent": per_channel + 1 if x.numel() > 7 else None,
            **given,
        }

    return made


def gptq(*shape: int, dtype: torch.dtype = torch.float32, **more: Any) -> Arguments:
    """A weight of [groups, rows, inputs]."""
    groups, rows, inputs = shape
    factor = torch.full((groups, inputs, inputs), 0.125, dtype=torch.float64).triu()
    scale = torch.linspace(0.25, 0.5, groups * rows).view(groups, rows, 1).expand(shape)
    return {
        "weight": data(*shape, dtype=dtype),
        "factor": factor,
        "scale": scale,
        "zero_point": torch.ones(shape, dtype=torch.int32),
        "grid": "[-8,7]",
        **more,
    }


LSQ: list[Make] = [
    lambda: learned(
        data(2, 3), torch.full((3,), 0.25), torch.zeros(3, dtype=torch.int32), ch_axis=1
    ),
    lambda: learned(
        data(4, 40, dtype=HALF),
        torch.full((1,), -0.125).requires_grad_(),
        torch.zeros(1).requires_grad_(),
        batch_axis=0,
    ),
    with_gradient(
        lambda: learned(data(5), torch.ones(1), torch.zeros(1, dtype=torch.int32), ch_axis=-1)
    ),
    lambda: learned(data(0), torch.ones(1), torch.zeros(1, dtype=torch.int32)),
]
PACT: list[Make] = [
    lambda: {"x": data(7), "alpha": torch.ones(1), "grid": "[0,15]"},
    with_gradient(
        lambda: {
            "x": data(3, 5),
            "alpha": torch.full((1,), 0.75).requires_grad_(),
            "grid": "[-8,7]",
        }
    ),
]


def by_name(method: str, parameter: str, make: Make) -> Make:
    """The same arguments for the op that takes a method's name."""

    def made() -> Arguments:
        given = make()
        return {"method": method, "parameter": given.pop(parameter), "zero_point": None, **given}

    return made


LEARNED = [
    *(by_name("lsq", "scale", make) for make in LSQ),
    *(by_name("pact", "alpha", make) for make in PACT),
]
SAMPLES: dict[str, list[Make]] = {
    "fake_quant": [*FAKE_QUANT, *map(with_gradient, (FAKE_QUANT[0], FAKE_QUANT[2], FAKE_QUANT[7]))],
    "_fake_quant_forward": FAKE_QUANT,
    "_fake_quant_backward": [
        lambda: {"grad": data(10), "mask": torch.tensor([0b10110, 1], dtype=torch.uint8)},
        lambda: {"grad": data(2, 4).t(), "mask": torch.tensor([77], dtype=torch.uint8)},
        lambda: {"grad": data(0), "mask": torch.empty(0, dtype=torch.uint8)},
    ],
    "dynamic_fake_quant": [*DYNAMIC, *map(with_gradient, DYNAMIC[:4])],
    "_dynamic_fake_quant_forward": DYNAMIC,
    "lsq": LSQ,
    "pact": PACT,
    "learned_fake_quant": LEARNED,
    "_learned_fake_quant_backward": [backward_of(make) for make in LEARNED],
    "_learned_fake_quant_tangent": [tangent_of(make) for make in LEARNED],
    "observe_": [
        lambda: {"x": data(2, 3), **statistic(data(2, 3), 1), "ch_axis": 1},
        lambda: {"x": data(7, dtype=HALF), **statistic(data(4), -1)},
        lambda: {"x": data(3, 4).t(), **statistic(data(4, 1), -1, histogram=False)},
        lambda: {"x": data(0, 3), **statistic(data(2, 3), 1), "ch_axis": 1},
        with_gradient(lambda: {"x": data(2, 3), **statistic(data(2, 3), 1), "ch_axis": 1}),
    ],
    "merge_": [
        lambda: statistic(data(2, 3), 1) | statistic(data(4, 3) * 9, 1, "other_"),
        lambda: statistic(data(9), -1) | statistic(data(0), -1, "other_"),
    ],
    "solve": [
        lambda: solve(data(8, 3), 1, "mse"),
        lambda: solve(data(30), -1, "percentile", options=[99.0], grid="[-128,127] affine"),
        lambda: solve(
            data(30),
            -1,
            "kl",
            options=[0.0],
            grid="[-128,127] symmetric scale_rule=tvm power_of_two",
        ),
        lambda: solve(data(0), -1, "aciq"),
    ],
    "solve_many": [solve_many],
    "qparams": [
        lambda: {
            "range": torch.tensor([[-1.0, 2.0], [0.0, 0.0], [1.0, 3.0]]),
            "grid": "[0,255] affine",
        },
        lambda: {"range": torch.zeros(0, 2), "grid": "[-8,7] symmetric"},
        lambda: {
            "range": torch.tensor([[-1.0, 2.0], [0.0, 0.0]]),
            "grid": NVFP4,
            "tensor_scale": torch.full((1,), 0.01),
        },
    ],
    "follow_": FOLLOW,
    "follow_fake_quant": [*FOLLOW, lambda: follow(data(3, 8), 0, mask="paper", solved=0)],
    "_follow_fake_quant_forward": [
        *FOLLOW[:3],
        lambda: follow(data(3, 5), 0, grid="[0,255] affine rounding=half_away", with_mask=False),
    ],
    "kl_threshold": [
        lambda: {
            "counts": torch.arange(512).reshape(2, 256) % 97,
            "bin_width": torch.tensor([0.5, 2.0], dtype=torch.float64),
        },
        lambda: {
            "counts": torch.arange(301)[None] % 41,
            "bin_width": torch.ones(1, dtype=torch.float64),
            "levels": 15,
            "variant": "tvm",
        },
    ],
}
SAMPLES["gptq"] = [
    lambda: gptq(2, 3, 4),
    lambda: gptq(1, 2, 70, dtype=torch.float64, grid="[-8,7] rounding=half_away"),
    lambda: gptq(0, 3, 4),
    lambda: gptq(1, 4, 3) | {"weight": data(1, 3, 4).mT},
]
for _rule in torch_ext.observers():
    SAMPLES[_rule] = [
        lambda: {"x": data(2, 3), "ch_axis": 1},
        lambda: {"x": data(6, 5).t(), "grid": "[0,15] affine"},
        lambda: {"x": data(0)},
        with_gradient(lambda: {"x": data(12)}),
    ]
