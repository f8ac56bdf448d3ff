"""prepare_qat with example_inputs: which values are quantized, by what, under which names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_ext
from grid_checks import off_grid
from nets.tiny_net import WEIGHTS, images, tiny_net
from paths import ROOT
from prepare_steps import CONFIG, OTHER, names, ready, rule_of, run_calibration
from snapshots import same_bits
from torch_ext import get_default_qconfig, prepare_qat, set_fake_quantize
from torch_ext.prepare.insertion.operations import placement_table

CONV, LINEAR = "conv.parametrizations.weight.0", "fc.parametrizations.weight.0"
Forward = Callable[["Net", Tensor], Any]


pytestmark = pytest.mark.usefixtures("one_thread")


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x) * 0.1
        return x


class Net(nn.Module):
    """Computes what a function of it and of an image says."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.fc = nn.AvgPool2d(2), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))
        self.stub, self.noise = torch_ext.QuantStub(), Noise()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).permute(2, 0, 1)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


X = "input_quantizers.x"
RELU = "relu.activation_quantizer"
# What a forward computes, and the quantizers it gets, one row of the table after the other.
PLACED: dict[str, tuple[Forward, set[str]]] = {
    "conv_bn_relu_conv": (lambda m, x: m.conv(m.relu(m.bn(m.conv(x)))), {X, CONV, RELU}),
    "fan_out": (lambda m, x: m.conv(x) + x, {X, CONV, "conv.activation_quantizer"}),
    "linear": (lambda m, x: m.fc(m.conv(x).mean((2, 3))), {X, CONV, LINEAR, "mean_quantizer"}),
    "functional": (
        lambda m, x: F.linear(F.conv2d(x, m.conv.weight), m.fc.weight.t()[:, :6]),
        {X, CONV, "conv2d_quantizer", "getitem_quantizer"},
    ),
    "transposed": (
        lambda m, x: F.conv_transpose2d(x, m.conv.weight, m.conv.bias),
        {X, CONV},
    ),
    "matmul": (lambda m, x: x.relu() @ x.transpose(2, 3), {X, "relu_quantizer"}),
    "einsum": (lambda m, x: torch.einsum("nchw,ncij->nhwij", x, x.exp()), {X, "exp_quantizer"}),
    "product_by_number": (lambda m, x: (x * 2 + 1).sum(), set()),
    "product_by_parameter": (lambda m, x: (m.gain * x + m.gain).sum(), set()),
    "product": (lambda m, x: x * x.sigmoid(), {X, "sigmoid_quantizer"}),
    "number_first": (lambda m, x: (2 - x) * x, {X, "sub_quantizer"}),
    "in_place": (lambda m, x: x.exp().mul_(x.sin()), {"exp_quantizer", "sin_quantizer"}),
    "difference": (lambda m, x: (x - x.exp()) / x.cos(), set()),
    "cat": (lambda m, x: torch.cat([x.relu(), x.neg()], 1), {"cat_quantizer"}),
    "cat_with_parameter": (
        lambda m, x: m.fc(torch.cat((tokens(x), m.gain.view(1, 1, 4).expand(1, x.size(0), 4)))),
        {LINEAR, "cat_quantizer"},
    ),
    "two_cats": (
        lambda m, x: torch.cat([torch.cat([x, x.exp()]), x.neg()]),
        {"cat_quantizer"},
    ),
    "cat_then_conv": (lambda m, x: m.conv(torch.stack([x.exp(), x]).sum(0)), {
        "stack_quantizer", "sum_quantizer", CONV}),
    "max_pool": (lambda m, x: m.conv(F.max_pool2d(m.relu(x), 2)), {RELU, CONV}),
    "avg_pool": (lambda m, x: m.conv(m.pool(x)), {X, "pool.activation_quantizer", CONV}),
    "nearest": (lambda m, x: m.conv(F.interpolate(x.exp(), scale_factor=2)), {
        "exp_quantizer", CONV}),
    "bilinear": (
        lambda m, x: m.conv(F.interpolate(x, scale_factor=2, mode="bilinear")),
        {X, "interpolate_quantizer", CONV},
    ),
    "carried": (
        lambda m, x: m.fc(
            F.dropout(x.exp().flatten(2).chunk(2, 2)[0].transpose(1, 2), 0.5, m.training)
        ),
        {"exp_quantizer", LINEAR},
    ),
    "same_in_eval": (
        lambda m, x: m.fc(m.noise(x.exp()).transpose(1, 3)),
        {"exp_quantizer", LINEAR},
    ),
    "unpacked": (
        lambda m, x: torch.stack(list(x.exp().unbind(1))).sum() * x.shape[0],
        {"stack_quantizer"},
    ),
    "norm_and_softmax": (
        lambda m, x: F.layer_norm(x, x.shape[3:]).softmax(3) @ x,
        {X, "softmax_quantizer"},
    ),
    "attention": (
        lambda m, x: m.attention(*[tokens(x)] * 3, need_weights=False)[0],
        {
            X,
            "attention.parametrizations.in_proj_weight.0",
            "attention.out_proj.parametrizations.weight.0",
            "attention.linear_quantizer",
            "attention.scaled_dot_product_attention_quantizer",
        },
    ),
    "stub": (lambda m, x: m.stub(x.exp()).mean(), {"stub.activation_quantizer"}),
    "twice": (
        lambda m, x: m.conv(m.relu(m.conv(m.relu(x))) + x.exp() + x.sin().exp()),
        {CONV, RELU, f"{RELU}_1", "exp_quantizer", "exp_quantizer_1", "add_quantizer",
         "add_quantizer_1"},
    ),
    "nothing_read": (lambda m, x: m.conv(x).relu(), {X, CONV}),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACED)
def test_placement(case: str) -> None:
    function, want = PLACED[case]
    plain, x = Net(function).eval(), torch.randn(3, 4, 6, 6)
    if not want:
        with pytest.raises(ValueError, match="modules to quantize, found none"):
            ready(plain, example_inputs=x)
        return
    net = ready(plain, example_inputs=x)
    assert names(net) == want
    assert same_bits(net(x).detach(), plain(x).detach())
    run_calibration(net, x)
    found, _ = off_grid(net, x)
    assert not found
    for batch in (1, 5):
        assert same_bits(plain(x[:1].repeat(batch, 1, 1, 1)).detach(), _float(net, x, batch))


def _float(net: nn.Module, x: Tensor, batch: int) -> Tensor:
    set_fake_quantize(net, "float")
    out: Tensor = net(x[:1].repeat(batch, 1, 1, 1))
    return out.detach()


def test_the_guide_shows_the_table() -> None:
    page = ROOT / "docs" / "guides" / "placement.md"
    assert placement_table() in page.read_text()


def test_every_operation_of_the_table_exists_in_torch() -> None:
    homes = (torch, F, Tensor, torch._C._nn)
    for name in re.findall(r"`(\w+)`", placement_table()):
        assert name in ("identity", "getitem") or any(hasattr(home, name) for home in homes), name


def test_a_shared_scale_is_that_of_all_operands() -> None:
    net = ready(
        Net(lambda m, x: torch.cat([x.relu(), x.neg() * 3])).eval(), example_inputs=images_4()
    )
    x = images_4()
    run_calibration(net, x)
    quantizer = net.get_submodule("cat_quantizer")
    joined = torch.cat([x.relu(), x.neg() * 3])
    want = torch.stack([joined.min(), joined.max()])[None]
    assert torch.equal(quantizer.range, want)
    assert int(quantizer.observer.tally[0, 0]) == joined.numel()


def images_4(count: int = 3) -> Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(3))


def test_weights_that_the_forward_computes() -> None:
    plain = nn.Sequential(Standardised(4, 6, 3), nn.ReLU())
    net = ready(plain, example_inputs=images_4())
    assert names(net) == {"0.input_quantizers.x", "0.sub_quantizer"}
    observer = net.get_submodule("0.sub_quantizer").observer
    assert (observer.ch_axis, observer.channel_len, observer.transient) == (0, 6, False)
    run_calibration(net, images_4())
    assert off_grid(net, images_4()) == ([], {"conv2d": 1})


def in_place(m: Net, x: Tensor) -> Tensor:
    y = x.exp()
    y[:, 0].mul_(2)
    y[:, 1] = 0.5
    z = m.conv(y)
    y[:, 1] = 0.25
    w = m.conv(y)
    F.relu_(y.sub_(1))
    return m.conv(z + y) + m.conv(y) + w.exp()


def out_of_place(m: Net, x: Tensor) -> Tensor:
    y = x.exp() * torch.tensor([2.0, 0, 1, 1]).view(4, 1, 1)
    y = y + torch.tensor([0, 0.5, 0, 0]).view(4, 1, 1)
    v = y * torch.tensor([1, 0.5, 1, 1]).view(4, 1, 1)
    z = F.relu(v - 1)
    return m.conv(m.conv(y) + z) + m.conv(z) + m.conv(v).exp()


def test_what_is_written_in_place_is_read_as_written() -> None:
    plain, x = [Net(f).eval() for f in (in_place, out_of_place)], images_4()
    plain[0].load_state_dict(plain[1].state_dict())
    outputs = [net(x).detach() for net in plain]
    assert same_bits(*outputs)
    made = [ready(net, example_inputs=x) for net in plain]
    assert same_bits(made[0](x).detach(), outputs[0])
    for net in made:
        run_calibration(net, x)
    assert same_bits(made[0](x).detach(), made[1](x).detach())


class TestConfiguration:
    """As without example_inputs; a function has that of the module whose forward calls it."""

    def block(self) -> nn.Module:
        inner = Net(lambda m, x: m.conv(x.exp()) + x.sin())
        return nn.Sequential(Net(lambda m, x: m.conv(x).cos()), inner)

    def test_none_leaves_a_module_float(self) -> None:
        model = self.block()
        model[1].qconfig = None
        net = ready(model, example_inputs=images_4())
        assert names(net) == {"0.input_quantizers.x", f"0.{CONV}"}
        net = ready(self.block(), example_inputs=images_4(), mapping={"*.conv": None})
        assert names(net) == {"1.conv.activation_quantizer", "1.sin_quantizer"}

    def test_names_patterns_and_types(self) -> None:
        kinds = {r: get_default_qconfig(activation_observer=r) for r in ("kl", "mse", "percentile")}
        mapping = {"1": kinds["kl"], "1.*": kinds["mse"], nn.Conv2d: kinds["percentile"]}
        net = ready(self.block(), example_inputs=images_4(), mapping=mapping)
        assert rule_of(net, "1.sin_quantizer") == "kl"
        assert rule_of(net, "1.exp_quantizer") == "mse"  # the convolution that reads it
        assert rule_of(net, "0.input_quantizers.x") == "percentile"
        assert rule_of(net, "1.conv.activation_quantizer") == "kl"  # the sum that reads it

    def test_one_side_only(self) -> None:
        for side, want in (("activation", {CONV}), ("weight", {X})):
            config = get_default_qconfig(**{f"{side}_fake_quant": None})
            net = ready(Net(lambda m, x: m.conv(x)), config, example_inputs=images_4())
            assert names(net) == want

    def test_inputs(self) -> None:
        model = Net(lambda m, x: m.conv(x))
        assert names(ready(model, input_qconfig=None, example_inputs=images_4())) == {CONV}
        net = ready(model, input_qconfig=OTHER, example_inputs=images_4())
        assert rule_of(net, X) == "percentile"

    def test_outputs_that_the_mapping_names(self) -> None:
        model = Net(lambda m, x: m.bn(m.conv(x)))
        net = ready(model, mapping={"bn": OTHER}, example_inputs=images_4())
        assert names(net) == {X, CONV, "bn.activation_quantizer"}

    def test_the_first_reader_decides(self) -> None:
        model = Net(lambda m, x: m.conv(x) + x)
        assert rule_of(ready(model, mapping={"conv": OTHER}, example_inputs=images_4()), X) == (
            "percentile"
        )


def test_names_do_not_depend_on_the_example_or_the_configuration() -> None:
    for function, want in (PLACED["twice"], PLACED["attention"], PLACED["two_cats"]):
        for count, config in ((1, CONFIG), (7, OTHER)):
            net = ready(Net(function), config, example_inputs={"x": images_4(count)})
            assert names(net) == want
            assert list(net.state_dict()) == list(
                ready(Net(function), config, example_inputs=(images_4(),)).state_dict()
            )


def test_captured_and_hooked_models_exchange_parameters() -> None:
    source, target = ready(tiny_net().eval()), ready(tiny_net().eval(), example_inputs=images())
    run_calibration(source, images())
    report = torch_ext.load_observer_params(source, target, strict=False)
    shared = names(source) & names(target)
    assert shared == set(WEIGHTS)  # the ways name quantizers of values differently
    assert set(report.loaded) == shared


class Modes(nn.Module):
    """Everything that tells train() from eval(), and optional and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.bn = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.noise = nn.Dropout(0.3), Noise()

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        x = self.bn(self.conv(self.dropout(x)))
        if mask is not None:
            x = x * mask
        x = self.noise(F.dropout(x * scale, 0.4, self.training))
        return self.conv2(x) + torch.arange(x.shape[3] - 2) + torch.rand(1)


@pytest.mark.parametrize("masked", [True, False])
def test_train_and_eval_at_run_time(masked: bool) -> None:
    given = {"x": images_4(), "scale": 0.5} | ({"mask": torch.rand(3, 4, 4, 4)} if masked else {})
    plain = Modes()
    net = ready(plain, example_inputs=given)
    assert ("mul_quantizer" in names(net)) is not masked or masked
    for mode in ("train", "eval", "mixed", "eval", "train"):
        for one in (plain, net):
            one.train(mode != "eval")
            one.noise.train(mode == "train")
        outs = []
        for one in (plain, net):
            torch.manual_seed(4)
            outs.append(one(given["x"], 0.5, mask=given.get("mask")).detach())
        assert same_bits(*outs), mode
        assert same_bits(plain.bn.running_var, net.bn.running_var)
    changed = prepare_qat(plain, True, example_inputs=given)
    assert changed is plain


@torch.fx.wrap
def marked(m: Net, x: Tensor) -> Tensor:
    return m.conv(x) + x


@torch.fx.wrap
def marked_with_reason(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def test_functions_marked_for_fx() -> None:
    net = ready(Net(lambda m, x: marked(m, x)), example_inputs=images_4())
    assert names(net) == PLACED["fan_out"][1]
    plain = Net(lambda m, x: m.conv(marked_with_reason(x)))
    net = ready(plain, example_inputs=images_4())
    assert names(net) == {CONV, X}
    assert same_bits(net(images_4()).detach(), plain(images_4()).detach())


def test_gradients_of_parameters_that_meet_no_input() -> None:
    plain = Net(lambda m, x: m.conv(x) * (m.gain.exp() + m.bn.running_var[:, None, None].sqrt()))
    net = ready(plain, example_inputs=images_4())
    for one in (plain, net):
        one.bn.running_var.fill_(3)
        one(images_4()).sum().backward()
    assert plain.gain.grad is not None
    assert torch.equal(plain.gain.grad, net.gain.grad)
    assert same_bits(plain(images_4()).detach(), net(images_4()).detach())


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(5)
    plain = Net(lambda m, x: m.fc((m.bn(m.conv(x)) + x).mean((2, 3))))
    net = ready(plain, example_inputs=images_4())
    x, y = torch.randn(32, 4, 6, 6), torch.randint(4, (32,))
    set_fake_quantize(net, "qat")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    set_fake_quantize(net.eval(), "validation")
    assert off_grid(net, x)[0] == []
