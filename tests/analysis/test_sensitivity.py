"""sensitivity: one quantizer switched at a time, against models in which only that one differs."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import ACTIVATIONS, WEIGHTS, calibrated, images, prepared, tiny_net
from snapshots import same, snapshot
from torch_ext import FakeQuantState, get_default_qconfig, sensitivity, set_fake_quantize

ALL = [*ACTIVATIONS, *WEIGHTS]
CONFIG = get_default_qconfig(
    activation_observer="percentile",
    activation_qkwargs={"dtype": "int4"},
    weight_qkwargs={"dtype": "int4"},
)
DATA = [images(3, seed=7), images(2, seed=8)]


pytestmark = pytest.mark.usefixtures("one_thread")


def mean_output(model: nn.Module, data: list[Tensor]) -> Tensor:
    return torch.cat([model(x) for x in data]).mean()


def by_hand(quantized: list[str]) -> nn.Module:
    """Only these quantizers are on."""
    net = calibrated(CONFIG)
    set_fake_quantize(net, "float")
    if quantized:
        set_fake_quantize(net, "validation", pattern=quantized)
    return net


@torch.no_grad()
def relative_error(net: nn.Module) -> float:
    want = torch.cat([tiny_net().eval()(x) for x in DATA]).double()
    have = torch.cat([net(x) for x in DATA]).double()
    return float((have - want).square().sum() / want.square().sum())


def test_numbers_are_those_of_models_with_one_switched_by_hand() -> None:
    found = sensitivity(calibrated(CONFIG), DATA)
    assert {row.name for row in found.rows} == set(ALL)
    assert found.floating == 0
    assert found.quantized == pytest.approx(relative_error(by_hand(ALL)), rel=1e-9)
    for row in found.rows:
        on = relative_error(by_hand([row.name]))
        off = relative_error(by_hand([name for name in ALL if name != row.name]))
        assert row.on == row.loss == pytest.approx(on, rel=1e-9), row.name
        assert row.off == pytest.approx(off, rel=1e-9), row.name
        assert row.gain == pytest.approx(found.quantized - off, rel=1e-6, abs=1e-12), row.name
    losses = [row.loss for row in found.rows]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)
    kinds = {row.name: row.of for row in found.rows}
    assert kinds == {
        name: "weight" if name in WEIGHTS else "input" if "input" in name else "output"
        for name in ALL
    }


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_an_own_metric(higher_is_better: bool) -> None:
    found = sensitivity(
        calibrated(CONFIG), DATA, mean_output, higher_is_better=higher_is_better, ways=["off", "on"]
    )
    with torch.no_grad():
        floating = float(mean_output(tiny_net().eval(), DATA))
        quantized = float(mean_output(by_hand(ALL), DATA))
    assert (found.floating, found.quantized) == (floating, quantized)
    sign = -1 if higher_is_better else 1
    for row in found.rows:
        assert row.loss == sign * (row.on - floating)
        assert row.gain == sign * (quantized - row.off)
    assert found.metric == "mean_output"
    assert found.ways == ("on", "off")


def test_one_way_and_a_pattern() -> None:
    seen: list[dict[str, FakeQuantState]] = []

    def look(model: nn.Module, data: None) -> float:
        assert data is None
        seen.append(torch_ext.fake_quantize_states(model))
        return float(len(seen))

    found = sensitivity(calibrated(CONFIG), None, look, ways="off", pattern="fc.*")
    on = [
        {name for name, state in states.items() if state.value == "validation"} for states in seen
    ]
    fc = [name for name in ALL if name.startswith("fc.")]
    assert on[:2] == [set(), set(ALL)]
    assert sorted(map(sorted, on[2:])) == sorted(sorted({*ALL} - {name}) for name in fc)
    assert [math.isnan(row.on) for row in found.rows] == [True, True]
    # higher is better: the third call gave 3, the fourth 4, and the quantized model 2
    assert [row.gain for row in found.rows] == [2, 1]
    assert str(found).splitlines()[1].split() == ["quantizer", "of", "all", "but", "it", "gain"]


def test_what_breaks_the_model_comes_first() -> None:
    values = iter([1.0, 1.0, 0.5, math.nan, 0.75])
    names = [
        "conv1.input_quantizers.input",
        "conv2.input_quantizers.input",
        "fc.input_quantizers.input",
    ]
    found = sensitivity(calibrated(CONFIG), None, lambda *_: next(values), ways="on", pattern=names)
    assert [row.loss for row in found.rows[1:]] == [0.5, 0.25]
    assert math.isnan(found.rows[0].loss)


@pytest.mark.parametrize("state", ["calibration", "qat", "validation", "float"])
def test_the_model_stays_as_it_was(state: str) -> None:
    net = calibrated(CONFIG).train()
    set_fake_quantize(net, state)
    before, random = snapshot(net), torch.get_rng_state()
    sensitivity(net, DATA, ways="on", pattern="fc.*")

    def fail(model: nn.Module, data: Any) -> float:
        torch.rand(3)
        if torch_ext.fake_quantize_states(model)["fc.input_quantizers.input"].value == "float":
            return 0.0
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sensitivity(net, DATA, fail)
    assert same(snapshot(net), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_quantizers_that_pass_through_are_left_out() -> None:
    net = prepared(CONFIG)
    set_fake_quantize(net, "calibration")
    net.conv1(images())
    set_fake_quantize(net, "validation", allow_unobserved=True)
    found = sensitivity(net, DATA, ways="on")
    assert {row.name for row in found.rows} == {"conv1.input_quantizers.input", *WEIGHTS}


def test_batches_of_other_kinds() -> None:
    def losses(data: Any, **keys: Any) -> dict[str, float]:
        rows = sensitivity(calibrated(CONFIG), data, ways="on", **keys).rows
        return {row.name: row.loss for row in rows}

    want = losses(DATA)
    pairs = [(x, torch.zeros(len(x))) for x in DATA]
    assert losses(pairs) == want
    own = [{"picture": x} for x in DATA]
    assert losses(own, forward=lambda model, batch: [model(batch["picture"]), 3]) == want


def test_text_and_picture(tmp_path: Path) -> None:
    values = iter([90.0, 88.0, 89.0, 90.0, 89.75, 88.5])
    found = sensitivity(calibrated(CONFIG), None, lambda *_: next(values), pattern="fc.*")
    assert str(found).splitlines() == [
        "<lambda>: float 90, quantized 88",
        "quantizer                     of      alone  loss   all but it  gain",
        "----------------------------  ------  -----  -----  ----------  ----",
        "fc.input_quantizers.input     input   89     +1     90          +2",
        "fc.parametrizations.weight.0  weight  89.75  +0.25  88.5        +0.5",
    ]
    found.save_picture(tmp_path / "all.svg")
    found.save_picture(tmp_path / "one.svg", most=1)
    space = "{http://www.w3.org/2000/svg}"
    bars = {}
    for name in ("all", "one"):
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        bars[name] = [float(r.attrib["width"]) for r in root.iter(f"{space}rect") if len(r)]
        assert "fc.input_quantizers.input" in {e.text for e in root.iter(f"{space}text")}
    assert [bar / bars["all"][0] for bar in bars["all"]] == pytest.approx(
        [1, 2, 0.25, 0.5], rel=0.01
    )
    assert len(bars["one"]) == 2
    for most in (0, 1.5, True):
        with pytest.raises(ValueError, match="expected most to be 1 or more"):
            found.save_picture(tmp_path / "none.svg", most=most)  # type: ignore[arg-type]


def test_a_bar_on_request_alone(capsys: pytest.CaptureFixture[str]) -> None:
    sensitivity(calibrated(CONFIG), DATA, pattern="fc.*")
    assert capsys.readouterr() == ("", "")
    sensitivity(calibrated(CONFIG), DATA, pattern="fc.*", progress=True)
    assert "4/4" in capsys.readouterr().err


class TestCheckpoints:
    def run(self, path: Path | None, fails_at: int = -1, data: Any = DATA) -> tuple[Any, int]:
        calls = 0

        def forward(model: nn.Module, batch: Tensor) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise InterruptedError
            return model(batch)

        found = sensitivity(calibrated(CONFIG), data, forward=forward, checkpoint=path)
        return found, calls

    def test_it_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "sensitivity.json"
        with pytest.raises(InterruptedError):
            self.run(path, fails_at=2 * 10 + 2)  # two batches each: nine evaluations are done
        found, calls = self.run(path)
        whole, all_calls = self.run(None)
        assert found == whole
        assert all_calls == 2 * (2 + 2 * len(ALL))
        assert calls == all_calls - 2 * 9
        assert not path.exists()

    def test_other_data_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "sensitivity.json"
        with pytest.raises(InterruptedError):
            self.run(path, fails_at=9)
        with pytest.raises(ValueError, match="expected the power of the float outputs to be"):
            self.run(path, data=[x * 1.5 for x in DATA])
        assert path.exists()


def drifting() -> Callable[..., Any]:
    """Gives one output fewer in the second run."""
    calls = iter(range(100))
    return lambda model, batch: [model(batch)] if next(calls) < 3 else []


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (
            {"data": iter(DATA)},
            TypeError,
            "that can be run over again, such as a list, got list_it",
        ),
        ({"data": 3}, TypeError, "sensitivity: expected data to be batches, got 3"),
        ({"data": []}, ValueError, "outputs to be finite and not all zero, got 0 tensors"),
        ({"data": [torch.full((1, 1, 8, 8), math.nan)]}, ValueError, "squares sum to nan"),
        ({"data": [()]}, ValueError, "batches to hold inputs"),
        ({"forward": drifting()}, ValueError, "the same batches each time it is run over"),
        ({"metric": "accuracy"}, TypeError, "metric to be a function or None, got 'accuracy'"),
        ({"metric": lambda *_: "good"}, TypeError, "metric of the float model to be a number"),
        ({"ways": "up"}, ValueError, "unknown way 'up'; known: on, off"),
        ({"ways": []}, ValueError, "ways to be on, off or both, got none"),
        ({"pattern": "x*"}, ValueError, 'no quantizer matches pattern "x*"'),
        ({"higher_is_better": "yes"}, TypeError, "to be True or False, got 'yes'"),
    ],
)
def test_bad_arguments_change_nothing(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    net = calibrated(CONFIG)
    before = snapshot(net)
    with pytest.raises(kind) as caught:
        sensitivity(net, **({"data": DATA} | arguments))
    assert text in str(caught.value)
    assert same(snapshot(net), before)


def test_models_that_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="sensitivity: expected model to have quantizers"):
        sensitivity(tiny_net(), DATA)
    with pytest.raises(RuntimeError, match="expected every quantizer to have a range"):
        sensitivity(prepared(CONFIG), DATA)
