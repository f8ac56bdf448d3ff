"""nn.TransformerEncoder with a padding mask, which torch runs on nested tensors in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prepare_steps import CONFIG
from snapshots import same_bits
from torch_ext import calibrate, named_quantizers, prepare_qat, set_fake_quantize

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
PADDING = torch.zeros(3, 6, dtype=torch.bool)
PADDING[0, 4:] = True
PADDING[2, 2:] = True
INPUTS: dict[str, Any] = {"src": X, "src_key_padding_mask": PADDING}
MODES = pytest.mark.parametrize("example", [None, INPUTS], ids=["plain", "example"])
NORMS = pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])


def encoder(norm: bool = False) -> nn.Module:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)  # torch's defaults
    net = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16) if norm else None).eval()
    if norm:
        nn.init.constant_(net.norm.bias, 0.5)  # which the padded positions show
    net.qconfig = CONFIG  # type: ignore[assignment]
    return net


@MODES
@NORMS
@pytest.mark.parametrize("grad", [False, True])
def test_float_is_the_original(norm: bool, grad: bool, example: Any) -> None:
    plain = encoder(norm)
    net = prepare_qat(plain, example_inputs=example)
    with torch.set_grad_enabled(grad):
        assert same_bits(net(**INPUTS).detach(), plain(**INPUTS).detach())
        training = prepare_qat(plain, example_inputs=example).train()
        for module in (training, plain.train()):
            module.requires_grad_(False)
        torch.manual_seed(0)
        want = plain(**INPUTS)
        torch.manual_seed(0)
        assert same_bits(training(**INPUTS), want)


@MODES
@NORMS
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_it_calibrates_and_pads_with_zeros_as_torch_does(
    norm: bool, floating: bool, example: Any
) -> None:
    plain = encoder(norm)
    inputs = dict(INPUTS)
    if floating:
        inputs["src_key_padding_mask"] = torch.zeros(3, 6).masked_fill(PADDING, float("-inf"))
    net = prepare_qat(plain, example_inputs=None if example is None else inputs)
    calibrate(net, [inputs])
    with torch.no_grad():
        want, have = plain(**inputs), net(**inputs)
        alone = [net(src=x[None, : 6 - int(p.sum())]) for x, p in zip(X, PADDING, strict=True)]
    assert bool((want[PADDING] == want[PADDING][0]).all())  # zeros, behind the norm
    assert same_bits(have[PADDING], want[PADDING])
    assert not same_bits(have, want)
    assert float((have - want).abs().max()) < 0.2
    for i, row in enumerate(alone):  # what is padded does not count
        torch.testing.assert_close(have[i : i + 1, : row.shape[1]], row, atol=0.1, rtol=0)


@MODES
def test_with_gradients_nothing_is_nested(example: Any) -> None:
    plain = encoder()
    net = prepare_qat(plain, example_inputs=example)
    calibrate(net, [INPUTS])
    have, want = net(**INPUTS)[PADDING], plain(**INPUTS)[PADDING]
    assert bool((want != 0).any())
    torch.testing.assert_close(have, want, atol=0.2, rtol=0)
    set_fake_quantize(net, "qat")
    net.train()(**INPUTS).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@MODES
def test_compiled_torch_nests_nothing_either(example: Any) -> None:
    net = prepare_qat(encoder(), example_inputs=example)
    calibrate(net, [INPUTS])
    torch._dynamo.reset()
    with torch.no_grad():
        want = net(**INPUTS)
        have = torch.compile(net, fullgraph=True, backend="eager")(**INPUTS)
    assert same_bits(have[~PADDING], want[~PADDING])


@MODES
def test_a_mask_that_torch_does_not_nest(example: Any) -> None:
    """Padding on the left: torch runs its layers on the padded tensor, and so do we."""
    inputs = {"src": X, "src_key_padding_mask": PADDING.flip(1)}
    plain = encoder()
    net = prepare_qat(plain, example_inputs=None if example is None else inputs)
    calibrate(net, [inputs])
    with torch.no_grad():
        want, have = plain(**inputs), net(**inputs)
    assert bool((want != 0).all())
    torch.testing.assert_close(have, want, atol=0.2, rtol=0)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = encoder(norm=True), nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@MODES
def test_a_mean_over_padded_positions_is_that_of_the_float_model(example: Any) -> None:
    net = Pooled().eval()
    net.qconfig = CONFIG  # type: ignore[assignment]
    made = prepare_qat(net, example_inputs=None if example is None else (X, PADDING))
    set_fake_quantize(made, "calibration")
    with torch.no_grad():
        made(X, PADDING)
        set_fake_quantize(made, "validation")
        error = (made(X, PADDING) - net(X, PADDING)).abs().max()
    assert float(error) < 0.05
    assert any(name.startswith("head.") for name in named_quantizers(made))
