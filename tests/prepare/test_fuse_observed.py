"""fuse with an example: layers and norms of any class are found in the run, by their tensors."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batch_norms import Frozen, kinds, shake
from nets.architectures import architecture
from torch_ext import fuse

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """[N, 3, 9, 9] to whatever; the subclasses say how."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


def x64() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3)).double()


# Norms that are folded


class SameConv(nn.Conv2d):
    """Its padding inside, as TensorFlow's; its size is computed from the input's."""

    def forward(self, x: Tensor) -> Tensor:
        height = int(x.shape[-1]) % 2
        return F.conv2d(F.pad(x, [1, height, 1, height]), self.weight, self.bias, self.stride)


class Kernel(nn.Module):
    """A convolution that is no nn.Conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.offset = (
            nn.Parameter(torch.randn(4, 3, 3, 3)),
            nn.Parameter(torch.ones(4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(input=x, weight=self.kernel, bias=self.offset)


class NormRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d, with an activation that has a parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return self.act(self.drop(x))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class NormSwish(nn.SyncBatchNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = Swish()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


class OwnConv(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SameConv(3, 4, 3, stride=2, bias=False)


class OwnModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Kernel()  # type: ignore[assignment]


class WithNormRelu(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = NormRelu(4)


class WithNormAct(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = NormAct(4)


class WithNormSwish(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = NormSwish(4)  # type: ignore[assignment]


class InPlaceAfter(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x)).add_(1)


class Functional(Net):
    """Calls the function with the layer's parameters."""

    def forward(self, x: Tensor) -> Any:
        return self.bn(F.conv2d(x, self.conv.weight, self.conv.bias, padding=2))


class Chomped(Net):
    """A slice between the two, as in causal convolutions."""

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)[:, :, :-1])


class Tokens(nn.Module):
    """Linear layers on [N, T, C], and norms over C that want it elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(9, 4), nn.BatchNorm1d(4)
        self.fc2, self.bn2 = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.fc1(x.flatten(1, 2)).transpose(1, 2)).transpose(1, 2).relu()
        y = self.fc2(x)
        return self.bn2(y.flatten(0, 1)).reshape_as(y)


class TrainBranch(Net):
    """Has a head that only training uses; what reads the convolution there does not count."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return (self.bn(y), y) if self.training else self.bn(y)


class NotTraceable(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.abs().max() > 0 else x + 1)


FOLDED = [
    Net, OwnConv, OwnModule, WithNormRelu, WithNormAct, WithNormSwish, InPlaceAfter, Functional,
    Chomped, Tokens, TrainBranch, NotTraceable,
]  # fmt: skip


@pytest.mark.parametrize("kind", FOLDED)
def test_folded_whatever_the_classes(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = shake(kind()).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fuse: ")
        fused = fuse(model, example_inputs=x64())
    assert not kinds(fused, _BatchNorm)
    for count in (1, 5):  # other values than the example's
        x = torch.randn(count, 3, 9, 9, dtype=torch.float64)
        want, have = model(x).detach(), fused(x).detach()
        assert torch.allclose(have, want, rtol=1e-11, atol=1e-11)
    twin = pickle.loads(pickle.dumps(fused))
    assert torch.equal(twin(x64()), fused(x64()))


def test_what_a_norms_module_applies_stays() -> None:
    model = shake(WithNormAct())
    fused = fuse(model, example_inputs=x64().float()).train()
    assert [name for name, _ in fused.bn.named_children()] == ["drop", "act"]
    assert torch.equal(fused.get_parameter("bn.act.weight"), model.get_parameter("bn.act.weight"))
    # The dropout is active again while training.
    assert not torch.equal(fused(x64().float()), fused(x64().float()))
    relu = fuse(shake(WithNormRelu()), example_inputs=x64().float()).bn
    assert torch.equal(relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_checked_in_float32(dtype: torch.dtype) -> None:
    model = shake(Net()).to(dtype)
    x = x64().to(dtype)
    fused = fuse(model, example_inputs=x)
    assert not kinds(fused, _BatchNorm)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    want = model.double()(x.double()).detach()
    assert torch.allclose(fused.double()(x.double()), want, atol=0.05 * float(want.abs().max()))


# Norms that stay


class ReadTwice(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y


class ReadAsView(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y), y.flatten(1)[:, 0]


class Returned(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return {"features": y, "out": self.bn(y)}


class Kept(Net):
    def forward(self, x: Tensor) -> Any:
        self.last = self.conv(x)
        return self.bn(self.last)


class LookedAt(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x[:1, :, :3, :3])
        if y[0, 0, 0, 0].item() > 1e6:
            return y
        return self.bn(y)


class Written(Net):
    """The norm's input goes into another tensor too."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        cache = torch.zeros(2, *y.shape, dtype=y.dtype)
        cache[0] = y
        return self.bn(y) + cache[0]


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)), self.conv(-x)


class NormCalledTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn(x[:, [0, 0, 1, 2], 1:-1, 1:-1])


class Activated(Net):
    """In place: the tensor that the norm reads is the one that the convolution made."""

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x).relu_())


class Before(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.conv(self.bn(x).relu())


class Buffers(Net):
    """Not a call of the norm's module."""

    def forward(self, x: Tensor) -> Any:
        norm = self.bn
        return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight)


class Scaled(Net):
    """Its weight is computed by the forward."""

    def forward(self, x: Tensor) -> Any:
        return self.bn(F.conv2d(x, self.conv.weight * 0.5))


class WeightReadTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)), self.conv.weight.square().sum()


class NormReadTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn.bias.sum()


class OtherAxis(nn.Module):
    """As many tokens as channels: the norm is over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(9, 27), nn.BatchNorm1d(27)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.fc(x.flatten(1, 2)))


class NoPlaceForABias(OwnModule):
    def __init__(self) -> None:
        super().__init__()
        del self.conv.offset
        self.conv.offset = None  # type: ignore[assignment]


class NoBiasRead(Net):
    """There is a place for a bias, and the forward does not look at it."""

    def forward(self, x: Tensor) -> Any:
        return self.bn(F.conv2d(x, self.conv.weight))


class TwoNorms(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + self.other(y)


class Uncalled(Net):
    """Only training calls it."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) if self.training else y


class NormDrop(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class WithNormDrop(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = NormDrop(4)


class NormSum(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y.sigmoid()


class WithNormSum(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = NormSum(4)


READ = "something else reads the output of conv"
LEFT: list[tuple[type[nn.Module], str]] = [
    (ReadTwice, READ),
    (ReadAsView, READ),
    (Returned, READ),
    (Kept, READ),
    (LookedAt, READ),
    (Written, READ),
    (CalledTwice, "conv is called 2 times"),
    (NormCalledTwice, "it is called 2 times"),
    (Activated, "it reads the result of relu in the model, not the output of a layer"),
    (Before, "it reads the argument x, not the output of a layer"),
    (Buffers, "F.batch_norm reads its buffers without a call of the module"),
    (Scaled, "computes its weight"),
    (WeightReadTwice, "something else reads conv.weight"),
    (NormReadTwice, "something else reads bn.bias"),
    (OtherAxis, "it normalizes over another axis than the channels of fc"),
    (NoPlaceForABias, "conv has no bias, nor a place for one"),
    (NoBiasRead, "folded into conv, the model gives other outputs"),
    (TwoNorms, READ),
    (Uncalled, "the example does not call it in eval mode"),
    (WithNormDrop, "its forward calls a dropout function"),
    (WithNormSum, "no chain of modules and functions"),
]


@pytest.mark.parametrize(("kind", "why"), LEFT, ids=[kind.__name__ for kind, _ in LEFT])
def test_left_and_named(kind: type[nn.Module], why: str) -> None:
    torch.manual_seed(0)
    model = shake(kind()).double()
    with pytest.warns(UserWarning, match="fuse: batch norms left as they are: ") as caught:
        fused = fuse(model, example_inputs=x64())
    assert [warning.filename for warning in caught] == [__file__]
    assert f"bn ({why}" in str(caught[0].message) or f"{why})" in str(caught[0].message)
    assert fused.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor)


class OwnBuffers(nn.Module):
    """Calls the function with buffers of its own, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.running_mean, self.running_var).relu()


def test_modules_that_compute_a_batch_norm_without_being_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen()).double().eval()
    fused = fuse(model, example_inputs=x64())
    assert isinstance(fused[1], nn.Identity)
    assert torch.allclose(fused(x64()), model(x64()), rtol=1e-11, atol=1e-11)

    with pytest.warns(
        UserWarning, match=r"1 \(it has the buffers of a batch norm, and is a Frozen"
    ):
        fuse(model)

    other = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(1.5)).double().eval()
    text = r"1 \(it has the buffers of a batch norm, and its forward \(Frozen\) computes something"
    with pytest.warns(UserWarning, match=text):
        assert isinstance(fuse(other, example_inputs=x64())[1], Frozen)

    inside = nn.Sequential(OwnBuffers()).double().eval()
    with pytest.warns(
        UserWarning, match=r"0 \(it has the buffers of a batch norm, and its forward"
    ):
        fuse(inside, example_inputs=x64())


def test_a_pair_holds_for_all_examples() -> None:
    class Ways(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv2, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, way: int) -> Any:
            if way == 0:
                return self.bn(self.conv(x))
            y = self.bn2(self.conv2(x))
            return y if way == 1 else y + self.conv(x)

    model = shake(Ways()).double()
    with pytest.warns(UserWarning, match=r"bn2 \(the example does not call it"):
        assert kinds(fuse(model, example_inputs=(x64(), 0)), _BatchNorm) == ["bn2"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fuse: ")
        fused = fuse(model, example_inputs=[(x64(), 0), (x64(), 1)])
    assert not kinds(fused, _BatchNorm)
    with pytest.warns(UserWarning, match=r"bn \("):
        fused = fuse(model, example_inputs=[(x64(), 0), (x64(), 2)])
    assert kinds(fused, _BatchNorm) == ["bn"]
    for way in range(3):
        assert torch.allclose(fused(x64(), way), model(x64(), way), rtol=1e-11, atol=1e-11)


def test_given_pairs_with_an_example() -> None:
    model = shake(WithNormAct()).double()
    with pytest.raises(ValueError, match="bn is a NormAct, which has a forward of its own; pass"):
        fuse(model, pairs=[("conv", "bn")])
    fused = fuse(model, pairs=[("conv", "bn")], example_inputs=x64())
    assert torch.allclose(fused(x64()), model(x64()), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="cannot fold bn into conv: something else reads the out"):
        fuse(shake(ReadTwice()).double(), pairs=[("conv", "bn")], example_inputs=x64())


# Number of batch norms, and how many stay: those that read no layer, counted by hand.
ARCHITECTURES = {
    "resnet18": (20, 0),
    "mobilenet_v3_small": (34, 0),
    "efficientnet_b0": (49, 0),
    "densenet121": (121, 58 + 3 + 1),  # the first of each dense layer, of transitions, the last
    "efficientnet_lite0": (49, 0),
    "tf_efficientnet_lite0": (49, 0),
    "resnetv2_18": (2 * 8 + 1, 8 + 1),  # the first of each block, the last
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_architectures(name: str) -> None:
    model, x = architecture(name)
    shake(model)
    count, stay = ARCHITECTURES[name]
    assert len(kinds(model, _BatchNorm)) == count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = fuse(model, example_inputs=x)
    left = kinds(fused, _BatchNorm)
    assert len(left) == stay
    text = "".join(str(w.message) for w in caught if str(w.message).startswith("fuse: "))
    assert all(f" {name} (" in text for name in left)
    have, want = fused(x).detach(), model(x).detach()
    assert torch.allclose(have, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert not torch.equal(have, want)
