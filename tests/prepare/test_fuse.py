"""fuse: which batch norms are folded, that nothing else changes, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import TinyNet, images, tiny_net
from snapshots import same, snapshot
from torch_ext import fuse

pytestmark = pytest.mark.usefixtures("one_thread")


def shake(model: nn.Module) -> nn.Module:
    """Batch norms whose folding changes something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


class Branching(TinyNet):
    """Cannot be traced: its forward looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > -1e9 else -x)


WAYS: dict[str, Any] = {
    "trace": {},
    "pairs": {"pairs": [("conv1", "bn1"), ["conv2", "bn2"]]},
    "hooks": {"example_inputs": images(3, seed=6)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_a_folded_model_computes_the_same(way: str, training: bool) -> None:
    plain = tiny_net() if way == "trace" else Branching()
    plain.load_state_dict(tiny_net().state_dict())
    plain.train(training)
    before = snapshot(plain)
    fused = fuse(plain, **WAYS[way])
    assert same(snapshot(plain), before)
    assert isinstance(fused.bn1, nn.Identity)
    assert isinstance(fused.bn2, nn.Identity)
    assert not kinds(fused, nn.BatchNorm2d)
    assert [m.training for m in fused.modules()] == [m.training for m in plain.modules()]
    want, have = plain.eval()(images()), fused.eval()(images())
    assert torch.allclose(have, want, rtol=0, atol=1e-5 * float(want.detach().abs().max()))
    assert not torch.equal(fused.conv1.weight, plain.conv1.weight)


PAIRS: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
    (nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
    (nn.ConvTranspose2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), (2, 3, 5, 5)),
    (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
    (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), (5, 3)),
]


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    PAIRS,
    ids=[f"{type(p[0]).__name__}-{i}" for i, p in enumerate(PAIRS)],
)
def test_every_layer_in_float64(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    plain = shake(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))).double()
    fused = fuse(plain)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert isinstance(fused, nn.Sequential)
    assert isinstance(fused[1], nn.Identity)
    bias = fused[0].bias
    assert isinstance(bias, nn.Parameter)
    assert bias.requires_grad  # also where the layer had none


def test_inplace_and_what_hangs_on_the_norm() -> None:
    net = tiny_net()
    seen: list[str] = []
    net.bn1.register_forward_hook(lambda *_: seen.append("hook"))
    net.bn1.qconfig = None  # type: ignore[assignment]
    assert fuse(net, inplace=True) is net
    net.eval()(images())
    assert seen == ["hook"]
    assert net.bn1.qconfig is None


class Two(nn.Module):
    """Something else reads the convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn(y) + y
        return out


class Twice(Two):
    """The convolution runs twice, with and without its norm."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)).mean() + self.conv(x * 2)
        return out


class Hidden(Two):
    """As Two, and cannot be traced; hooks see nothing wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool(x.sum() > -1e9) else -x)


GROUPED = nn.ConvTranspose2d(2, 2, 3, groups=2)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Two(), "something else reads the output of conv"),
        (Twice(), "called more than once"),
        (Hidden(), "folded into conv, the model gives other outputs"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)),
            "no running statistics",
        ),
        (
            nn.Sequential(nn.ConvTranspose2d(1, 2, 3), GROUPED, nn.BatchNorm2d(2)),
            "is transposed and has 2 groups",
        ),
    ],
)  # fmt: skip
def test_norms_that_cannot_be_folded_stay_and_are_named(model: nn.Module, why: str) -> None:
    model = shake(model)
    x = images()
    sample = {"example_inputs": x} if isinstance(model, Hidden) else {}
    with pytest.warns(UserWarning, match="batch norms left as they are") as caught:
        fused = fuse(model, **sample)
    assert any(why in str(warning.message) for warning in caught)
    assert kinds(fused, nn.BatchNorm2d)
    assert torch.equal(fused(x), model(x))


def test_one_wrong_pair_does_not_spoil_the_others() -> None:
    class Mixed(Hidden):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.last_bn = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last_bn(self.last(super().forward(x)))
            return out

    model = shake(Mixed())
    with pytest.warns(UserWarning, match="bn .folded into conv"):
        fused = fuse(model, example_inputs=(images(),))
    assert kinds(fused, nn.BatchNorm2d) == ["bn"]
    assert torch.allclose(fused(images()), model(images()), atol=1e-4)


def test_norms_that_follow_no_layer_stay_in_silence() -> None:
    model = shake(
        nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fuse: ")
        fused = fuse(model)
    assert kinds(fused, nn.BatchNorm2d) == ["0", "3"]


def test_samples_leave_modes_and_random_state_alone() -> None:
    net = Branching().train()
    net.dropout.eval()
    state = torch.get_rng_state()
    before = snapshot(net)
    fuse(net, example_inputs={"x": images()})
    assert torch.equal(torch.get_rng_state(), state)
    assert same(snapshot(net), before)


def shared() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    return net


def normed() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.utils.parametrizations.weight_norm(net[0])
    return net


@pytest.mark.parametrize(
    ("model", "pairs", "kind", "text"),
    [
        (tiny_net(), [("conv3", "bn1")], ValueError, 'no module is named "conv3"'),
        (tiny_net(), ["conv1"], TypeError, "pairs of two names, got 'conv1'"),
        (tiny_net(), [("conv1", "bn1", "x")], TypeError, "pairs of two names, got ('conv1'"),
        (tiny_net(), [("relu1", "bn1")], ValueError, "bn1 into relu1: relu1 is a ReLU"),
        (tiny_net(), [("conv1", "fc")], ValueError, "fc into conv1: fc is a Linear"),
        (tiny_net(), [("fc", "bn1")], ValueError, "fc has 3 outputs and bn1 4 features"),
        (
            tiny_net(),
            [("conv1", "bn1"), ("conv2", "bn1")],
            ValueError,
            "bn1 is in two pairs",
        ),
        (shared(), [("0", "1")], ValueError, "2 shares parameters with 0"),
        (normed(), [("0", "1")], ValueError, "a parametrization writes the weight of 0"),
    ],
)
def test_given_pairs_that_cannot_be_folded_are_refused(
    model: nn.Module, pairs: Any, kind: type[Exception], text: str
) -> None:
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        fuse(model, pairs=pairs, inplace=True)
    assert text in str(caught.value)
    assert same(snapshot(model), before)


def test_untraceable_models_need_help() -> None:
    with pytest.raises(ValueError, match="the model cannot be traced") as caught:
        fuse(Branching())
    assert "pairs=" in str(caught.value)
    assert "example_inputs" in str(caught.value)


def test_prepared_models_come_too_late() -> None:
    net = tiny_net()
    net.qconfig = torch_ext.get_default_qconfig()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="fuse before prepare_qat"):
        fuse(torch_ext.prepare_qat(net))


def test_nothing_to_fold() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    fused = fuse(model)
    assert fused is not model
    assert torch.equal(fused.get_parameter("0.weight"), model[0].weight)
