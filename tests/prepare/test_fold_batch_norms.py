"""Training convolution and batch norm apart, quantized as folded."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import torch_ext
from batch_norms import Frozen, shake
from nets.architectures import architecture
from nets.tiny_net import images, tiny_net
from prepare_steps import CONFIG, names, ready, run_calibration
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)

WEIGHT = "parametrizations.weight.1"
PER_TENSOR = get_default_qconfig(weight_qkwargs={"qscheme": "per_tensor_symmetric"})


pytestmark = pytest.mark.usefixtures("one_thread")


class Layers(nn.Module):
    """Each kind of layer with a batch norm behind it, with gains of both signs and of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.up, self.bn2 = nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6, affine=False)
        self.fc, self.bn3 = nn.Linear(6, 5), nn.BatchNorm1d(5)
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.1, 4)
        with torch.no_grad():
            self.bn1.weight.copy_(torch.tensor([0.3, -2, 0, 1.5]))
            nn.init.normal_(self.bn3.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.up(self.bn1(self.conv(x)).relu())).relu()
        out: Tensor = self.bn3(self.fc(x.mean((2, 3))))
        return out


def layers(dtype: torch.dtype = torch.float64) -> Layers:
    torch.manual_seed(0)
    return Layers().to(dtype).eval()


@pytest.mark.parametrize("config", [CONFIG, PER_TENSOR], ids=["per_channel", "per_tensor"])
def test_validation_is_the_folded_model_quantized(config: torch_ext.QConfig) -> None:
    plain, x = layers(), images().double()
    apart = ready(plain, config, example_inputs=x, fold_batch_norms=True)
    folded = ready(torch_ext.fuse(plain), config, example_inputs=x)
    for net in (apart, folded):
        run_calibration(net, x)
    assert {n.replace(".weight.1", ".weight.0") for n in names(apart)} == names(folded)
    quantizers = named_quantizers(folded)
    for name, quantizer in named_quantizers(apart).items():
        other = quantizers[name.replace(".weight.1", ".weight.0")]
        wanted = other.scale.clone()
        if name == f"conv.{WEIGHT}" and len(wanted) > 1:
            wanted[2] = quantizer.scale[2]  # folded, this channel is all zero
        assert torch.allclose(quantizer.scale, wanted, rtol=1e-6), name
    have, want = apart(x).detach(), folded(x).detach()
    assert torch.allclose(have, want, rtol=0, atol=1e-6 * float(want.abs().max()))
    set_fake_quantize(folded, "float")
    assert not torch.allclose(have, folded(x).detach(), rtol=0, atol=1e-3)


def test_float_and_calibration_do_not_touch_the_weights() -> None:
    plain, x = layers(torch.float32), images()
    net = ready(plain, example_inputs=x, fold_batch_norms=True)
    for state in ("float", "calibration"):
        set_fake_quantize(net, state)
        for training in (False, True):
            twins = [copy.deepcopy(one).train(training) for one in (plain, net)]
            assert same_bits(*[twin(x).detach() for twin in twins])
    assert torch_ext.float_state_dict(net).keys() == plain.state_dict().keys()
    torch_ext.load_float_state_dict(net, plain.state_dict())


def test_training_moves_the_batch_norm_and_the_scale() -> None:
    x = images()
    net = ready(layers(torch.float32), example_inputs=x, fold_batch_norms=True).train()
    set_fake_quantize(net, "qat")
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
    net(x)
    after = net.state_dict()
    for key in ("bn1.running_var", "bn1.weight", "conv.parametrizations.weight.original"):
        assert not torch.equal(before[key], after[key]), key
    source = net.get_submodule("conv").parametrizations.weight
    assert isinstance(source[1], FakeQuantize)


class NormRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class SameConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias)


class Classes(nn.Module):
    """Layers and norms of classes of their own, and a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = SameConv(1, 4, 3, bias=False), NormRelu(4)
        self.up, self.bn2 = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.fc, self.bn3 = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)
        self.last, self.bn4 = nn.Conv2d(1, 4, 3), Frozen()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn4(self.last(x)).mean((2, 3))
        x = self.bn2(self.up(self.bn1(self.conv(x)))).sigmoid()
        return torch.cat([self.bn3(self.fc(x.mean((2, 3)))).relu(), y], 1)


def unnumbered(name: str) -> str:
    """A quantizer's name without its place among the steps that compute a weight."""
    return re.sub(r"(\.parametrizations\.\w+)\.\d+$", r"\1", name)


@pytest.mark.parametrize("config", [CONFIG, PER_TENSOR], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("kind", [Layers, Classes])
def test_after_training_validation_is_the_fused_model_quantized(
    kind: type[nn.Module], config: torch_ext.QConfig
) -> None:
    torch.manual_seed(0)
    plain, x = kind().double(), images(16).double()
    net = ready(plain, config, example_inputs=x, fold_batch_norms=True)
    run_calibration(net.eval(), x)
    set_fake_quantize(net.train(), "qat")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    set_fake_quantize(net.eval(), "validation")

    state = torch_ext.float_state_dict(net)
    assert not torch.equal(state["bn1.running_var"], plain.state_dict()["bn1.running_var"])
    plain.load_state_dict(state)
    fused = ready(torch_ext.fuse(plain.eval(), example_inputs=x), config, example_inputs=x)
    assert not any(isinstance(module, (_BatchNorm, Frozen)) for module in fused.modules())
    quantizers = {unnumbered(name): q for name, q in named_quantizers(fused).items()}
    assert {unnumbered(name) for name in names(net)} == quantizers.keys()
    run_calibration(fused, x)
    for name, quantizer in named_quantizers(net).items():  # the same ranges
        quantizers[unnumbered(name)].load_state_dict(quantizer.state_dict())
    for batch in (x, images(8, seed=9).double()):
        have, want = net(batch).detach(), fused(batch).detach()
        assert torch.allclose(have, want, rtol=0, atol=1e-6 * float(want.abs().max()))
    set_fake_quantize(fused, "float")
    assert not torch.allclose(have, fused(batch).detach(), rtol=0, atol=1e-3 * float(want.max()))


def test_an_architecture_of_own_classes() -> None:
    """In float64, where rounding flips no value from one step of a grid to the next."""
    plain, x = architecture("tf_efficientnet_lite0", count=1)
    plain, x = shake(plain).double(), x.double()
    net = ready(plain, example_inputs=x, fold_batch_norms=True)
    fused = ready(torch_ext.fuse(plain, example_inputs=x), example_inputs=x)
    assert sum(name.endswith(WEIGHT) for name in names(net)) == 49
    for model in (net, fused):
        run_calibration(model, x)
    have, want = net(x).detach(), fused(x).detach()
    assert torch.allclose(have, want, rtol=0, atol=1e-6 * float(want.abs().max()))
    assert not torch.allclose(have, plain(x).detach(), rtol=0, atol=1e-3 * float(want.abs().max()))


class Replaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def other_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4).eval()
    nn.init.uniform_(norm.running_var, 20, 40)
    return norm


@pytest.mark.parametrize("way", ["set", "sync", "sync of a part"])
def test_a_norm_that_is_replaced_after_prepare_counts(way: str) -> None:
    torch.manual_seed(0)
    plain, x = Replaced().eval(), images()
    plain.layers[1].running_var.uniform_(0.1, 9)
    net = ready(plain, example_inputs=x, fold_batch_norms=True)
    norm: nn.Module = plain.layers[1]
    if way == "set":
        net.layers[1] = norm = other_norm()
    elif way == "sync":
        assert nn.SyncBatchNorm.convert_sync_batchnorm(net) is net
    else:
        net.layers = nn.SyncBatchNorm.convert_sync_batchnorm(net.layers)
    assert isinstance(net.layers[1], nn.SyncBatchNorm) == way.startswith("sync")
    fresh = copy.deepcopy(plain)
    fresh.layers[1] = copy.deepcopy(norm)
    fresh = ready(fresh, example_inputs=x, fold_batch_norms=True)
    for model in (net, fresh):
        run_calibration(model, x)
    for model in (net, copy.deepcopy(net)):
        assert same_bits(model(x).detach(), fresh(x).detach())
    # What the new norm learns counts.
    before = net(x).detach()
    for model in (net, fresh):
        model.layers[1].running_var.mul_(7)
    assert same_bits(net(x).detach(), fresh(x).detach())
    assert not same_bits(net(x).detach(), before)


def test_a_norm_that_is_gone_raises_by_name() -> None:
    net = ready(Replaced().eval(), example_inputs=images(), fold_batch_norms=True)
    run_calibration(net, images())
    net.layers[1] = nn.Identity()
    text = 'expected "layers.1" to be a batch norm .* as "layers.0" is .* got a module Identity'
    with pytest.raises(RuntimeError, match=text):
        net(images())
    set_fake_quantize(net, "float")
    net(images())


def test_a_copy_of_a_layer_alone_does_not_copy_the_norm() -> None:
    net = ready(Replaced().eval(), example_inputs=images(), fold_batch_norms=True)
    run_calibration(net, images())
    alone = copy.deepcopy(net.layers[0])
    with pytest.raises(RuntimeError, match=r'"layers\.1" .* got None'):
        _ = alone.weight
    assert alone.state_dict().keys() == net.layers[0].state_dict().keys()


def test_compile_export_copies() -> None:
    x = images()
    net = ready(layers(torch.float32), example_inputs=x, fold_batch_norms=True)
    run_calibration(net, x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.bn1.weight.mul_(3)
        assert not same_bits(twin(x), net(x))
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        for state in ("float", "qat", "validation"):
            set_fake_quantize(net, state)
            twin = copy.deepcopy(net)
            assert same_bits(compiled(x), twin(x))
        program = torch.export.export(net, (x,))
        assert same_bits(program.module()(x), net(x))


def test_what_is_not_folded_and_what_is_refused() -> None:
    with pytest.raises(ValueError, match="expected example_inputs with fold_batch_norms=True"):
        ready(tiny_net(), fold_batch_norms=True)

    class Two(Layers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.bn1(y) + y
            return out

    plain = Two()
    plain.qconfig = CONFIG  # type: ignore[assignment]
    with pytest.warns(
        UserWarning, match=r"prepare_qat: batch norms left as they are: bn1 \("
    ) as caught:
        net = prepare_qat(plain, example_inputs=images(), fold_batch_norms=True)
    assert caught[0].filename == __file__
    assert "bn2, bn3 (the example does not call it in eval mode)" in str(caught[0].message)
    assert "conv.parametrizations.weight.0" in names(net)
