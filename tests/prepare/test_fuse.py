"""fuse: which batch norms are folded, that nothing else changes, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from batch_norms import kinds, shake
from nets.tiny_net import TinyNet, images, tiny_net
from snapshots import same, snapshot
from torch_ext import fuse

pytestmark = pytest.mark.usefixtures("one_thread")


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
    (nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4), (2, 6, 5, 5)),
    (nn.ConvTranspose3d(4, 4, 2, groups=4), nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
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
    x = torch.randn(shape, dtype=torch.float64)
    fused, observed = fuse(plain), fuse(plain, example_inputs=x)
    assert torch.allclose(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(fused(x), observed(x))
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
    """As Two, but cannot be traced, and what else reads the convolution is out of sight."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x if bool(x.sum() > -1e9) else -x)
        with torch._C.DisableTorchFunction():
            other = y * 2
        out: Tensor = self.bn(y) + other
        return out


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
    ],
)  # fmt: skip
def test_norms_that_cannot_be_folded_stay_and_are_named(model: nn.Module, why: str) -> None:
    model = shake(model)
    x = images()
    sample = {"example_inputs": x} if isinstance(model, Hidden) else {}
    with pytest.warns(UserWarning, match="batch norms left as they are") as caught:
        fused = fuse(model, **sample)
    assert len(caught) == 1
    assert why in str(caught[0].message)
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


@pytest.mark.parametrize("sample", [{}, {"example_inputs": images()}], ids=["trace", "example"])
def test_norms_that_follow_no_layer_are_named(sample: dict[str, Any]) -> None:
    model = shake(
        nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))
    )
    with pytest.warns(UserWarning, match="fuse: ") as caught:
        fused = fuse(model, **sample)
    assert kinds(fused, nn.BatchNorm2d) == ["0", "3"]
    text = str(caught[0].message)
    assert "3 (it reads " in text
    assert ("pass example_inputs" in text) == (not sample)


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
        (normed(), [("0", "1")], ValueError, "0.weight is no parameter, but "),
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


def test_untraceable_models_fold_what_is_consecutive_and_name_the_rest() -> None:
    class Mixed(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.steps(x))

    model = shake(Mixed())
    with pytest.warns(UserWarning, match="cannot be traced: TraceError") as caught:
        fused = fuse(model)
    assert kinds(fused, nn.BatchNorm2d) == ["bn1", "bn2"]
    assert torch.allclose(fused(images()), model(images()), atol=1e-5)
    text = str(caught[0].message)
    assert "left as they are: bn1, bn2 (" in text
    assert "; pass example_inputs" in text
    # The way out works.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fuse: ")
        assert not kinds(fuse(model, example_inputs=images()), nn.BatchNorm2d)


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
