"""equalize: float outputs stay, and the ranges of the weights on both sides become the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nets.equalizable import NETS, uneven
from torch_ext import ChannelLimits, Equalization, equalize

pytestmark = pytest.mark.usefixtures("one_thread")


def distance(have: Tensor, want: Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max())


def made_by(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    make, images, scaled = NETS[name]
    return uneven(make()), images(), scaled


@pytest.mark.parametrize("name", NETS)
def test_float_outputs_stay_and_the_layers_are_found(name: str) -> None:
    model, x, scaled = made_by(name)
    want, weights = model(x), copy.deepcopy(model.state_dict())
    result = equalize(model, x)
    assert [row.name for row in result.rows] == scaled, result
    assert distance(model(x), want) < 1e-12
    assert result.float_change < 1e-12
    changed = [key for key, value in model.state_dict().items() if not value.equal(weights[key])]
    assert changed
    assert sum(row.after for row in result.rows) > sum(row.before for row in result.rows)


def rows_of(layer: nn.Module, channel: int) -> Tensor:
    """The entries of a weight that make an output channel."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator, union-attr, assignment]
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight[channel]
    outputs = layer.out_channels // layer.groups
    inputs = layer.in_channels // layer.groups
    group, own = divmod(channel, outputs)
    return weight[group * inputs : (group + 1) * inputs, own]


def columns_of(layer: nn.Module, channel: int) -> Tensor:
    """The entries of a weight that meet an input channel."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator, union-attr, assignment]
    if isinstance(layer, nn.ConvTranspose2d):
        return weight[channel]
    if isinstance(layer, nn.Linear):
        return weight[:, channel]
    assert isinstance(layer, nn.Conv2d)
    outputs = layer.out_channels // layer.groups
    inputs = layer.in_channels // layer.groups
    group, own = divmod(channel, inputs)
    return weight[group * outputs : (group + 1) * outputs, own]


PAIRS: dict[str, Callable[[], nn.Sequential]] = {
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)
    ),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2)
    ),
    "mixed": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.PReLU(), nn.Conv2d(6, 6, 1, groups=3)
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_ranges_of_a_pair_become_their_geometric_mean(name: str) -> None:
    model = uneven(PAIRS[name]())
    assert isinstance(model, nn.Sequential)
    first, _, last = model
    channels = first.out_channels
    want = [
        math.sqrt(float(rows_of(first, c).abs().max()) * float(columns_of(last, c).abs().max()))
        for c in range(channels)
    ]
    bias = first.bias.detach().clone()
    before = [float(rows_of(first, c).abs().max()) for c in range(channels)]
    equalize(model, torch.randn(1, first.in_channels, 9, 9, dtype=torch.float64))
    for c in range(channels):
        assert float(rows_of(first, c).abs().max()) == pytest.approx(want[c], rel=1e-9)
        assert float(columns_of(last, c).abs().max()) == pytest.approx(want[c], rel=1e-9)
        scaled = float(bias[c]) * want[c] / before[c]
        assert float(first.bias[c]) == pytest.approx(scaled, rel=1e-9)


def test_a_chain_of_three_ends_at_the_cube_root() -> None:
    layers = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1)
    model = uneven(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))
    want = []
    for c in range(8):
        sizes = rows_of(layers[0], c), rows_of(layers[1], c), columns_of(layers[2], c)
        want.append(math.prod(float(size.abs().max()) for size in sizes) ** (1 / 3))
    result = equalize(model, torch.randn(1, 3, 6, 6, dtype=torch.float64))
    for c in range(8):
        for entries in (rows_of(layers[0], c), rows_of(layers[1], c), columns_of(layers[2], c)):
            assert float(entries.abs().max()) == pytest.approx(want[c], rel=1e-3)
    assert 1 < result.sweeps < 50
    once = equalize(model, torch.randn(1, 3, 6, 6, dtype=torch.float64))
    assert all(0.999 < row.least <= row.most < 1.001 for row in once.rows)


def test_a_norm_counts_as_folded() -> None:
    model = uneven(
        nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
    )
    conv, norm, last = model  # type: ignore[misc]

    def made(c: int) -> float:
        factor = norm.weight[c] / torch.sqrt(norm.running_var[c] + norm.eps)
        return float((conv.weight[c] * factor).abs().max())

    want = [math.sqrt(made(c) * float(columns_of(last, c).abs().max())) for c in range(6)]
    kept = conv.weight.detach().clone()
    equalize(model, torch.randn(1, 3, 6, 6, dtype=torch.float64))
    assert conv.weight.equal(kept)
    for c in range(6):
        assert made(c) == pytest.approx(want[c], rel=1e-9)
        assert float(columns_of(last, c).abs().max()) == pytest.approx(want[c], rel=1e-9)


def test_a_channel_that_is_zero_stays() -> None:
    model = uneven(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight[1] = 0.0  # type: ignore[index]
        model[2].weight[:, 2] = 0.0  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    equalize(model, torch.randn(1, 3, 4, 4, dtype=torch.float64))
    for c in (1, 2):
        assert model.state_dict()["0.weight"][c].equal(before["0.weight"][c])
        assert model.state_dict()["0.bias"][c].equal(before["0.bias"][c])
        assert model.state_dict()["2.weight"][:, c].equal(before["2.weight"][:, c])


# Norms before layers, by data


class Block(nn.Module):
    """As a transformer's: three layers read the norm, two of them in one weight."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.key, self.value = nn.Linear(6, 4), nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([self.key(x), self.value(x)], -1)


class HandWrittenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(6),
    "layer without bias": lambda: nn.LayerNorm(6, bias=False),
    "rms": lambda: nn.RMSNorm(6),
    "hand-written": HandWrittenNorm,
}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_gives_its_range_to_the_layers_that_read_it(name: str, alpha: float) -> None:
    model = uneven(Block(NORMS[name]()))
    assert isinstance(model, Block)
    batches = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
    inputs = torch.cat(batches)
    want = model(inputs)
    sizes = model.norm(inputs).abs().amax(0)
    weights = torch.cat([model.key.weight, model.value.weight]).abs().amax(0)
    factors = sizes**alpha / weights ** (1 - alpha)
    result = equalize(model, batches[0], batches, alpha=alpha)
    assert [(row.name, row.readers) for row in result.rows] == [("norm", ("key", "value"))]
    assert distance(model(inputs), want) < 1e-12
    torch.testing.assert_close(model.norm(inputs).abs().amax(0), sizes / factors)
    now = torch.cat([model.key.weight, model.value.weight]).abs().amax(0)
    torch.testing.assert_close(now, weights * factors)
    assert (result.rows[0].least, result.rows[0].most) == pytest.approx(
        (float(factors.min()), float(factors.max()))
    )


def test_a_batch_norm_before_a_layer() -> None:
    model = uneven(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    data = [torch.randn(2, 6, 8, 8, dtype=torch.float64) for _ in range(2)]
    want = [model(x) for x in data]
    assert "need data" in equalize(copy.deepcopy(model), data[0]).left["0"]
    result = equalize(model, data[0], data)
    assert [row.name for row in result.rows] == ["0"]
    assert all(distance(model(x), y) < 1e-12 for x, y in zip(data, want, strict=True))
    activations = torch.stack([model[1](model[0](x)) for x in data]).abs().amax((0, 1, 3, 4))  # type: ignore[index]
    columns = torch.stack([columns_of(model[2], c).abs().max() for c in range(6)])  # type: ignore[index]
    torch.testing.assert_close(activations, columns)


# Clips and absorbed constants


def clipped_net() -> nn.Module:
    layers = nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.Hardtanh(0.0, 2.0)
    return uneven(nn.Sequential(*layers, nn.Conv2d(6, 4, 1)), decades=2)


def test_a_clip_stays_unless_it_may_be_replaced() -> None:
    model, x = clipped_net(), 3 * torch.randn(4, 3, 9, 9, dtype=torch.float64)
    want, keys = model(x), list(model.state_dict())
    assert bool((model[1](model[0](x)) == 6).any())  # type: ignore[index]
    result = equalize(model, x)
    assert not result.rows
    assert "1 clips at 6" in result.left["0"]
    assert 'clipped="scale"' in result.left["0"]
    result = equalize(model, x, clipped="scale")
    assert [row.name for row in result.rows] == ["0", "2"]
    assert isinstance(model[1], ChannelLimits)  # type: ignore[index]
    assert distance(model(x), want) < 1e-12
    assert list(model.state_dict()) == [*keys[:2], "1.limits", *keys[2:4], "3.limits", *keys[4:]]


def test_a_clip_in_a_module_of_others_and_on_vectors() -> None:
    model = uneven(nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.ReLU6()), nn.Linear(7, 3)))
    x = 4 * torch.randn(6, 5, dtype=torch.float64)
    want = model(x)
    result = equalize(model, x, clipped="scale")
    assert [row.name for row in result.rows] == ["0.0"]
    assert distance(model(x), want) < 1e-12


@pytest.mark.parametrize("clip", [False, True])
def test_absorbing_keeps_outputs_on_the_data(clip: bool) -> None:
    act = nn.ReLU6() if clip else nn.ReLU()
    model = uneven(nn.Sequential(nn.Conv2d(3, 6, 3), act, nn.Conv2d(6, 4, 1, bias=False)), 1)
    with torch.no_grad():
        model[0].bias[:3] += 30.0  # type: ignore[index, operator]
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    want, least = model(x), model[0](x).amin((0, 2, 3))  # type: ignore[index]
    equal = copy.deepcopy(model)
    equalize(equal, x, clipped="scale")
    result = equalize(model, x, [x], absorb=True, clipped="scale")
    assert result.rows[0].absorbed == int((least > 0).sum()) >= 3
    assert distance(model(x), want) < 1e-12
    values = [net[1](net[0](x)).amax((0, 2, 3)) for net in (model, equal)]  # type: ignore[index]
    constants = equal[0](x).amin((0, 2, 3)).clamp(min=0)  # type: ignore[index]
    torch.testing.assert_close(values[0], values[1] - constants)
    assert model[2].bias is not None  # type: ignore[index]


def test_absorbing_by_a_batch_norm_moves_three_sigmas() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4),
    ).double().eval()  # fmt: skip
    nn.init.uniform_(model[1].weight, 0.1, 0.3)
    nn.init.constant_(model[1].bias, 2.0)
    norm, x = copy.deepcopy(model[1]), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = equalize(model, x, absorb=True)
    assert result.rows[0].absorbed == 6
    factors = norm.weight / model[1].weight
    absorbed = (norm.bias - 3 * norm.weight) / factors
    torch.testing.assert_close(model[1].bias, norm.bias / factors - absorbed)
    moved = (model[3].weight.sum((2, 3)) * absorbed).sum(1)
    torch.testing.assert_close(model[4].running_mean, -moved)
    assert model[3].bias is None


def test_nothing_is_absorbed_at_zeros_around_an_input() -> None:
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)
    padded = nn.Sequential(*layers).double()
    with torch.no_grad():
        padded[0].bias += 30.0  # type: ignore[operator]
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    want = padded(x)
    assert equalize(padded, x, [x], absorb=True).rows[0].absorbed == 0
    assert distance(padded(x), want) < 1e-12
    separate = nn.Sequential(*layers[:2], nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3)).double()
    want = separate(x)
    assert equalize(separate, x, [x], absorb=True).rows[0].absorbed == 0
    assert distance(separate(x), want) < 1e-12


def test_the_table_names_what_was_done_and_why_not() -> None:
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)))
    result = equalize(model, torch.randn(1, 3, 9, 9, dtype=torch.float64))
    assert isinstance(result, Equalization)
    text = str(result)
    assert "range used" in text
    assert "left: 2 (it is an output of the model" in text
