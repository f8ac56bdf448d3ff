"""Groups of weights in other people's models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from snapshots import same_bits
from torch_ext import (
    calibrate,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)
from zoo import operators


def by_hand(weight: Tensor, axis: int, size: int) -> Tensor:
    """int4 with a scale for each group, which takes the largest magnitude to 7.5."""
    rows = weight.detach().movedim(axis, -1)
    groups = rows.reshape(-1, size)
    scale = (groups.abs().amax(1, keepdim=True).double() / 7.5).float()
    made = ((groups / scale).round() + 0.0).clamp(-8, 7) * scale
    return made.reshape(rows.shape).movedim(-1, axis)


def solved(net: nn.Module, x: object, size: int) -> nn.Module:
    keys = {"dtype": "int4", "group_size": size}
    net.qconfig = get_default_qconfig(weight_qkwargs=keys)  # type: ignore[assignment]
    model = prepare_qat(net, example_inputs=x)
    calibrate(model, [x], progress=False)
    return model


def test_gpt2() -> None:
    """Its layers multiply by [inputs, outputs], so groups of inputs lie along axis 0."""
    operators.declare()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, use_cache=False
    )
    net = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 64, (2, 8))
    model = solved(net, {"input_ids": ids}, 16)
    found = {name: q.observer for name, q in named_quantizers(model).items() if q.transient}
    attention = found["transformer.h.0.attn.c_attn.parametrizations.weight.0"]
    assert (attention.ch_axis, attention.channel_len) == (0, 32 * 96 // 16)
    layer = net.transformer.h[0].attn.c_attn
    made = model.transformer.h[0].attn.c_attn  # type: ignore[union-attr,index]
    assert same_bits(made.weight.detach(), by_hand(layer.weight, 0, 16))
    set_fake_quantize(model, "qat")
    model.train()(input_ids=ids, labels=ids).loss.backward()
    original = made.parametrizations.weight.original
    assert original.grad is not None
    assert float(original.grad.abs().sum()) > 0


def test_vision_transformer() -> None:
    operators.declare()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.models.VisionTransformer(
        img_size=16, patch_size=4, in_chans=8, embed_dim=32, depth=1, num_heads=2, num_classes=8
    ).eval()
    x = torch.randn(2, 8, 16, 16)
    model = solved(net, x, 8)
    found = {name: q.observer for name, q in named_quantizers(model).items() if q.transient}
    assert len(found) == 6
    assert {(one.group_size, one.ch_axis) for one in found.values()} == {(8, 1)}
    for name in ("patch_embed.proj", "blocks.0.attn.qkv", "head"):
        want = by_hand(net.get_submodule(name).weight, 1, 8)
        assert same_bits(model.get_submodule(name).weight.detach(), want)
