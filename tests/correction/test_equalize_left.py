"""equalize: values that stay as they are, each with its reason, and arguments that are refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext import equalize, get_default_qconfig, prepare_qat

pytestmark = pytest.mark.usefixtures("one_thread")


class Pair(nn.Module):
    """Two convolutions; the subclasses say what is between and beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self.first(x)))


class Gelu(Pair):
    def between(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Shifted(Pair):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(x + 1)


class Residual(Pair):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(F.relu(x)) + x


class Returned(Pair):
    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        return self.last(x), x


class Kept(Pair):
    def between(self, x: Tensor) -> Tensor:
        self.features = F.relu(x)
        return self.features


class LookedAt(Pair):
    def between(self, x: Tensor) -> Tensor:
        return x if float(x.max()) > 1e9 else F.relu(x)


class Clamped(Pair):
    def between(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6)


class Squared(Pair):
    def between(self, x: Tensor) -> Tensor:
        return x * x


class Divided(Pair):
    def between(self, x: Tensor) -> Tensor:
        return 1 / (x.relu() + 1)


class Written(Pair):
    def between(self, x: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        made[:, :2] = x[:, :2]
        return made


class Padded(Pair):
    def between(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), value=2.0)


class AcrossChannels(Pair):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(x).mean(1, keepdim=True).expand(-1, 6, -1, -1)


class AcrossSums(Pair):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) + x.flip(1)


class SpaceToChannels(Pair):
    def between(self, x: Tensor) -> Tensor:
        return x.transpose(1, 3)


class AsAWeight(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.first(x)[:1, :3].mean((2, 3), keepdim=True)) + self.last(
            torch.zeros(1, 6, 1, 1)
        )


class Twice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.last(F.relu(self.first(x)))))


class Penalized(Pair):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.first.weight.square().sum()


class Computed(Pair):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight / self.first.weight.norm()
        return self.last(F.relu(F.conv2d(x, weight)))


class Softmax(Pair):
    def between(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class NormAlone(Pair):
    """A norm that cannot be folded, as something else reads the convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) * (x.detach().sum() > 0)


class NormWithoutWeight(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6, affine=False)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class InTraining(Pair):
    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        return (self.last(x), x) if self.training else self.last(x)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.utils.prune.l1_unstructured(model[2], "weight", 0.5)  # type: ignore[no-untyped-call]
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "gelu": (Gelu, "first", "gelu reads it, and does not scale with it"),
    "a number added": (Shifted, "first", "add adds another value to it"),
    "residual": (Residual, "first", "adds another value to it"),
    "returned": (Returned, "first", "output of the model"),
    "kept": (Kept, "first", "output of the model, or looked at"),
    "looked at": (LookedAt, "first", "max reads it"),
    "clamp": (Clamped, "first", "clamp reads it"),
    "square": (Squared, "first", "mul reads it"),
    "divided by": (Divided, "first", "adds another value"),
    "written": (Written, "first", "looked at by its code"),
    "padded": (Padded, "first", "pad reads it"),
    "mean of channels": (AcrossChannels, "first", "mean reads it"),
    "sum of channels": (AcrossSums, "first", "adds different channels"),
    "transposed": (SpaceToChannels, "first", "last reads several of its channels as one"),
    "a layer twice": (Twice, "first", "last is called 2 times"),
    "a weight read": (Penalized, "first", "something else reads first.weight"),
    "a weight computed": (Computed, "", ""),
    "softmax": (Softmax, "first", "softmax reads it"),
    "a norm alone": (NormAlone, "first", "norm reads it"),
    "no weight": (NormWithoutWeight, "first", "norm has no weight with a value a channel"),
    "in training": (InTraining, "first", "output of the model"),
    "tied": (tied, "0", "0.weight is shared"),
    "parametrized": (parametrized, "0", "0.weight is no parameter"),
    "hooked": (hooked, "0", "2.weight is no parameter"),
    "last": (lambda: nn.Sequential(nn.Linear(4, 4)), "0", "output of the model"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_may_not_be_scaled_stays(name: str) -> None:
    make, layer, why = LEFT[name]
    model = make().double()
    x = torch.randn(2, 3, 6, 6) if isinstance(model, Pair) else torch.randn(2, 4)
    if name == "transposed":
        x = torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    result = equalize(model, x.double())
    assert not result.rows
    assert why in result.left.get(layer, ""), result
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_value_that_is_a_weight_stays() -> None:
    model = AsAWeight()
    result = equalize(model, torch.randn(2, 3, 6, 6))
    assert "first" in result.left
    assert not result.rows


def test_examples_that_go_other_ways() -> None:
    class Forked(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            x = F.relu(self.first(x))
            return self.other(x) if other else self.last(x)

    x = torch.randn(2, 3, 6, 6)
    assert [row.name for row in equalize(Forked(), (x,)).rows] == ["first"]
    result = equalize(Forked(), [(x,), (x, True)])
    assert not result.rows
    assert "another run" in result.left["first"]


# Arguments


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alpha": ({"alpha": 1.5}, ValueError, "equalize: expected alpha to be between 0 and 1"),
    "no number": ({"alpha": "a"}, TypeError, "equalize: expected alpha to be a number"),
    "iterations": ({"iterations": 0}, ValueError, "equalize: expected iterations to be between"),
    "flag": ({"absorb": 1}, TypeError, "equalize: expected absorb to be True or False, got 1"),
    "clipped": (
        {"clipped": "drop"},
        ValueError,
        "expected clipped to be keep or scale, got 'drop'",
    ),
    "one tensor": ({"data": X}, TypeError, "equalize: expected data to be batches"),
    "no batches": ({"data": []}, ValueError, "equalize: expected data to give batches, got none"),
    "not finite": (
        {"data": [X * math.nan]},
        ValueError,
        "all values are finite, got others behind",
    ),
    "unknown": (
        {"pattern": "conv*"},
        ValueError,
        'no layer or norm matches pattern "conv*"; known',
    ),
    "no text": ({"pattern": [3]}, TypeError, "equalize: expected pattern to be text, got 3"),
    "number": (
        {"pattern": 5},
        TypeError,
        "equalize: expected pattern to be text or a list of texts, got 5",
    ),
    "no pattern": (
        {"pattern": []},
        ValueError,
        "equalize: expected pattern to name layers or norms, got an empty list",
    ),
    "forward": ({"forward": 3}, TypeError, "equalize: expected forward to be a function"),
    "device": ({"device": "nowhere"}, ValueError, "equalize: expected device to be a device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_before_anything_changes(name: str) -> None:
    keys, kind, message = REFUSED[name]
    model = plain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind) as caught:
        equalize(model, X, **keys)
    assert message in str(caught.value)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_and_examples_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"equalize: expected model to be a torch\.nn\.Module"):
        equalize(3, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected example_inputs that the model can run"):
        equalize(plain(), torch.randn(2, 4, 6, 6))
    broken = plain()
    with torch.no_grad():
        broken[2].weight[0, 0] = math.inf  # type: ignore[index]
    with pytest.raises(ValueError, match=r"expected finite weights, got others in 2\.weight"):
        equalize(broken, X)
    steep = plain()
    with torch.no_grad():
        steep[0].weight *= 1e-30  # type: ignore[index, operator]
        steep[0].bias.fill_(1e30)  # type: ignore[index, union-attr, operator]
        steep[2].weight *= 1e30  # type: ignore[index, operator]
    before = copy.deepcopy(steep.state_dict())
    with pytest.raises(ValueError, match=r"scaled values are finite, got others in 0\.bias"):
        equalize(steep, X)
    assert all(value.equal(before[key]) for key, value in steep.state_dict().items())
    prepared = plain()
    prepared.qconfig = get_default_qconfig()  # type: ignore[assignment]
    prepared = prepare_qat(prepared, example_inputs=X)
    with pytest.raises(ValueError, match="expected a float model with clipped"):
        equalize(prepared, X, clipped="scale")


def test_an_interrupted_run_leaves_the_model_as_it_was() -> None:
    model, seen = plain().train(), 0

    def forward(net: nn.Module, batch: Tensor) -> None:
        nonlocal seen
        seen += 1
        net(batch)
        if seen == 2:
            raise KeyboardInterrupt

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        equalize(model, X, [X] * 3, forward=forward)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
