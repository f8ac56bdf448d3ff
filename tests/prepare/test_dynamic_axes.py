"""Where prepare_qat puts quantizers with dynamic scales, and along which axis their groups lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ext
from block_values import in_groups, int8
from torch_ext import (
    FakeQuantize,
    describe,
    get_block_qconfig,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)
from zoo import operators

STATES = ["calibration", "qat", "validation", "float"]


def prepared(net: nn.Module, example: Any = None, mapping: Any = None, **keys: Any) -> nn.Module:
    net.qconfig = get_default_qconfig(
        activation_qkwargs={"dynamic": True, **keys}, weight_fake_quant=None
    )
    return prepare_qat(net.eval(), example_inputs=example, mapping=mapping)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2),
        nn.Flatten(),
        nn.Linear(392, 5),
    )


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("group", [None, 8])
def test_convolutions_and_linear(group: int | None, with_example: bool) -> None:
    net, x = convolutions(), torch.randn(3, 8, 8, 8)
    model = prepared(net, x if with_example else None, group_size=group)
    set_fake_quantize(model, "validation")
    hidden = net[0](in_groups(x, int8, 1, group)).relu()
    hidden = net[2](in_groups(hidden, int8, 1, group)).flatten(1)
    want = net[4](in_groups(hidden, int8, -1, group))
    assert torch.equal(model(x), want)
    axes = [q.axis for q in named_quantizers(model).values()]  # type: ignore[attr-defined]
    assert sorted(axes) == [-3, -3, -1]


class Attention(nn.Module):
    """One tensor is cut into query, key and value, which are read along different axes."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, quantize: Any = lambda x, axis: x) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(quantize(x, -1)).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        if self.own:
            scores = quantize(q, -1) @ quantize(k.transpose(-2, -1), -2) / 8**0.5
            y = quantize(scores.softmax(-1), -1) @ quantize(v, -2)
        else:
            y = F.scaled_dot_product_attention(quantize(q, -1), quantize(k, -1), quantize(v, -2))
        return x + self.out(quantize(y.transpose(1, 2).reshape(batch, tokens, width), -1))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("tokens", [8, 7])
def test_attention(own: bool, tokens: int) -> None:
    """Sums over tokens that groups do not divide are of probabilities and values in float."""
    torch.manual_seed(0)
    net, x = Attention(own), torch.randn(2, tokens, 16)
    model = prepared(net, x, group_size=4)
    set_fake_quantize(model, "validation")

    def quantize(x: Tensor, axis: int) -> Tensor:
        return x if x.shape[axis] % 4 else in_groups(x, int8, axis, 4)

    want = net(x, quantize)
    # Of other strides, products are summed in another order.
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert float((want - net(x)).abs().max()) > 1e-3


def test_more_tokens_than_groups_divide() -> None:
    """Of the length of the example they were divided; the error in the forward has a name."""
    net = Attention(own=False)
    model = prepared(net, torch.randn(2, 8, 16), group_size=8)
    set_fake_quantize(model, "validation")
    with pytest.raises(RuntimeError, match=r'group_size .* in "qkv\.activation_quantizer"'):
        model(torch.randn(2, 9, 16))


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(16, 8)
        self.stub = torch_ext.QuantStub()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = torch.cat([x + y, x * y], -1)
        return self.stub(self.second(z).unsqueeze(1)).mean(1)


@pytest.mark.parametrize("with_example", [False, True])
def test_a_stub_takes_the_axis_of_its_reader(with_example: bool) -> None:
    net, x = nn.Sequential(torch_ext.QuantStub(), nn.Conv2d(32, 8, 3)), torch.randn(2, 32, 8, 32)
    model = prepared(net, x if with_example else None, group_size=32)
    set_fake_quantize(model, "validation")
    assert torch.equal(model(x), net(in_groups(x, int8, 1, 32)))
    assert len(named_quantizers(model)) == 1
    mapping = {"1": None}
    with pytest.raises(ValueError, match="expected model to have modules to quantize"):
        prepared(net, x if with_example else None, mapping)
    given = prepared(net, x if with_example else None, mapping, ch_axis=-3)
    set_fake_quantize(given, "validation")
    assert torch.equal(given(x), net(in_groups(x, int8, 1)))


def test_a_stub_of_readers_along_several_axes() -> None:
    """Each reads it along its own; what is no product reads it in float."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stub, self.conv = torch_ext.QuantStub(), nn.Conv2d(8, 4, 1)
            self.linear = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.stub(x)
            return self.conv(x), self.linear(x), x.exp()

    net, x = Both(), torch.randn(2, 8, 4, 16)
    model = prepared(net, x, group_size=8)
    set_fake_quantize(model, "validation")
    have = model(x)
    assert torch.equal(have[0], net.conv(in_groups(x, int8, 1, 8)))
    assert torch.equal(have[1], net.linear(in_groups(x, int8, -1, 8)))
    assert torch.equal(have[2], x.exp())


def test_sums_stay_float() -> None:
    """An engine with scales of each call has nothing to gain there, nor where none reads it."""
    net, x = Sums(), torch.randn(4, 8)
    model = prepared(net, x)
    set_fake_quantize(model, "validation")
    y = net.first(in_groups(x, int8))
    z = torch.cat([x + y, x * y], -1)
    assert torch.equal(model(x), net.second(in_groups(z, int8)))
    assert len(named_quantizers(model)) == 2
    modules = nn.ModuleDict({"add": torch_ext.Add(), "cat": torch_ext.Cat(), "m": nn.Linear(8, 8)})
    assert list(named_quantizers(prepared(modules))) == ["m.input_quantizers.input"]


def test_behind_dropout() -> None:
    """A dropout scales what it keeps: in training too, scales are of what the layer reads."""
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)), torch.randn(3, 8)
    model = prepared(net, x)
    set_fake_quantize(model, "qat")
    model.train()
    torch.manual_seed(3)
    have = model(x)
    torch.manual_seed(3)
    hidden = nn.functional.dropout(net[0](in_groups(x, int8)), 0.5)
    assert torch.equal(have, net[2](in_groups(hidden, int8)))


def test_axis_that_is_given() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 1)), torch.randn(2, 3, 4, 16)
    model = prepared(net, x, ch_axis=-1, group_size=8)
    set_fake_quantize(model, "validation")
    assert torch.equal(model(x), net(in_groups(x, int8, -1, 8)))


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bij,bkj->bik", x, y)


def test_products_over_axes_that_are_not_known() -> None:
    net, example = Product(), (torch.randn(2, 4, 8), torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="what einsum sums over is not known; give it ch_axis"):
        prepared(net, example)
    model = prepared(net, example, ch_axis=-1)
    set_fake_quantize(model, "validation")
    assert torch.equal(model(*example), net(*(in_groups(x, int8) for x in example)))


@pytest.mark.parametrize("with_example", [False, True])
def test_groups_that_do_not_divide(with_example: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 1))
    x = torch.randn(1, 3, 9, 9)
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match="no multiple of group_size 8") as caught:
        prepared(net, x if with_example else None, group_size=8)
    text = str(caught.value)
    assert "got 2 that do not" in text
    assert 'mapping=dict.fromkeys(["0", "3"])' in text
    assert "reads 3 values along axis -3" in text
    assert "reads 12 values along axis -3" in text
    assert dict(net.named_modules()) == before
    left_out = {"0": None, "3": None}
    assert len(named_quantizers(prepared(net, x, left_out, group_size=8))) == 1


def test_the_reader_is_named() -> None:
    """Not what made the value; with the weights in one error, and a mapping that works."""
    net = nn.Sequential()
    net.add_module("c", nn.Embedding(10, 16))
    net.add_module("l", nn.Linear(16, 16))
    net.add_module("conv", nn.Conv1d(3, 8, 1))
    x = torch.randint(10, (4, 3))
    net.qconfig = get_block_qconfig("mxfp8_e4m3")
    with pytest.raises(ValueError, match="expected groups to fit, got 5 that do not") as caught:
        prepare_qat(net, example_inputs=x)
    text = str(caught.value)
    assert 'mapping=dict.fromkeys(["c", "l", "conv"])' in text
    assert 'c.activation_quantizer: linear in "l" reads 16 values along axis -1' in text
    assert "l.weight: 16 on axis 1, group_size 32" in text
    net = net[:2]
    net.qconfig = get_default_qconfig(activation_qkwargs={"dynamic": True, "group_size": 32})
    with pytest.raises(ValueError, match=r'mapping=dict.fromkeys\(\["l"\]\)'):
        prepare_qat(net, example_inputs=x)
    assert len(named_quantizers(prepare_qat(net, example_inputs=x, mapping={"l": None}))) == 1


def test_the_mapping_keeps_the_layers_around_a_function() -> None:
    net, x = nn.Sequential(Attention(own=True), nn.Linear(16, 4)), torch.randn(2, 8, 16)
    keys = {"dynamic": True, "ch_axis": -1, "group_size": 16}
    net.qconfig = qconfig = get_default_qconfig(activation_qkwargs=keys)
    with pytest.raises(ValueError, match="expected groups to fit") as caught:
        prepare_qat(net, example_inputs=x)
    text = 'mapping={"0": None, "0.qkv": qconfig, "0.out": qconfig}'
    assert text in str(caught.value)
    mapping = {"0": None, "0.qkv": qconfig, "0.out": qconfig}
    # The result of qkv is read by float functions alone.
    assert len(named_quantizers(prepare_qat(net, example_inputs=x, mapping=mapping))) == 6


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_in_groups(kind: Any, functional: bool, with_example: bool) -> None:
    """A sum is of the channels of one group: 8 of 32."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(kind(32, 32, 3, groups=4).weight.detach())

        def forward(self, x: Tensor) -> Tensor:
            if kind is nn.Conv2d:
                return F.conv2d(x, self.weight, None, 1, 1, 1, 4)
            return F.conv_transpose2d(x, self.weight, groups=4)

    if functional and not with_example:
        pytest.skip("functions are found by an example")
    net = nn.Sequential(Functional() if functional else kind(32, 32, 3, groups=4))
    x = torch.randn(2, 32, 5, 5)
    example = x if with_example else None
    with pytest.raises(ValueError, match="32 values along axis -3, 8 in each sum, no multiple"):
        prepared(net, example, group_size=16)
    model = prepared(net, example, group_size=8)
    set_fake_quantize(model, "validation")
    assert torch.equal(model(x), net(in_groups(x, int8, 1, 8)))


@pytest.mark.parametrize("dtype", ["int8", "float4_e2m1"])
def test_compiled_in_one_graph_per_state(dtype: str) -> None:
    keys = {} if dtype == "int8" else {"scale_dtype": "float8_e4m3"}
    net, x = Attention(own=True), torch.randn(2, 16, 16)
    model = prepared(net, x, dtype=dtype, group_size=8, **keys)
    torch_ext.calibrate(model, [x])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for state in STATES:
        set_fake_quantize(model, state)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        want = model(x).detach()
        model.load_state_dict(before)
        have = compiled(x)
        assert torch.equal(have, want)
        have.sum().backward()


def test_a_transformer_of_timm() -> None:
    """A step of training, then VALIDATION: every quantizer gives the reference's values."""
    operators.declare()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    net.qconfig = get_default_qconfig(activation_qkwargs={"dynamic": True})
    model = prepare_qat(net, example_inputs=x)
    assert {row.scale for row in describe(model).quantizers if row.of != "weight"} == {"dynamic"}
    set_fake_quantize(model, "qat")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    set_fake_quantize(model, "validation")
    model.eval()
    seen: list[str] = []

    def check(quantizer: FakeQuantize, given: tuple[Any, ...], out: Tensor) -> None:
        axis = given[1] if len(given) > 1 else quantizer.axis  # type: ignore[attr-defined]
        assert torch.equal(out, in_groups(given[0], int8, axis))
        seen.append(quantizer.label)

    for quantizer in named_quantizers(model).values():
        if not quantizer.transient:
            quantizer.register_forward_hook(check)
    out = model(x)
    assert len(set(seen)) >= 2 * 6
    set_fake_quantize(model, "float")
    want = model(x)
    assert 0 < float((out - want).norm() / want.norm()) < 0.05
