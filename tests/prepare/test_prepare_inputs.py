"""Quantizers of a model's inputs, and what prepare_qat refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets.tiny_net import ACTIVATIONS, WEIGHTS, images, tiny_net
from prepare_steps import CONFIG, OTHER, names, ready, rule_of, run_calibration
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)
from torch_ext.prepare import attach

pytestmark = pytest.mark.usefixtures("one_thread")


class Inputs(nn.Module):
    def forward(
        self, x: Tensor, values: list[Tensor], count: int, *rest: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        out = x + sum(values) * count
        for one in rest:
            out = out + one
        return out if mask is None else out * mask


class TestInputs:
    def test_arguments_without_default_have_a_quantizer_each(self) -> None:
        net = ready(Inputs(), input_qconfig=CONFIG)
        inside = {n for n in names(net) if n.startswith("input")}
        assert inside == {"input_quantizers.x", "input_quantizers.values_", "input_quantizers.rest"}
        x = torch.ones(2)
        set_fake_quantize(net, "calibration")
        net(x, [x * 2, x * 3], 4, x * 5, x * 6, mask=x)
        extrema = {n: named_quantizers(net)[n].observer.extrema.tolist()[0] for n in inside}
        assert extrema == {
            "input_quantizers.x": [1.0, 1.0],
            "input_quantizers.values_": [2.0, 3.0],
            "input_quantizers.rest": [5.0, 6.0],
        }

    def test_keywords_and_integers(self) -> None:
        net = ready(Inputs(), input_qconfig=get_default_qconfig(
            activation_observer="fixed_scale", activation_qkwargs={"scale": 0.5}))  # fmt: skip
        set_fake_quantize(net, "validation", allow_unobserved=True)
        x = torch.tensor([0.7])
        assert net(values=[x], x=x, count=1).tolist() == [1.0]
        whole = torch.tensor([3])
        assert net(whole, [whole], 2).tolist() == [9]

    def test_by_default_layers_alone_read_quantized(self) -> None:
        assert names(ready(tiny_net())) == {*ACTIVATIONS, *WEIGHTS}
        assert names(ready(tiny_net(), input_qconfig=None)) == {*ACTIVATIONS, *WEIGHTS}

    def test_the_models_arguments_have_quantizers_beside_those_of_layers(self) -> None:
        net = ready(tiny_net(), input_qconfig=OTHER)
        assert names(net) == {*ACTIVATIONS, *WEIGHTS, "input_quantizers.x"}
        assert rule_of(net, "input_quantizers.x") == "percentile"
        assert rule_of(net, "conv1.input_quantizers.input") == "min_max"

    def test_a_first_step_that_is_a_layer_has_one_quantizer(self) -> None:
        net = ready(nn.Sequential(nn.Linear(2, 3)), input_qconfig=OTHER)
        assert names(net) == {"0.input_quantizers.input", "0.parametrizations.weight.0"}
        assert rule_of(net, "0.input_quantizers.input") == "percentile"
        run_calibration(net, torch.ones(5, 2))
        tally = named_quantizers(net)["0.input_quantizers.input"].observer.tally
        assert int(tally[0, 0]) == 10

    def test_a_sequential_is_neither_longer_nor_run_differently(self) -> None:
        plain = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 1))
        net = ready(copy.deepcopy(plain), input_qconfig=CONFIG)
        assert isinstance(net, nn.Sequential)
        assert "0.0.input_quantizers.input" in names(net)
        assert len(net) == 2
        assert len(net[0]) == 2
        x = torch.randn(5, 2)
        assert same_bits(net(x).detach(), plain(x).detach())
        run_calibration(net, x)
        assert same_bits(
            named_quantizers(net)["0.0.input_quantizers.input"].range[0],
            torch.stack(torch.aminmax(x)),
        )

    def test_graph_modules_and_their_copies(self) -> None:
        net = ready(torch.fx.symbolic_trace(tiny_net().eval()), input_qconfig=CONFIG)
        twin = copy.deepcopy(net)
        # Tracing goes through modules that are not torch's own, such as Add.
        layers = {name for name in ACTIVATIONS if not name.startswith("add")}
        assert names(net) == names(twin) == {*layers, *WEIGHTS, "input_quantizers.x"}
        before = {key: value.clone() for key, value in net.state_dict().items()}
        run_calibration(twin, images())
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert bool(named_quantizers(twin)["input_quantizers.x"].solved)
        run_calibration(net, images())
        assert same_bits(net(images()).detach(), twin(images()).detach())

    def test_a_forward_of_the_instance_is_refused(self) -> None:
        net = tiny_net()
        net.forward = lambda x: x  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="its forward is an attribute of the instance"):
            ready(net, input_qconfig=CONFIG)
        net = tiny_net()
        net.fc.forward = net.fc.forward  # type: ignore[method-assign]
        with pytest.raises(
            ValueError,
            match='the forward of "fc" to be a method that takes its input, got an attribute of',
        ):
            ready(net)
        assert "conv1.input_quantizers.input" in names(ready(net, mapping={"fc": None}))

    def test_a_layer_whose_forward_has_no_argument_for_its_input_is_refused(self) -> None:
        class Keywords(nn.Linear):
            def forward(self, **keys: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(keys["x"])

        net = nn.Sequential(nn.Linear(2, 2), Keywords(2, 2))
        with pytest.raises(ValueError, match=r'the forward of "1" .* got one without arguments'):
            ready(net)
        net[0] = nn.Linear(2, 2)
        assert ready(net, mapping={"1": None})

    def test_a_layer_with_a_forward_of_its_own_reads_its_first_argument(self) -> None:
        class Padded(nn.Conv1d):
            def forward(self, given: Tensor, left: int = 1) -> Tensor:  # type: ignore[override]
                return super().forward(nn.functional.pad(given, (left, 0)))

        net = ready(Padded(1, 1, 2))
        assert names(net) == {"input_quantizers.given", "parametrizations.weight.0"}
        set_fake_quantize(net, "calibration")
        net(torch.ones(1, 1, 4), left=2)
        net(given=torch.full((1, 1, 4), 3.0))
        extrema = named_quantizers(net)["input_quantizers.given"].observer.extrema
        assert extrema.tolist() == [[1.0, 3.0]]

    def test_containers_that_may_run_every_child_are_refused(self) -> None:
        class Own(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                for layer in self:
                    x = layer(x)
                return x

        act = nn.ReLU()
        for net in (Own(nn.Linear(2, 2)), nn.Sequential(act, nn.Linear(2, 2), act)):
            with pytest.raises(ValueError, match="cannot quantize the inputs, as") as caught:
                ready(net, input_qconfig=CONFIG)
            assert "QuantStub" in str(caught.value)
            assert ready(net)


def empty_linear() -> nn.Module:
    layer = nn.Linear(2, 1)
    layer.weight = nn.Parameter(torch.empty(0, 2))
    return layer


class Hostile:
    @staticmethod
    def plain_weight() -> nn.Module:
        layer = nn.Linear(2, 2)
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.weight = weight
        return layer

    @staticmethod
    def taken() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.input_quantizers = nn.Identity()
        return layer


class TestRefusals:
    @pytest.mark.parametrize(
        ("layer", "text"),
        [
            (nn.LazyLinear(2), "1.weight to be initialised, got a lazy one"),
            (nn.Embedding(3, 2, sparse=True), "1.weight to have dense gradients and no max_norm"),
            (nn.Embedding(3, 2, max_norm=1.0), "max_norm=1.0; give the module qconfig=None"),
            (Hostile.plain_weight(), "1.weight to be a parameter, got a plain attribute"),
            (empty_linear(), "1.weight to be floating and not empty"),
            (Hostile.taken(), "expected 1 to have no attribute input_quantizers, got a Identity"),
        ],
    )
    def test_modules_that_cannot_be_quantized(self, layer: nn.Module, text: str) -> None:
        net = nn.Sequential(nn.ReLU(), layer)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            ready(net, inplace=True)
        assert text in str(caught.value)
        assert not named_quantizers(net)
        net[0] = nn.Linear(2, 2)
        assert ready(net, mapping={"1": None})

    def test_twice(self) -> None:
        net = ready(tiny_net())
        with pytest.raises(ValueError, match=r'prepared already \("conv1\.input_quantizers"\)'):
            prepare_qat(net)

    def test_wrappers_scripts_and_others(self) -> None:
        with pytest.raises(ValueError, match="expected a plain model, got a DataParallel"):
            ready(nn.DataParallel(tiny_net()))
        with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got 3"):
            prepare_qat(3)  # type: ignore[type-var]
        with pytest.raises(ValueError, match="modules to quantize, found none"):
            ready(nn.Sequential(nn.Dropout(), nn.ReLU()))

    def test_a_failure_half_way_leaves_the_model_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attach_weight = attach.attach_weight

        def fail(module: nn.Module, parameter: str, quantizer: FakeQuantize) -> Any:
            if isinstance(module, nn.Linear):
                raise MemoryError
            return attach_weight(module, parameter, quantizer)

        monkeypatch.setattr(attach, "attach_weight", fail)
        net = tiny_net()
        keys, kinds = list(net.state_dict()), [type(m) for m in net.modules()]
        with pytest.raises(MemoryError):
            ready(net, inplace=True, output_qconfig=CONFIG)
        assert list(net.state_dict()) == keys
        assert [type(m) for m in net.modules()] == kinds
        assert not any(m._forward_hooks for m in net.modules())
