"""benchmarks/accuracy.py: its parts, and one small run."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import accuracy
import trained_net
from agreement import nets, page, scores
from agreement.grids import BITS
from agreement.ours import RECIPES, Task
from agreement.rivals import RIVALS
from agreement.scores import Outcome
from agreement.store import Store
from paths import ROOT


def outcome(same: list[bool], error: list[float], size: list[float]) -> Outcome:
    return Outcome(same, [], error, size, 1.0, 0.5)


def test_outcome_compares_classes_and_logits() -> None:
    want = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    have = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 1.0]])
    found = scores.outcome(have, want, torch.tensor([0, 1, 1]), 2.0)
    assert found.same == [True, False, True]
    assert found.right == [False, True, True]
    assert found.error == [0.0, 2.0, 1.0]
    assert found.size == [25.0, 1.0, 4.0]
    assert scores.logit_error([found]).value == pytest.approx(math.sqrt(3 / 30))
    assert scores.same_class([found]).value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="expected finite logits"):
        scores.outcome(have.log(), want)


def test_the_interval_of_one_draw_is_that_of_the_binomial() -> None:
    random = np.random.default_rng(1)
    same = (random.random(900) < 0.7).tolist()
    found = scores.same_class([outcome(same, [1.0] * 900, [1.0] * 900)])
    half = 1.96 * math.sqrt(found.value * (1 - found.value) / 900)
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)


def test_draws_that_differ_widen_the_interval() -> None:
    ones = [1.0] * 300
    alike = [outcome(([True] * 3 + [False]) * 75, ones, ones) for _ in range(3)]
    shares = ([True] * 300, ([True] * 3 + [False]) * 75, [True, False] * 150)
    apart = [outcome(same, ones, ones) for same in shares]
    wide, narrow = scores.same_class(apart), scores.same_class(alike)
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_what_two_recipes_have_in_common_leaves_their_difference() -> None:
    random = np.random.default_rng(2)
    same = (random.random(300) < 0.5).tolist()
    sizes, errors = [4.0] * 300, random.random(300)
    ours = [outcome(same, errors.tolist(), sizes)]
    other = [outcome(same, (4 * errors).tolist(), sizes)]
    ahead, ratio = scores.same_class_ahead(ours, other), scores.error_ratio(ours, other)
    assert (ahead.value, ahead.low, ahead.high) == (0.0, 0.0, 0.0)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_no_photo_is_tested_by_the_draw_that_calibrates_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shades = range(0, 250, 25)
    pictures = [Image.new("RGB", (64, 64), (shade, shade, shade)) for shade in shades]
    monkeypatch.setattr(trained_net, "photos", lambda: pictures[:4])
    monkeypatch.setattr(nets, "imagenet_photos", lambda: pictures[4:])
    tested = set()
    for draw in range(nets.DRAWS):
        made = nets.photo_crops(16, draw, nets.Sizes(30, 30))
        assert made.test.shape == (30, 3, 16, 16)
        seen, new = set(made.calibration.flatten().tolist()), set(made.test.flatten().tolist())
        assert not seen & new
        assert len(seen | new) == len(shades)
        assert not tested & new
        tested |= new
    assert len(tested) == len(shades)


def test_tones_are_those_of_the_seed_and_scaled() -> None:
    tones = nets.tones(5, seed=3)
    assert torch.equal(tones, nets.tones(5, seed=3))
    assert not torch.equal(tones, nets.tones(5, seed=4))
    assert tones.mean(1).abs().max() < 1e-5
    assert (tones.std(1) - 1).abs().max() < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is None, reason="no torchcrepe")
@pytest.mark.parametrize("hertz", [110.0, 220.0, 440.0, 880.0])
def test_crepe_hears_the_pitch_of_a_tone(hertz: float) -> None:
    phase = 2 * math.pi * hertz * torch.arange(nets.FRAME) / nets.RATE
    wave = sum(torch.sin(k * phase) / k for k in range(1, 6))
    assert isinstance(wave, torch.Tensor)
    with torch.no_grad():
        step = nets.crepe().eval()(((wave - wave.mean()) / wave.std())[None]).argmax()
    # Step 0 is 31.70 Hz; a step is 20 cents, and one of them may be missed.
    assert abs(int(step) - 60 * math.log2(hertz / 31.70)) <= 1.5


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=4)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("name", [name for name in RECIPES if not RECIPES[name].why_not()])
@pytest.mark.parametrize("bits", BITS)
def test_recipes_keep_to_the_bits_and_leave_the_float_net(name: str, bits: str) -> None:
    net = Small().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    data = torch.randn(nets.BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = RECIPES[name].make(Task(net, BITS[bits], data))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    for layer in (model.first, model.last):
        levels = max(len(channel.unique()) for channel in layer.weight)
        assert 2 < levels <= 2 ** BITS[bits].weight
    have, want = scores.logits(model, data, 4), scores.logits(net, data, 4)
    assert (have - want).norm() / want.norm() < {"W8A8": 0.05, "W6A8": 0.1}.get(bits, 0.6)


def test_a_rival_that_leaves_layers_float_is_not_compared() -> None:
    """torchao finds convolutions by their class: of a subclass it would measure the float net."""
    assert not accuracy.fits("torchao x86", "efficientnet_lite0", "W8A8", everything=True)
    assert accuracy.fits("torchao x86", "example", "W8A8", everything=True)
    pytest.importorskip("torchao")

    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight, self.bias)

    net = nn.Sequential(Own(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(RuntimeError, match="torchao left 1 of 2 layers float"):
        RIVALS["torchao x86"].make(net, BITS["W8A8"], torch.randn(8, 3, 8, 8))


def test_chosen_is_the_recipe_that_fits_the_calibration_best_in_each_draw() -> None:
    fits = {"a": (0.1, 0.4), "b": (0.2, 0.3)}
    made = {
        name: [Outcome([True], [], [1.0], [1.0], 1.0, fit) for fit in fits[name]] for name in fits
    }
    assert scores.chosen(list(made.values())) == [made["a"][0], made["b"][1]]


def test_tables_hold_what_was_found() -> None:
    ones = [1.0] * 10
    good, bad = outcome([True] * 10, ones, ones), outcome([False] * 10, [4.0] * 10, ones)
    found = {("net", "W4A8", "other"): [bad] * 3, ("net", "W4A8", "mse"): [good] * 3}
    lines = page.table(found, "net", ["other"]).splitlines()
    assert lines[0] == "| recipe | W4A8 |"
    assert lines[2] == "| mse | 1.000 (1.000-1.000), 1.000, 1 s |"
    assert lines[3].startswith("| other | 0.000 (0.000-0.000), 2.000")
    (line,) = page.against(found, "net", "W4A8", "mse", ["other", "absent"])
    assert line.endswith("| +1.000 (+1.000 to +1.000) | 0.50 (0.50 to 0.50) |")
    row = page.record(found)[1]
    assert row["inputs"] == 30
    assert row["same_class"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_the_store_keeps_results(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agreement.store.FOLDER", tmp_path)
    found = outcome([True, False], [0.5, 0.25], [1.0, 2.0])
    Store("a").write("name", found, rival=True)
    assert Store("a").read("name", rival=True) == found
    assert Store("a").read("name", rival=False) is None
    assert Store("other sizes").read("name", rival=True) is None


def test_two_processes_may_store_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agreement.store.FOLDER", tmp_path)
    store, save = Store("a"), torch.save
    ours, theirs = torch.ones(3), torch.zeros(3)

    def interrupted(values: torch.Tensor, path: Path) -> None:
        """Another process stores its own before ours is in its place."""
        save(values, path)
        with monkeypatch.context() as other:
            other.setattr("os.getpid", lambda: 1)
            other.setattr(torch, "save", save)
            store.keep_logits("draw", theirs)

    monkeypatch.setattr(torch, "save", interrupted)
    store.keep_logits("draw", ours)
    have = store.logits("draw")
    assert have is not None
    assert torch.equal(have, ours)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["draw.pt"]


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_a_small_run() -> None:
    done = program(
        "--quick", "--nets", "example", "--bits", "W8A8", "--recipes", "min_max", "--jobs", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "| recipe | W8A8 |" in done.stdout
    assert "| min_max | " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "nothing"], "expected a net and a recipe that run here"),
        (["--jobs", "0"], "expected --jobs to be at least 1"),
        (["--bits", "W9"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = program("--nets", "example", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
