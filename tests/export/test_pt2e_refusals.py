"""What export.pt2e refuses and warns of, by name; nothing is changed when it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export_models import solved
from nets.tiny_net import images as tiny_images
from prepare_steps import run_calibration
from pt2e_programs import Residual, calls, config, images, ready, run
from snapshots import same, same_bits, snapshot
from torch_ext import (
    QuantizationWarning,
    export,
    get_default_qconfig,
    prepare_qat,
    set_fake_quantize,
)
from torch_ext.quantizers.find import PreparedModel

UINT8 = {"dtype": "uint8", "qscheme": "per_tensor_affine"}
NARROW = {"quant_min": -127}
FIRST = "conv1.input_quantizers.input"
WEIGHT = "conv1.parametrizations.weight.0"


def tiny(**keys: Any) -> Any:
    return lambda: solved(**{"activation": UINT8, **keys})


def in_calibration() -> nn.Module:
    net = solved(activation=UINT8)
    set_fake_quantize(net, "calibration", pattern="fc.*")
    return net


def not_finite() -> nn.Module:
    net = solved(activation=UINT8)
    with torch.no_grad():
        net.fc.parametrizations.weight.original[0, 0] = torch.nan
    set_fake_quantize(net, "validation")  # the range of the other values
    return net


def per_channel() -> nn.Module:
    keys = {**UINT8, "qscheme": "per_channel_affine", "ch_axis": 1, "channel_len": 4}
    qconfig = get_default_qconfig(activation_qkwargs=keys)
    return ready(nn.Sequential(nn.Linear(4, 4)), qconfig, torch.randn(3, 4))


X86, XNNPACK = {"backend": "x86"}, {"backend": "xnnpack"}
REFUSED: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], tuple[str, ...]]] = {
    "backend": (tiny(), tiny_images(), {"backend": "arm"}, ("unknown backend 'arm'; known: x86",)),
    "backend type": (tiny(), tiny_images(), {"backend": 3}, ("unknown backend 3",)),
    "batch": (
        tiny(),
        tiny_images(),
        {"dynamic_batch": 1},
        ("expected dynamic_batch to be True or False, got 1",),
    ),
    "no model": (lambda: 3, tiny_images(), X86, ("expected model to be a torch.nn.Module, got 3",)),
    "float": (lambda: nn.Linear(2, 2), tiny_images(), X86, ("got none; call prepare_qat first",)),
    "unsolved": (in_calibration, tiny_images(), X86, ("fc.input_quantizers.input: it is in CAL",)),
    "example": (tiny(), 3, X86, ("expected example_inputs to be a tensor, a tuple",)),
    "shape": (tiny(), torch.randn(4, 3, 8, 8), X86, ("torch.export cannot trace the model",)),
    "one image": (
        tiny(),
        tiny_images(1),
        {"dynamic_batch": True},
        ("expected example_inputs to have a batch of 2 or more",),
    ),
    "double": (
        lambda: solved(activation=UINT8).double(),
        tiny_images().double(),
        X86,
        (f"{FIRST}: it quantizes float64; model.float() makes it float32",),
    ),
    "nan": (not_finite, tiny_images(), X86, ("fc.weight: it is not finite",)),
    "signed for x86": (
        solved,
        tiny_images(),
        X86,
        (
            f"{FIRST}: its grid is int8 [-128, 127], not uint8 [0, 255]",
            'take get_default_qconfig(backend="x86"); or set_fake_quantize(model, "float"',
            "nothing was written",
        ),
    ),
    "unsigned for XNNPACK": (
        tiny(weight=NARROW),
        tiny_images(),
        XNNPACK,
        (
            f"{FIRST}: its grid is uint8 [0, 255], not int8 [-128, 127]",
            'take get_default_qconfig(backend="xnnpack")',
        ),
    ),
    "7 bits": (
        tiny(activation={**UINT8, "quant_max": 127}),
        tiny_images(),
        X86,
        (f"{FIRST}: its grid is uint8 [0, 127], not uint8 [0, 255]",),
    ),
    "16 bits": (
        tiny(activation={"dtype": "int16"}),
        tiny_images(),
        XNNPACK,
        (f"{FIRST}: its grid is int16 [-32768, 32767], not int8 [-128, 127]",),
    ),
    "-128 in a weight": (
        lambda: solved(),
        tiny_images(),
        XNNPACK,
        (f"{WEIGHT}: its grid is [-128, 127], not within [-127, 127]",),
    ),
    "affine weight": (
        tiny(weight={"qscheme": "per_channel_affine"}),
        tiny_images(),
        X86,
        (f"{WEIGHT}: its zero point is not 0",),
    ),
    "16 bits in a weight": (
        tiny(weight={"dtype": "int16"}),
        tiny_images(),
        X86,
        (f"{WEIGHT}: its grid is [-32768, 32767], not within [-128, 127]",),
    ),
    "per channel": (
        per_channel,
        torch.randn(3, 4),
        X86,
        ("input_quantizers.input: it quantizes an activation per channel (axis 1)",),
    ),
}


@pytest.mark.filterwarnings("ignore::torch_ext.QuantizationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_reason(case: str) -> None:
    make, example, keys, texts = REFUSED[case]
    net = make()
    before = snapshot(net) if isinstance(net, nn.Module) else {}
    with pytest.raises((ValueError, TypeError)) as caught:
        export.pt2e(net, example, **keys)
    for text in texts:
        assert text in str(caught.value)
    assert str(caught.value).startswith("export.pt2e: ")
    if isinstance(net, nn.Module):
        assert same(snapshot(net), before)
        for module in net.modules():
            assert "_quantize" not in vars(module)


def test_a_quantizer_that_the_example_does_not_reach_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, both: bool = True) -> Tensor:
            y = self.left(x)
            return y + self.right(x) if both else y

    x = torch.randn(3, 4)
    net = Two()
    net.qconfig = config("x86")  # type: ignore[assignment]
    model = prepare_qat(net, example_inputs=[(x,), (x, False)])
    run_calibration(model, x)
    with pytest.raises(
        ValueError, match=r"right\.parametrizations\.weight\.0: the forward does not"
    ):
        export.pt2e(model, (x, False))


def floated(net: nn.Module, backend: str, x: Any, **keys: Any) -> tuple[Any, Any, str]:
    """The model, its program, and the warning of what the engine computes in float."""
    model = ready(net, config(backend), x, **keys)
    with pytest.warns(QuantizationWarning, match="computes these in float") as caught:
        program = export.pt2e(model, x, backend=backend)
    return model, program, str(caught[0].message)


def test_a_layer_without_a_quantized_output_stays_float_for_xnnpack() -> None:
    """Its weight is stored in float then, with the values that VALIDATION uses."""
    torch.manual_seed(0)
    net = ready(Residual(), config("xnnpack"), images(), output_qconfig=None)
    with pytest.warns(QuantizationWarning) as caught:
        program = export.pt2e(net, images(4), backend="xnnpack")
    assert str(caught[0].message) == (
        "export.pt2e: XNNPACK computes these in float: head (its output is not quantized); "
        'get_default_qconfig(backend="xnnpack") lets prepare_qat, given example_inputs, quantize '
        "results of layers, and output_qconfig what the model returns"
    )
    source = next(s for s in PreparedModel("test", net).weights.values() if s.owner == "head")
    quantizer = net.get_submodule("head.parametrizations.weight.0")
    assert same_bits(program.state_dict["head.weight_dequantized"], quantizer(source.read()))
    assert "head.weight" not in program.state_dict
    assert program.state_dict["hidden.weight"].dtype == torch.int8
    with torch.no_grad():
        torch.testing.assert_close(run(program, images(4)), net(images(4)), rtol=0, atol=1e-5)
    # Inductor has no such condition.
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        export.pt2e(ready(Residual(), config("x86"), images(), output_qconfig=None), images(4))


def test_layers_that_the_engine_has_not_in_integers() -> None:
    net = nn.Sequential(nn.Conv3d(2, 4, 1), nn.ConvTranspose3d(4, 2, 1))
    x = torch.randn(2, 2, 4, 4, 4)
    model, program, text = floated(net, "x86", x)
    assert "0 (Inductor has no conv3d of integers)" in text
    assert "1 (Inductor has no conv_transpose3d of integers)" in text
    assert program.state_dict["0.weight"].dtype == torch.int8
    with torch.no_grad():
        torch.testing.assert_close(run(program, x), model(x), rtol=0, atol=1e-5)


def test_a_layer_whose_input_is_not_quantized() -> None:
    model = ready(nn.Sequential(nn.Linear(4, 4)), config("x86"), torch.randn(3, 4))
    set_fake_quantize(model, "float", pattern="*input*")
    with pytest.warns(QuantizationWarning, match=r"0 \(its input is not quantized\)"):
        program = export.pt2e(model, torch.randn(3, 4))
    assert len(calls(program, "quantize_per_tensor")) == 1


def test_weights_that_no_layer_reads_directly() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2))
    x = torch.randn(2, 4, 5, 5)
    model, program, text = floated(net, "xnnpack", x)
    assert "0 (its weight is read by " in text
    with torch.no_grad():
        torch.testing.assert_close(run(program, x), model(x), rtol=0, atol=1e-5)
