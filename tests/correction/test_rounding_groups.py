"""Corrections of weights whose groups have scales of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corrections import output_error
from gptq_definition import by_definition, hessian
from snapshots import same_bits
from torch_ext import (
    calibrate,
    choose_bits,
    correct_bias,
    equalize,
    get_default_qconfig,
    named_quantizers,
    ops,
    prepare_qat,
    reconstruct,
    sensitivity,
    set_fake_quantize,
    sweep,
)
from torch_ext.correction.rounding.round_by_gptq import inverse_factor

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()]
    layers += [nn.ConvTranspose2d(8, 8, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 6)]
    return nn.Sequential(*layers).eval()


def data(seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 4, 6, 6, generator=generator) for _ in range(2)]


def solved(method: Any = "fake_quant", **keys: Any) -> nn.Module:
    model = net()
    given = {"dtype": "int4", "group_size": 4, **keys}
    model.qconfig = get_default_qconfig(  # type: ignore[assignment]
        weight_fake_quant=method, weight_qkwargs=given
    )
    model = prepare_qat(model)
    calibrate(model, data(), progress=False)
    return model


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize("quantizer", ["fake_quant", "lsq"])
def test_rounds_to_the_grids_of_groups(method: Any, quantizer: str) -> None:
    model = solved(quantizer)
    before = output_error(net(), model, data())
    scales = {
        name: q.calculate_qparams()[0].clone()
        for name, q in named_quantizers(model).items()
        if q.transient
    }
    reconstruct(model, data(), method=method, progress=False)
    assert output_error(net(), model, data()) < 0.6 * before
    for name, scale in scales.items():
        q = named_quantizers(model)[name]
        assert torch.equal(q.calculate_qparams()[0], scale)
        assert q.holds_range == (quantizer == "fake_quant")
    # On the grid: each value of a group is an integer times its scale.
    weight = model[7].weight.detach().reshape(-1, 4)  # type: ignore[index,union-attr,operator]
    levels = weight / scales["7.parametrizations.weight.0"][:, None]
    assert float((levels - levels.round()).abs().max()) < 1e-5
    assert int(levels.round().min()) >= -8
    assert int(levels.round().max()) <= 7


def test_gptq_in_float8() -> None:
    model = solved(dtype="float8_e4m3")
    before = output_error(net(), model, data())
    reconstruct(model, data(), progress=False)
    assert output_error(net(), model, data()) < before


def test_op_with_a_scale_for_each_group_of_inputs() -> None:
    """Against the definition, with the scale of each value."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1, 6, 12, generator=generator).double()
    scale = (torch.rand(1, 6, 3, generator=generator) * 0.2 + 0.1).repeat_interleave(4, 2)
    zero_point = torch.zeros(weight.shape, dtype=torch.int32)
    h = hessian(1, 12)
    have = ops.gptq(weight, inverse_factor(h), scale, zero_point, -8, 7)[0]
    levels = (have / scale[0]).round().long().numpy()
    for row in range(6):
        # In units of each input's scale the grid is the same for all inputs.
        units = scale[0, row].double().numpy()
        turned = h[0].numpy() * np.outer(units, units)
        want = by_definition(weight[0, row].numpy() / units, turned, 1.0, 0, -8, 7)
        assert (levels[row] == want).all()


def test_other_corrections_and_searches_run() -> None:
    plain, x = net(), data()
    model = solved()
    before = output_error(plain, model, x)
    correct_bias(model, x, progress=False)
    assert output_error(plain, model, x) <= before
    equalized = equalize(net(), x[0])
    assert equalized is not None

    def loss(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((candidate(b) - plain(b)).square().mean() for b in x))

    model = solved()
    table = sensitivity(model, x, progress=False)
    assert len(table.rows) == len(named_quantizers(model))
    choice = choose_bits(model, x, 0.8, progress=False)
    choice.apply(model)
    for q in named_quantizers(model).values():
        assert q.observer.group_size == (4 if q.transient else None)
    set_fake_quantize(model, "validation")
    assert same_bits(model(x[0]), model(x[0]))
    found = sweep(solved(), loss)
    assert found is not None
