"""torch's own checks of an op: schema, autograd registration, fake tensors, AOT dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from op_samples import SAMPLES, Make

CASES = [
    pytest.param(op, make, id=f"{op}-{i}")
    for op, makes in SAMPLES.items()
    for i, make in enumerate(makes)
]


@pytest.mark.parametrize(("op", "make"), CASES)
def test_opcheck(op: str, make: Make):
    checked: Any = getattr(torch.ops.torch_ext, op).default
    result = torch.library.opcheck(checked, (), make())
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4


@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_op_is_tagged_for_the_compiler(op: str):
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.torch_ext, op).default.tags
