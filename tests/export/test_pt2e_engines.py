"""Programs of export.pt2e in the engines they are for: VALIDATION's classes, in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines_pt2e import executorch, inductor, xnnpack
from pt2e_programs import config, images, ready, residual, steps_apart, trained
from torch_ext import export, named_quantizers

BATCH = 32


def check_against_validation(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """Same classes, at most a step of the output apart, and nearly everywhere none."""
    with torch.no_grad():
        want = model(x)
    made = run(x)
    output = named_quantizers(model)["output_quantizers.0"]
    apart = steps_apart(made, want, output.calculate_qparams()[0])
    assert apart.max() < 1.01
    assert (apart > 0.01).double().mean() < 0.1
    # Where two classes are no step apart in VALIDATION, either may win.
    top = want.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 1.5 * output.calculate_qparams()[0]
    assert clear.sum() > BATCH // 2
    assert torch.equal(made.argmax(1)[clear], want.argmax(1)[clear])


MODELS: dict[str, Callable[[str], Any]] = {
    "calibrated": residual,
    "lsq trained": lambda backend: trained(backend, "lsq"),
}


@pytest.mark.parametrize("made", [*MODELS, "pact"])
def test_xnnpack_runs_the_whole_net_in_one_piece(made: str) -> None:
    executorch()
    model = MODELS[made]("xnnpack") if made != "pact" else residual("xnnpack", "pact", "pact")
    run, kernels = xnnpack(export.pt2e(model, images(BATCH), backend="xnnpack"))
    assert kernels == {"executorch_call_delegate": 1, "getitem": 1}
    check_against_validation(run, model, images(BATCH))


def test_xnnpack_runs_a_net_with_a_float_head() -> None:
    executorch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    model = ready(net, config("xnnpack"), x, output_qconfig=None)
    with pytest.warns(UserWarning, match=r"0 \(its output is not quantized\)"):
        program = export.pt2e(model, x, backend="xnnpack")
    run, _ = xnnpack(program)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=2e-2)


@pytest.mark.parametrize("made", MODELS)
def test_inductor_calls_integer_kernels(made: str) -> None:
    model = MODELS[made]("x86")
    run, kernels = inductor(export.pt2e(model, images(BATCH)), images(BATCH))
    assert kernels["float"] == 0, kernels
    assert sum(count for name, count in kernels.items() if "conv" in name) == 3, kernels
    assert sum(count for name, count in kernels.items() if "linear" in name) == 2, kernels
    check_against_validation(run, model, images(BATCH))


def test_inductor_calls_integer_kernels_for_a_transformer_layer() -> None:
    x = torch.randn(BATCH, 6, 16)
    model = ready(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), config("x86"), x)
    run, kernels = inductor(export.pt2e(model, x), x)
    assert kernels == {"qlinear_pointwise": 4, "float": 0}
    with torch.no_grad():
        apart = steps_apart(run(x), model(x), named_quantizers(model)["output_quantizers.0"].scale)
    assert apart.max() < 1.01
    assert (apart > 0.01).double().mean() < 0.05
