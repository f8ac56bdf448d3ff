"""Means of channels against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_ext.correction.walk.channel_sums import ChannelSums

SHAPES = {
    "conv1d": ((5, 7, 11), -2),
    "conv2d": ((5, 7, 6, 11), -3),
    "conv3d": ((2, 7, 3, 4, 5), -4),
    "one image": ((7, 6, 11), -3),
    "linear": ((9000, 7), -1),
    "tokens": ((3, 40, 7), -1),
    "one row": ((7,), -1),
    "no rows": ((0, 7), -1),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums(case: str, dtype: torch.dtype) -> None:
    shape, axis = SHAPES[case]
    generator = torch.Generator().manual_seed(1)
    given = [(torch.randn(shape, generator=generator) + 100).to(dtype) for _ in range(2)]
    if len(shape) == 4:
        given[1] = given[1].contiguous(memory_format=torch.channels_last)
    whole, light = ChannelSums(), ChannelSums()
    for x in given:
        whole.add("a", x, axis)
        light.add_sums("a", x, axis)
    values = np.stack([x.double().numpy() for x in given])
    others = tuple(i for i in range(values.ndim) if i != values.ndim + axis)
    for sums, rtol in ((whole, 1e-14), (light, 1e-14 if dtype == torch.float64 else 1e-6)):
        assert sums.counts["a"] == values.size // 7
        assert sums.sums["a"].dtype == torch.float64
        np.testing.assert_allclose(sums.sums["a"].numpy(), values.sum(others), rtol=rtol)
    np.testing.assert_allclose(whole.squares["a"].numpy(), (values**2).sum(others), rtol=1e-13)
