"""report: its numbers against numpy, its words against made-up data, and what it leaves alone."""

from __future__ import annotations

import html
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import ACTIVATIONS, calibrated, images, prepared, tiny_net
from reference import Grid, fake_quant, qparams
from sample_grids import GRIDS
from snapshots import same, snapshot
from torch_ext import FakeQuantize, get_default_qconfig, report, resolve, set_fake_quantize
from torch_ext.analysis.report.quantizer_report import QuantizerReport, measured
from torch_ext.files.quantizer_params import params_of

CONFIG = get_default_qconfig(activation_observer="percentile")
COUNT = 20_000


pytestmark = pytest.mark.usefixtures("one_thread")


def gauss(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape or (COUNT,), generator=torch.Generator().manual_seed(seed))


def lone(x: Tensor, observer: str = "percentile", **keys: Any) -> FakeQuantize:
    """A quantizer that is the whole model, calibrated on x."""
    quantizer = FakeQuantize("fake_quant", observer, **keys)
    set_fake_quantize(quantizer, "calibration")
    quantizer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch_ext.QuantizationWarning)
        set_fake_quantize(quantizer, "validation", allow_unobserved=True)
    return quantizer


def looked_at(
    quantizer: FakeQuantize, of: str = "output", weight: Tensor | None = None
) -> QuantizerReport:
    return measured("x", of, params_of(quantizer), weight)


def keys_of(grid: Grid) -> dict[str, Any]:
    return {
        "dtype": {(-8, 7): "int4", (0, 15): "uint4"}.get(
            (grid.quant_min, grid.quant_max), "uint8" if grid.unsigned else "int8"
        ),
        "qscheme": "per_tensor_symmetric" if grid.symmetric else "per_tensor_affine",
        "quant_min": grid.quant_min,
        "quant_max": grid.quant_max,
    }


def in_numpy(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> dict[str, float]:
    values, s, z = (t.double().numpy() for t in (x, scale, zero_point))
    out = fake_quant(x.numpy(), scale.numpy(), zero_point.numpy(), grid).astype(np.float64)
    half = 0.50001  # the border itself is rounded to the end of the grid
    low, high = (grid.quant_min - z - half) * s, (grid.quant_max - z + half) * s
    return {
        "clipped": float(np.mean((values < low) | (values > high))),
        "to_zero": float(np.mean((out == 0) & (values != 0))),
        "sqnr": 10 * math.log10(np.sum(values**2) / np.sum((values - out) ** 2)),
        "cosine": float(np.sum(values * out) / np.sqrt(np.sum(values**2) * np.sum(out**2))),
    }


@pytest.mark.parametrize("name", GRIDS)
def test_a_histogram_measures_half_precision_data_exactly(name: str) -> None:
    grid = GRIDS[name]
    x = (gauss() + 0.5).bfloat16().float()
    quantizer = lone(x, percentile=98.0, **keys_of(grid))
    quality = looked_at(quantizer).quality
    assert quality is not None
    want = in_numpy(x, quantizer.scale, quantizer.zero_point, grid)
    assert want["clipped"] > 0.005
    assert quality.clipped == want["clipped"]
    assert quality.sqnr == pytest.approx(want["sqnr"], abs=1e-4)
    assert quality.cosine == pytest.approx(want["cosine"], rel=1e-7)
    # Values below the window count as 0.
    assert quality.to_zero == pytest.approx(want["to_zero"], abs=1e-3)


@pytest.mark.parametrize("ch_axis", [0, 1])
def test_a_weight_is_measured_by_channel(ch_axis: int) -> None:
    weight = gauss(6, 4, 3, 3) * torch.tensor([1, 0.1, 3, 1, 0, 0.02])[:, None, None, None]
    weight = weight.transpose(0, ch_axis)
    keys: dict[str, Any] = {
        "qscheme": "per_channel_symmetric",
        "ch_axis": ch_axis,
        "channel_len": 6,
    }
    quantizer = lone(weight, "clip_std", std_scale=1.5, **keys)
    subject = looked_at(quantizer, "weight", weight)
    shape = [6 if axis == ch_axis else 1 for axis in range(4)]
    want = in_numpy(weight, quantizer.scale.view(shape), quantizer.zero_point.view(shape), Grid())
    assert subject.quality is not None
    assert {field: getattr(subject.quality, field) for field in want} == pytest.approx(want)
    assert subject.in_use is not None
    assert subject.in_use.quality == subject.quality
    assert subject.source == "the weight"


def test_values_that_are_not_finite_are_left_out() -> None:
    weight = gauss(4, 50)
    keys: dict[str, Any] = {"qscheme": "per_channel_symmetric", "ch_axis": 0, "channel_len": 4}
    weight[1, 7], weight[2, 3] = math.nan, -math.inf
    zeroed = torch.where(weight.isfinite(), weight, 0)
    quantizer = lone(weight, "min_max", **keys)
    have = looked_at(quantizer, "weight", weight).quality
    want = in_numpy(zeroed, quantizer.scale[:, None], quantizer.zero_point[:, None], Grid())
    assert have is not None
    assert have.sqnr == pytest.approx(want["sqnr"])


@pytest.mark.parametrize("rule", ["min_max", "percentile", "mse", "kl", "mix", "aciq", "clip_std"])
def test_every_rule_is_what_the_model_would_have_with_it(rule: str) -> None:
    quantizer = lone((gauss() * 2).exp(), "percentile", percentile=97.0)
    line = next(
        line
        for line in looked_at(quantizer).lines
        if line.choice is not None and line.choice.rule == rule
    )
    if rule != "percentile":
        resolve(quantizer, activation_observer=rule)
    assert torch.equal(line.range, quantizer.range)
    assert line.quality == looked_at(quantizer).quality
    reach, largest = quantizer.range.abs().max(), quantizer.observer.extrema.abs().max()
    assert line.share == pytest.approx(float(reach / largest))


def test_the_error_curve_is_that_of_thresholds() -> None:
    x = (gauss(5000) - 0.3).bfloat16().float()
    curve = looked_at(lone(x, dtype="int4")).curve
    largest, values = float(x.abs().max()), x.double()
    assert [share for share, _ in curve] == pytest.approx(2.0 ** (np.arange(-48, 1) / 8))
    for share, error in curve:
        reach = share * largest
        low, high = max(float(x.min()), -reach), min(float(x.max()), reach)
        scale, zero_point, _ = qparams(low, high, Grid(-8, 7))
        out = fake_quant(
            x.numpy(), np.float32([scale]), np.int32([zero_point]), Grid(-8, 7)
        ).astype(np.float64)
        noise = np.sum((values.numpy() - out) ** 2) / float(values.square().sum())
        assert error == pytest.approx(10 * math.log10(noise), abs=1e-3)
    lines = {line.label: line.quality.sqnr for line in looked_at(lone(x, dtype="int4")).lines}
    assert -min(error for _, error in curve) <= lines["mse"] + 1e-6
    assert -curve[-1][1] == pytest.approx(lines["min_max"], abs=1e-6)


def test_bins_count_the_values() -> None:
    x = torch.cat([gauss(3000).exp(), -gauss(2000).exp(), torch.zeros(7)]).bfloat16().float()
    bins = looked_at(lone(x)).bins
    assert bins is not None
    assert bins.largest == float(x.abs().max())
    want = [[0] * 129, [0] * 129]
    for value in x[x != 0].tolist():
        place = math.floor(8 * (math.log2(abs(value) / bins.largest) + 16))
        want[value > 0][place] += 1
    differing = sum(
        abs(a - b)
        for h, w in zip(bins.counts, want, strict=True)
        for a, b in zip(h, w, strict=True)
    )
    assert differing <= 4  # a value on an edge may fall to either side
    assert [sum(side) for side in bins.counts] == [2000, 3000]


def test_data_is_measured_as_it_passes(tmp_path: Path) -> None:
    net = calibrated(get_default_qconfig(activation_qkwargs={"dtype": "int4"}))
    batches = [images(3, seed=5), images(2, seed=6)]
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ACTIVATIONS}
    quantizers = torch_ext.quantizers.find.named_quantizers(net)
    handles = [
        quantizers[name].register_forward_hook(
            lambda module, args, out, name=name: passed[name].append((args[0], out))
        )
        for name in ACTIVATIONS
    ]
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for handle in handles:
        handle.remove()
    seen: dict[str, QuantizerReport] = {}
    module = sys.modules["torch_ext.analysis.report.report"]
    original = module.measured

    def spy(name: str, *arguments: Any) -> QuantizerReport:
        seen[name] = original(name, *arguments)
        return seen[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measured", spy)
        report(net, tmp_path / "page.html", batches)
    for name, pieces in passed.items():
        x = torch.cat([inside for inside, _ in pieces]).double()
        out = torch.cat([outside for _, outside in pieces]).double()
        subject = seen[name]
        assert subject.quality is not None
        sqnr = 10 * math.log10(float(x.square().sum() / (x - out).square().sum()))
        assert subject.quality.sqnr == pytest.approx(sqnr, abs=1e-6), name
        assert subject.source == "the data"
        assert subject.largest is not None
        channels = x.transpose(0, 1).flatten(1).abs().amax(1).float()
        assert torch.equal(subject.largest, channels), name
        # No histogram was kept, so one is made of the data.
        assert subject.counts[0] == x.numel()
        assert subject.bins is not None


def test_data_that_is_not_finite_does_not_count(tmp_path: Path) -> None:
    x = gauss(4000)
    net = lone(x, "mse")
    report(net, tmp_path / "page.html", [x])
    report(net, tmp_path / "bad.html", [x, torch.tensor([math.inf, math.nan, -math.inf])])
    found = [
        re.search(r'SQNR.*<tr data-name="\(the model.*?(?:<td.*?){8}<td data-v="(.*?)"', text, re.S)
        for text in ((tmp_path / f"{name}.html").read_text() for name in ("page", "bad"))
    ]
    sqnr = [float(match[1]) for match in found if match]
    assert sqnr == pytest.approx([sqnr[0]] * 2)
    assert 30 < sqnr[0] < 50


def outlier(rows: int) -> Tensor:
    x = gauss(rows, 8, 25)
    x[0, 5, 0] = 60.0
    return x


def warned(quantizer: nn.Module, path: Path, data: Any = None) -> tuple[list[str], str]:
    """The warnings, and everything that the page says."""
    summary = report(quantizer, path / "page.html", data)
    text = html.unescape((path / "page.html").read_text())
    for _, said in summary.warnings:
        assert said in text
        assert said in str(summary)
    return [said for _, said in summary.warnings], text


def test_advice_about_outliers_is_true(tmp_path: Path) -> None:
    model = lone(outlier(5000), "min_max", histogram=True)
    said, _ = warned(model, tmp_path)
    assert len(said) == 1
    assert said[0].startswith("0.01 % of the values use 9")
    told = re.search(r"(resolve\(.*?\)) would take \[(\S+), (\S+)\]", said[0])
    numbers = re.search(r"the SQNR from (\S+) to (\S+) dB", said[0])
    assert told
    assert numbers
    before = looked_at(model).quality
    assert before is not None
    assert f"{before.sqnr:.1f}" == numbers[1]
    exec(told[1].replace(', pattern=""', ""), {"resolve": resolve, "model": model})
    after = looked_at(model).quality
    assert after is not None
    assert f"{after.sqnr:.1f}" == numbers[2]
    assert after.sqnr > before.sqnr + 1
    assert [float(v) for v in model.range[0]] == pytest.approx(
        [float(told[2]), float(told[3])], rel=1e-3
    )


def test_advice_names_one_quantizer(tmp_path: Path) -> None:
    """Also where the name looks like a pattern."""
    net = nn.Module()
    quantizer = lone(outlier(5000), "min_max", histogram=True)
    net.add_module('a*[1]"', quantizer)
    net.add_module('ab1"', lone(gauss(), "min_max", histogram=True))
    (said,) = warned(net, tmp_path)[0]
    told = re.search(r"(resolve\(.*\)) would", said)
    assert told
    exec(told[1], {"resolve": resolve, "model": net})
    assert quantizer.observer.name == "mse"
    assert net.get_submodule('ab1"').observer.name == "min_max"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shape", "channel"),
    [((100, 8, 5, 5), "5 (axis 1)"), ((100, 25, 8), "5 (axis 2)"), ((2500, 8), "5 (axis 1)")],
)
def test_data_names_the_outlier_channel(
    shape: tuple[int, ...], channel: str, tmp_path: Path
) -> None:
    x = outlier(100)
    x = x.reshape(shape) if shape[1] == 8 and len(shape) == 4 else x.transpose(1, 2).reshape(shape)
    model = lone(x, "min_max")
    said, _ = warned(model, tmp_path, list(x.split(40)))
    assert [text[:40] for text in said] == [f"Outlier channel {channel} sets the scale: "[:40]]


def test_good_data_gives_no_warning(tmp_path: Path) -> None:
    said, text = warned(lone(gauss(), "mse"), tmp_path)
    assert said == []
    assert "None." in text


@pytest.mark.parametrize(
    ("x", "keys", "words"),
    [
        (torch.zeros(5000), {}, "Every value is 0, so the scale is 1."),
        (gauss(999), {"observer": "mse"}, "Only 999 values were seen."),
        (
            torch.cat([gauss(), torch.tensor([math.inf, math.nan, -math.inf])]),
            {"observer": "mse"},
            "2 infinite and 1 NaN values were left out.",
        ),
        (
            gauss(),
            {"observer": "mse", "dtype": "uint8"},
            f"Negative values, down to {float(gauss().min()):.4g}, clip to 0.",
        ),
        (gauss(), {"percentile": 90.0}, " % of the values are clipped. resolve(model, activ"),
        (gauss(), {"observer": "mean_abs"}, "Another rule leaves less noise. resolve("),
        (gauss(), {"observer": "mse", "quant_min": -2, "quant_max": 1}, "The SQNR is"),
    ],
)  # fmt: skip
def test_words(x: Tensor, keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    said, _ = warned(lone(x, **keys), tmp_path)
    assert any(words in text for text in said), said


@pytest.mark.parametrize(
    ("x", "keys", "words"),
    [
        (gauss().relu(), {"observer": "mse"}, "No value is negative, so half of the grid is idle."),
        (gauss(), {"observer": "min_max"}, "No histogram was kept, so there is no picture."),
        (
            gauss(3, 2000) * torch.tensor([1.0, 0.0, 2.0])[:, None],
            {"observer": "mse", "qscheme": "per_channel_symmetric", "ch_axis": 0, "channel_len": 3},
            "Channels [1] of 3 hold nothing to scale (scale 1).",
        ),
    ],
)
def test_hints_are_no_warnings(x: Tensor, keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    said, text = warned(lone(x, **keys), tmp_path)
    assert said == []
    assert words in text
    assert words not in warned(lone(gauss(), "mse"), tmp_path)[1]


def test_what_has_no_range_is_named(tmp_path: Path) -> None:
    summary = report(prepared(CONFIG), tmp_path / "page.html")
    assert len(summary.warnings) == 8  # five operands and three weights
    assert all(text.startswith("It has no range.") for _, text in summary.warnings)


@pytest.mark.parametrize(
    "x",
    [
        torch.full((50,), torch.finfo(torch.float32).max),
        torch.full((50,), 1e-42),
        torch.tensor([3.0]),
        torch.tensor([-(2.0**-126), 1.0]),
        torch.tensor([math.nan]),
        torch.zeros(0),
        torch.cat([gauss(), torch.tensor([1e30])]),
    ],
    ids=["largest", "subnormal", "one", "far apart", "nan", "empty", "huge"],
)
@pytest.mark.parametrize("observer", ["mse", "min_max", "clip", "fixed_scale"])
def test_hostile_data_gives_a_page(x: Tensor, observer: str, tmp_path: Path) -> None:
    model = lone(x, observer)
    report(model, tmp_path / "page.html")
    if x.numel():
        report(model, tmp_path / "page.html", [x])
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r'="(nan|inf|-inf)"', re.sub(r'data-v="[^"]*"', "", text))


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_learned_ranges_are_those_in_use(method: str, tmp_path: Path) -> None:
    net = calibrated(get_default_qconfig(method, method, activation_observer="percentile"))
    quantizer = net.conv2.input_quantizers.input
    with torch.no_grad():
        next(quantizer.parameters()).mul_(0.5)
    subject = looked_at(quantizer)
    assert subject.in_use is not None
    assert torch.equal(subject.in_use.range, quantizer.range)
    solved = next(line for line in subject.lines if line.label == "percentile(99.99)")
    assert subject.in_use.quality.clipped > solved.quality.clipped
    before = snapshot(net)
    report(net, tmp_path / "page.html", [images()])
    assert same(snapshot(net), before)
    assert f"{method}, from percentile(99.99)" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("state", ["calibration", "qat", "validation", "float"])
@pytest.mark.parametrize("with_data", [False, True])
def test_the_model_stays_as_it_was(state: str, with_data: bool, tmp_path: Path) -> None:
    net = calibrated(CONFIG).train()
    set_fake_quantize(net, state)
    before, random = snapshot(net), torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in net.modules()]
    data = [images(2)] if with_data else None
    report(net, tmp_path / "page.html", data)
    with pytest.raises(InterruptedError):
        report(net, tmp_path / "page.html", [images(2)], forward=fail)
    assert same(snapshot(net), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(module._forward_hooks) for module in net.modules()] == hooks


def fail(model: nn.Module, batch: Tensor) -> None:
    model(batch)
    raise InterruptedError


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"model": 3}, TypeError, "report: expected model to be a torch.nn.Module, got 3"),
        ({"model": tiny_net()}, ValueError, "report: expected model to have quantizers"),
        ({"model": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
        ({"data": []}, ValueError, "report: expected data to give batches, got none"),
        ({"data": 3}, TypeError, "report: expected data to be batches, got 3"),
        ({"data": "images"}, TypeError, "report: expected data to be batches, got 'im"),
        ({"data": [()]}, ValueError, "batches to hold inputs"),
        ({"path": "/nowhere/page.html"}, FileNotFoundError, "folder /nowhere to exist"),
    ],
)
def test_bad_arguments_write_nothing(
    arguments: dict[str, Any], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    net = calibrated(CONFIG)
    before = snapshot(net)
    with pytest.raises(kind) as caught:
        report(**({"model": net, "path": tmp_path / "page.html"} | arguments))
    assert text in str(caught.value)
    assert same(snapshot(net), before)
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "params.safetensors"
    torch_ext.save_observer_params(calibrated(CONFIG), file)
    with pytest.raises(ValueError, match="expected data to be None with a file"):
        report(file, tmp_path / "page.html", [images()])
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"params\.safetensors"):
        report(file, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
