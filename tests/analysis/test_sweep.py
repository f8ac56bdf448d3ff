"""sweep: every combination is what a calibration with it gives, and the model stays as it was."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import calibrated, images, prepared, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import get_default_qconfig, set_fake_quantize, sweep

CANDIDATES = {
    "min_max": {},
    "percentile": {"percentile": [60.0, 90.0]},
    "clip": {"xmin": -0.5, "xmax": [0.5, 1.0]},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def config(rule: str = "percentile", weights: str = "min_max", **keys: Any) -> torch_ext.QConfig:
    return get_default_qconfig(
        activation_observer=rule, weight_observer=weights, activation_qkwargs=keys
    )


@torch.no_grad()
def error(model: nn.Module) -> Tensor:
    x = images(4, seed=7)
    want: Tensor = tiny_net().eval()(x)
    return (model(x) - want).square().mean()


class Counting:
    """A metric that notes its calls and may fail at one."""

    def __init__(self, fails_at: int = -1, metric: Callable[[nn.Module], Any] = error) -> None:
        self.calls = 0
        self.fails_at = fails_at
        self.metric = metric

    def __call__(self, model: nn.Module) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise InterruptedError
        return self.metric(model)


def test_rows_are_what_calibrating_with_each_pair_gives() -> None:
    net = calibrated(config(percentile=50.0))
    found = sweep(
        net,
        error,
        activation_observers=CANDIDATES,
        weight_observers=["min_max", "mse"],
        higher_is_better=False,
    )
    want = {}
    for weights in ("min_max", "mse"):
        for rule, options in (
            ("min_max", {}),
            ("percentile", {"percentile": 60.0}),
            ("percentile", {"percentile": 90.0}),
            ("clip", {"xmin": -0.5, "xmax": 0.5}),
            ("clip", {"xmin": -0.5, "xmax": 1.0}),
        ):
            net_of_it = calibrated(config(rule, weights, **options))
            want[rule, tuple(options.values()), weights] = float(error(net_of_it))
    have = {
        (
            row.activations.rule,
            tuple(row.activations.options.values()),
            row.weights.rule,
        ): row.metric
        for row in found.rows
        if row.activations is not None and row.weights is not None
    }
    assert have == want
    assert len(set(want.values())) > 8  # they do differ
    assert [row.metric for row in found.rows] == sorted(want.values())
    assert found.floating == 0
    assert found.as_it_is == float(error(calibrated(config(percentile=50.0))))


def test_options_that_are_not_given_have_their_defaults() -> None:
    """Whatever the model has, and whatever was tried before."""
    net = calibrated(config(percentile=50.0))
    rules = [{"percentile": [70.0]}, {}]
    first, second = (
        sweep(net, error, activation_observers={"percentile": one}).rows[0].metric for one in rules
    )
    assert second == float(error(calibrated(config(percentile=99.99)))) != first


def test_the_best_row_can_be_taken() -> None:
    net = calibrated(config())
    found = sweep(net, error, activation_observers=CANDIDATES, higher_is_better=False)
    assert found.best.activations is not None
    assert found.best.weights is None
    rule, options = found.best.activations.rule, found.best.activations.options
    found.apply(net)
    assert same_bits(net(images()).detach(), calibrated(config(rule, **options))(images()).detach())
    found.apply(net, found.rows[-1])
    assert float(error(net)) == found.rows[-1].metric


@pytest.mark.parametrize("state", ["calibration", "qat", "validation", "float"])
def test_the_model_stays_as_it_was(state: str) -> None:
    net = calibrated(config()).train()
    set_fake_quantize(net, state)
    before, random = snapshot(net), torch.get_rng_state()
    sweep(net, Counting(metric=lambda model: model(torch.randn(3, 1, 8, 8)).sum()))
    with pytest.raises(InterruptedError):
        sweep(net, Counting(fails_at=4))
    assert same(snapshot(net), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_every_evaluation_sees_the_same_random_numbers_eval_mode_and_no_gradients() -> None:
    seen = []

    def evaluate(model: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        seen.append(float(torch.rand(1)))
        return 0.0

    sweep(calibrated(config()).train(), evaluate, activation_observers=["mse", "kl"])
    assert len(seen) == 4
    assert len(set(seen)) == 1


def test_the_usual_rules_are_those_that_can_be_solved() -> None:
    def rules(net: nn.Module) -> set[str]:
        rows = sweep(net, lambda _: 0.0).rows
        return {row.activations.rule for row in rows if row.activations is not None}

    told = {"fixed_scale", "clip"}
    assert rules(calibrated(config())) == set(torch_ext.observers()) - told
    without = {
        name
        for name in torch_ext.observers()
        if torch_ext._C.observer_info(name)["statistic"] == "histogram"
    }
    assert rules(calibrated(config("min_max"))) == set(torch_ext.observers()) - told - without
    wide = rules(calibrated(config(dtype="int16")))
    assert not wide & {"kl", "mse", "mix", "aciq"}
    assert {"min_max", "percentile", "clip_std"} <= wide


def test_order_with_numbers_that_are_none() -> None:
    values = iter([1.0, 2.0, math.nan, 5.0, -math.inf, 7.0])
    found = sweep(
        calibrated(config()),
        lambda _: next(values),
        activation_observers={"percentile": {"percentile": [10.0, 20.0, 30.0, 40.0]}},
    )
    assert (found.floating, found.as_it_is) == (1.0, 2.0)
    order = [row.activations.options["percentile"] for row in found.rows if row.activations]
    assert order == [40.0, 20.0, 30.0, 10.0]


def test_a_pattern_limits_it() -> None:
    net = calibrated(config())
    found = sweep(net, error, activation_observers=["clip_std"], pattern="fc.*")
    want = calibrated(config())
    torch_ext.resolve(want, activation_observer="clip_std", pattern="fc.*")
    assert found.rows[0].metric == float(error(want))
    found.apply(net)
    assert same(snapshot(net), snapshot(want))


def test_text_and_picture(tmp_path: Path) -> None:
    values = iter([90.0, 88.0, 89.5, 80.0])
    found = sweep(
        calibrated(config()),
        lambda _: next(values),
        activation_observers={"percentile": {"percentile": [99.5]}, "min_max": {}},
    )
    assert str(found).splitlines() == [
        "activations       metric  to float",
        "----------------  ------  --------",
        "percentile(99.5)  89.5    -0.5",
        "min_max           80      -10",
        "as it is          88      -2",
        "float             90      +0",
    ]
    found.save_picture(tmp_path / "sweep.svg")
    root = ElementTree.parse(tmp_path / "sweep.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    words = [element.text for element in root.iter(f"{space}text")]
    assert {"percentile(99.5)", "min_max", "as it is", "89.5"} <= set(words)
    bars = [float(r.attrib["width"]) for r in root.iter(f"{space}rect") if len(r)]
    assert bars[1] / bars[0] == pytest.approx(20, rel=0.01)
    assert bars[2] / bars[0] == pytest.approx(4, rel=0.01)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        found.save_picture(tmp_path / "nowhere" / "sweep.svg")


def test_a_bar_on_request_alone(capsys: pytest.CaptureFixture[str]) -> None:
    sweep(calibrated(config()), error, activation_observers=["mse"])
    assert capsys.readouterr() == ("", "")
    sweep(calibrated(config()), error, activation_observers=["mse"], progress=True)
    assert "3/3" in capsys.readouterr().err


class TestCheckpoints:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """What an interruption at the fifth evaluation leaves."""
        path = tmp_path / "sweep.json"
        with pytest.raises(InterruptedError):
            self.run(Counting(fails_at=5), path)
        assert path.exists()
        return path

    def run(self, evaluate: Counting, path: Path | None, **keys: Any) -> torch_ext.Sweep:
        arguments = {"activation_observers": CANDIDATES, "checkpoint": path} | keys
        return sweep(calibrated(config()), evaluate, **arguments)

    def test_it_goes_on(self, path: Path) -> None:
        evaluate = Counting()
        assert self.run(evaluate, path) == self.run(Counting(), None)
        assert evaluate.calls == 1 + 3  # the float model again, and the three that were left
        assert not path.exists()

    def test_more_rules_may_be_asked_for(self, path: Path) -> None:
        evaluate = Counting()
        self.run(evaluate, path, activation_observers=[*CANDIDATES, "mse"])
        assert evaluate.calls == 1 + 3  # percentile and clip with their defaults, and mse

    def test_another_model_is_refused(self, path: Path) -> None:
        net = calibrated(config())
        with torch.no_grad():
            net.fc.bias += 1
        with pytest.raises(ValueError, match=r"sweep\.json: about: the file is of another model"):
            sweep(net, error, activation_observers=CANDIDATES, checkpoint=path)

    def test_another_metric_is_refused(self, path: Path) -> None:
        with pytest.raises(ValueError, match="expected the float model to be 0 as in the check"):
            self.run(Counting(metric=lambda model: error(model) + 1e-3), path)
        assert path.exists()

    @pytest.mark.parametrize(
        ("damage", "text"),
        [
            (lambda text: "", "content"),
            (lambda text: text[:-5], "content"),
            (lambda text: "[]", "expected an object"),
            (lambda text: text.replace('"sweep"', '"other"'), "kind: expected 'sweep'"),
            (lambda text: text.replace('"version": 1', '"version": 2'), "version: expected 1"),
            (lambda text: text.replace("{", '{"kind": 1,', 1), 'duplicate key "kind"'),
            (lambda text: text.replace('": "0.0"', '": "x"'), "could not convert"),
            (lambda text: text.replace('": "0.0"', '": 3'), "numbers as text, got 3"),
            (lambda text: json.dumps(json.loads(text) | {"values": 4}), "values: expected"),
            (lambda text: text + " " * 2**24, "at most 16777216 bytes"),
        ],
    )
    def test_damaged_files(self, path: Path, damage: Callable[[str], str], text: str) -> None:
        path.write_text(damage(path.read_text()))
        evaluate = Counting()
        with pytest.raises(ValueError, match=r"sweep\.json") as caught:
            self.run(evaluate, path)
        assert text in str(caught.value)
        assert evaluate.calls == 0


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"evaluate": 3}, TypeError, "evaluate to be a function of a model, got 3"),
        ({"evaluate": lambda _: "good"}, TypeError, "metric of the float model to be a number"),
        ({"evaluate": lambda _: None}, TypeError, "to be a number, got None"),
        ({"evaluate": lambda _: torch.zeros(2)}, TypeError, "to be a number, got a tensor"),
        ({"activation_observers": "kl"}, TypeError, "activation_observers to be names of rules"),
        ({"activation_observers": []}, ValueError, "names to options, got none"),
        ({"activation_observers": ["best"]}, ValueError, 'unknown observer "best"; known: min_'),
        ({"weight_observers": {"kl": 3}}, TypeError, "weight_observers['kl'] to be a mapping"),
        ({"weight_observers": {"clip": {"xmin": []}}}, ValueError, "to have a value, got an empty"),
        ({"activation_observers": {"kl": {"p": 1}}}, ValueError, 'unknown option "p"'),
        (
            {"activation_observers": {"mse": {}, "percentile": {"percentile": [9.0, 101.0]}}},
            ValueError,
            "percentile to be between",
        ),
        ({"activation_observers": {"clip": {"xmin": 3.0}}}, RuntimeError, "sweep: activation_obs"),
        ({"pattern": "x*"}, ValueError, 'no quantizer matches pattern "x*"'),
        ({"higher_is_better": 1}, TypeError, "higher_is_better to be True or False, got 1"),
    ],
)
def test_bad_arguments_change_nothing(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    net = calibrated(config())
    before, evaluate = snapshot(net), Counting()
    with pytest.raises(kind) as caught:
        sweep(net, **({"evaluate": evaluate} | arguments))
    assert text in str(caught.value)
    assert evaluate.calls == 0
    assert same(snapshot(net), before)


def test_models_that_cannot_be_swept() -> None:
    with pytest.raises(ValueError, match="sweep: expected model to have quantizers, got none"):
        sweep(tiny_net(), error)
    with pytest.raises(RuntimeError, match="expected every quantizer to have a range"):
        sweep(prepared(config()), error)
    with pytest.raises(ValueError, match="mse reads a histogram, but none was kept"):
        sweep(calibrated(config("min_max")), error, activation_observers=["mse"])


def test_dynamic_activations_have_no_rules_to_sweep() -> None:
    """Only their weights have; and the error names the function that was called."""
    net: nn.Module = tiny_net().eval()
    net.qconfig = get_default_qconfig(activation_qkwargs={"dynamic": True})  # type: ignore[assignment]
    net = torch_ext.prepare_qat(net)
    set_fake_quantize(net, "validation")
    with pytest.raises(ValueError, match=r"^sweep: activation_observers: expected quantizers that"):
        sweep(net, error, progress=False)
    result = sweep(net, error, weight_observers=["min_max", "mse"], progress=False)
    assert [row.activations for row in result.rows] == [None, None]
