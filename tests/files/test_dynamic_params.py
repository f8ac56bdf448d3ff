"""Files of quantizers with dynamic scales: what an entry reads as that lost a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from torch_ext import FakeQuantize, read_quantizers, save_observer_params
from torch_ext.files.quantizer_params import params_from, spec_of, tensors_of

KEYS: dict[str, dict[str, Any]] = {
    "token": {},
    "groups": {"group_size": 8},
    "nvfp4": {"group_size": 16, "dtype": "float4_e2m1", "scale_dtype": "float8_e4m3"},
}


def quantizer(name: str) -> FakeQuantize:
    made = FakeQuantize("fake_quant", "min_max", dynamic=True, **KEYS[name])
    net = nn.ModuleDict({"x": made})
    torch_ext.set_fake_quantize(net, "calibration")
    made(torch.linspace(-3, 3, 32))
    torch_ext.set_fake_quantize(net, "validation")
    return made


@pytest.mark.parametrize("name", ["token", "groups"])
def test_without_its_key_it_is_no_static_quantizer_with_a_range(name: str) -> None:
    made = quantizer(name)
    tensors, spec = tensors_of(made), spec_of(made)
    assert int(tensors["solved"]) == 0
    del spec["dynamic"]
    try:
        read = params_from(tensors, spec)
    except ValueError:
        assert name == "groups"  # of what is no weight
    else:
        assert not read.solved


def test_a_range_of_dynamic_scales_alone_is_refused() -> None:
    made = quantizer("token")
    tensors = tensors_of(made) | {"solved": torch.ones(1, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"^solved: expected values to be 0 with dynamic scales"):
        params_from(tensors, spec_of(made))


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("key", ["scale_dtype", "ch_axis", "group_size", "qscheme", "quant_max"])
def test_a_missing_key_is_called_missing(name: str, key: str) -> None:
    made = quantizer(name)
    tensors, spec = tensors_of(made), spec_of(made)
    assert params_from(tensors, spec).is_dynamic
    del spec[key]
    lost = {"scale_dtype": "float8_e4m3", "group_size": 16}
    want = f"^{key}: missing$"
    if name == "nvfp4" and key in lost:  # without it, it is another quantizer, which is refused too
        want = "description: |: missing|: expected"
    with pytest.raises(ValueError, match=want):
        params_from(tensors, spec)


@pytest.mark.parametrize("name", KEYS)
def test_files_read_back(name: str, tmp_path: Path) -> None:
    made, x = quantizer(name), torch.randn(4, 32)
    save_observer_params(nn.ModuleDict({"x": made}), tmp_path / "one")
    read = read_quantizers(tmp_path / "one").get_submodule("x")
    assert torch.equal(read(x), made(x))
