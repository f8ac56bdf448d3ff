"""Padded tokens have no influence on the others, whatever the mask, the grid and the rule.

Measured: with other values in the padded tokens the outputs of the others have not changed by a
bit. The outputs are also near those in float: a range that spans the mask would leave no scores.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from grid_checks import off_grid
from nets import masked
from prepare_steps import names, ready, run_calibration
from torch_ext import QConfig, describe, get_default_qconfig, set_fake_quantize

X = torch.randn(4, masked.TOKENS, masked.DIM, generator=torch.Generator().manual_seed(2))
OTHER = X * torch.tensor([1.0] * 6 + [-1.5] * 2)[:, None]
FULL = torch.ones(4, masked.TOKENS, dtype=torch.bool)
PADDED = torch.arange(masked.TOKENS).expand(4, -1) < 6
# QAT's ranges follow the batch, its padding too; here they stay, so that only masks are looked at.
STILL = {"averaging_constant": 0.0}
AFFINE = {"dtype": "uint8", "qscheme": "per_tensor_affine"}
# The configuration, and how far the outputs may be from float.
CONFIGS: dict[str, tuple[QConfig, float]] = {
    "uint8 affine": (get_default_qconfig(activation_qkwargs=AFFINE | STILL), 0.05),
    "int4": (get_default_qconfig(activation_qkwargs={"dtype": "int4"} | STILL), 0.6),
    "int16": (get_default_qconfig(activation_qkwargs={"dtype": "int16"} | STILL), 0.02),
    "percentile": (
        get_default_qconfig(activation_observer="percentile", activation_qkwargs=STILL),
        0.05,
    ),
    "kl": (get_default_qconfig(activation_observer="kl", activation_qkwargs=STILL), 0.2),
}


def unmasked(y: Tensor) -> Tensor:
    """The outputs of the tokens that are no padding; of pooled tokens, all."""
    return y[:, :6] if y.dim() == 3 else y


def calibrated(net: nn.Module, config: QConfig, example: Tensor) -> nn.Module:
    """Calibrated on tokens of which one in 4096 is padding, so that no percentile spans it."""
    many = torch.cat([X, torch.randn(508, masked.TOKENS, masked.DIM)])
    keep = torch.ones(512, masked.TOKENS, dtype=torch.bool)
    keep[-1, -1] = False
    made = ready(net.eval(), config, example_inputs=(X, net.mask(example)))  # type: ignore[operator]
    run_calibration(made, many, net.mask(keep))  # type: ignore[operator]
    return made


# Every net, and a few in every configuration.
CASES = [(kind, config) for kind in masked.NETS for config in ("uint8 affine", "percentile")]
CASES += [(kind, config) for kind in ("-inf", "Windows", "Sinks") for config in CONFIGS]


@pytest.mark.parametrize(("kind", "config"), dict.fromkeys(CASES))
@pytest.mark.parametrize("example", [FULL, PADDED], ids=["no padding", "padding"])
def test_no_leak(kind: str, example: Tensor, config: str, one_thread: None) -> None:
    net, (qconfig, near) = masked.NETS[kind](), CONFIGS[config]
    made, mask = calibrated(net, qconfig, example), net.mask(PADDED)
    with torch.no_grad():
        want = unmasked(net(X, mask))
        assert torch.equal(want, unmasked(net(OTHER, mask)))
        if kind not in ("Outer", "OutOfSight"):  # which have products of masks, and scripted code
            assert off_grid(made, X, mask)[0] == []
        for state in ("validation", "qat"):
            set_fake_quantize(made, state)
            have = unmasked(made(X, mask))
            assert torch.equal(have, unmasked(made(OTHER, mask))), state
            off = float((have - want).norm() / want.norm())
            assert off < near, (state, off)
    assert not any("mask" in name or "add" in name for name in names(made) - {"add_quantizer_1"})


@pytest.mark.parametrize("config", ["uint8 affine", "percentile"])
@pytest.mark.parametrize("kind", sorted(masked.NETS.keys() - {"AddedByAModule"}))
def test_no_leak_without_an_example(kind: str, config: str, one_thread: None) -> None:
    """Layers read their inputs quantized, and masks are no inputs of layers; Add() asks for it."""
    net = masked.NETS[kind]()
    made = ready(net.eval(), CONFIGS[config][0])
    run_calibration(made, X, net.mask(FULL))
    assert not any("mask" in name for name in names(made))
    mask = net.mask(PADDED)
    with torch.no_grad():
        assert torch.equal(unmasked(made(X, mask)), unmasked(made(OTHER, mask)))


@pytest.mark.parametrize("method", ["fake_quant", "lsq"])
def test_no_leak_where_ranges_follow(method: str) -> None:
    """The padded tokens are small, so every range is that of the others."""
    net = masked.Added(-1e4)
    config = get_default_qconfig(method)
    made = ready(net.eval(), config, example_inputs=(X, net.mask(FULL)))
    small = X * torch.tensor([1.0] * 6 + [1e-2] * 2)[:, None]
    other = X * torch.tensor([1.0] * 6 + [-1e-2] * 2)[:, None]
    run_calibration(made, small, net.mask(FULL))
    set_fake_quantize(made, "qat")
    copies = [made, ready(masked.Added(-1e4).eval(), config, example_inputs=(X, net.mask(FULL)))]
    copies[1].load_state_dict(made.state_dict())
    set_fake_quantize(copies[1], "qat")
    outs = [one(x, net.mask(PADDED)) for one, x in zip(copies, (small, other), strict=True)]
    assert torch.equal(unmasked(outs[0]), unmasked(outs[1]))
    for out in outs:
        unmasked(out).square().sum().backward()
    for (name, left), right in zip(made.named_parameters(), copies[1].parameters(), strict=True):
        if left.grad is not None and "k." not in name and "v." not in name:
            assert torch.equal(left.grad, right.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["-inf", "AddedToAView", "Sinks", "Sigmoid", "BiasFirst", "Sdpa"])
@pytest.mark.parametrize("state", ["validation", "qat"])
def test_compiled(kind: str, state: str) -> None:
    net = masked.NETS[kind]()
    made, mask = calibrated(net, CONFIGS["uint8 affine"][0], FULL), net.mask(PADDED)
    set_fake_quantize(made, state)
    torch._dynamo.reset()
    fast = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(fast(X, mask), made(X, mask))
        assert torch.equal(unmasked(fast(X, mask)), unmasked(fast(OTHER, mask)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["-inf", "Sinks", "Chosen", "OneMinus", "multihead, float"])
def test_exported(kind: str, strict: bool) -> None:
    net = masked.NETS[kind]()
    made, mask = calibrated(net, CONFIGS["uint8 affine"][0], FULL), net.mask(PADDED)
    program = torch.export.export(made, (X, mask), strict=strict).module()
    with torch.no_grad():
        assert torch.equal(program(X, mask), made(X, mask))
        assert torch.equal(unmasked(program(X, mask)), unmasked(program(OTHER, mask)))


class Flex(masked.Added):
    """The mask stands in a function that `flex_attention` compiles."""

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        def with_mask(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + mask[batch, 0, j]

        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        out: Tensor = flex_attention(q, k, v, score_mod=with_mask)
        return out[:, 0] + v[:, 0]


@torch.no_grad()
def test_flex_attention() -> None:
    net = Flex(-1e4)
    mask = net.mask(PADDED)
    made = ready(net.eval(), CONFIGS["uint8 affine"][0], example_inputs=(X, net.mask(FULL)))
    assert torch.equal(made(X, mask), net(X, mask))
    run_calibration(made, X, mask)
    assert torch.equal(unmasked(made(X, mask)), unmasked(made(OTHER, mask)))


# ---- masks in half precision -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [-1e4, -math.inf, None])
def test_half(dtype: torch.dtype, value: float | None) -> None:
    net = masked.Added(torch.finfo(dtype).min if value is None else value).to(dtype)
    x, other, full, padded = (
        given.to(dtype) for given in (X, OTHER, net.mask(FULL), net.mask(PADDED))
    )
    made = ready(net.eval(), CONFIGS["uint8 affine"][0], example_inputs=(x, full))
    run_calibration(made, x, padded)
    with torch.no_grad():
        assert torch.equal(unmasked(made(x, padded)), unmasked(made(other, padded)))


# ---- what is data all the same -----------------------------------------------------------------


class Data(nn.Module):
    """Sums, products and concatenations as in other nets."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = (nn.Linear(masked.DIM, masked.DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError


class Heads(Data):
    """As SSD: the heads' logits, side by side, in a softmax."""

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.one(x), self.two(x)], 1).softmax(-1)


class Residual(Data):
    """A sum that a softmax reads, and a layer too."""

    def forward(self, x: Tensor) -> Any:
        y = self.one(x) + self.two(x)
        return self.out(y), y.softmax(-1)


class Chain(Data):
    """A sum that a softmax reads at the end of residual blocks."""

    def forward(self, x: Tensor) -> Any:
        y = self.one(x) + self.two(x)
        return (y + self.out(F.relu(y))).softmax(-1)


class Gate(Data):
    def forward(self, x: Tensor) -> Any:
        return self.out(torch.sigmoid(self.one(x) + self.two(x)) * self.one(x))


class Inpainting(Data):
    """The mask of an image is a channel that a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2 * masked.DIM, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.cat([x, (x > 0).float()], -1))


class Times(Data):
    """Sines of integers are data, not a mask."""

    def forward(self, x: Tensor) -> Any:
        angles = torch.arange(masked.TOKENS)[:, None] * x.mean().sign().long()
        return self.out(self.one(x) + (angles.float() * 0.3).sin())


@pytest.mark.parametrize(
    ("net", "quantized"),
    [
        (Heads(), {"cat_quantizer"}),
        (Residual(), {"one.activation_quantizer", "two.activation_quantizer"}),
        (Chain(), {"one.activation_quantizer", "two.activation_quantizer"}),
        (Gate(), {"one.activation_quantizer", "two.activation_quantizer", "sigmoid_quantizer"}),
        (Inpainting(), {"cat_quantizer"}),
        (Times(), {"one.activation_quantizer", "sin_quantizer"}),
    ],
    ids=lambda given: type(given).__name__,
)
def test_data_is_quantized(net: nn.Module, quantized: set[str]) -> None:
    assert quantized <= names(ready(net.eval(), example_inputs=X))


def test_a_product_with_a_mask_reads_floats() -> None:
    """A mask of 0 and 1 keeps what it keeps as it was: 1 is no level of a symmetric grid."""

    class Kept(Data):
        def forward(self, x: Tensor, keep: Tensor) -> Any:
            return self.out(F.relu(self.one(x)) * keep[..., None])

    made = ready(Kept().eval(), example_inputs=(X, PADDED.float()))
    assert {row.name for row in describe(made).quantizers if "weight" not in row.name} == {
        "input_quantizers.x",
        "mul_quantizer",
    }
