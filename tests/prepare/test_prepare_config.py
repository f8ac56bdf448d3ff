"""Which configuration a module gets, and modules and tensors that are shared."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from nets.tiny_net import ACTIVATIONS, WEIGHTS, tiny_net
from prepare_steps import CONFIG, OTHER, names, ready, rule_of, run_calibration
from torch_ext import (
    FakeQuantize,
    QConfig,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class TestConfiguration:
    """attribute > name > type > parent, as in torch."""

    def test_attributes_of_submodules(self) -> None:
        net = tiny_net()
        net.qconfig = CONFIG  # type: ignore[assignment]
        net.fc.qconfig = OTHER  # type: ignore[assignment]
        net.conv2.qconfig = None  # type: ignore[assignment]
        made = prepare_qat(net)
        assert rule_of(made, "fc.input_quantizers.input") == "percentile"
        assert rule_of(made, "conv1.input_quantizers.input") == "min_max"
        assert names(made) == {*ACTIVATIONS, *WEIGHTS} - {ACTIVATIONS[1], WEIGHTS[1]}

    def test_a_submodule_alone(self) -> None:
        net = tiny_net()
        net.fc.qconfig = CONFIG  # type: ignore[assignment]
        assert names(prepare_qat(net)) == {ACTIVATIONS[4], WEIGHTS[2]}

    def test_precedence(self) -> None:
        net = nn.ModuleDict(
            {"a": nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), "b": nn.Linear(2, 2)}
        )
        kinds = {
            rule: get_default_qconfig(activation_observer=rule)
            for rule in ("min_max", "percentile", "kl", "mse", "mix")
        }
        net.qconfig = kinds["min_max"]  # type: ignore[assignment]
        net["b"].qconfig = kinds["mix"]  # type: ignore[assignment]
        made = prepare_qat(
            net,
            mapping={
                "a.0": kinds["percentile"],
                "b": kinds["percentile"],
                nn.Linear: kinds["kl"],
                nn.Sequential: kinds["mse"],
            },
        )
        assert rule_of(made, "a.0.input_quantizers.input") == "percentile"  # name before type
        assert rule_of(made, "a.1.input_quantizers.input") == "mse"  # the parent's, by type
        assert rule_of(made, "b.input_quantizers.input") == "mix"  # its own attribute first

    def test_types_beat_an_inherited_none(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        net.qconfig = None  # type: ignore[assignment]
        made = prepare_qat(net, mapping={nn.Linear: CONFIG})
        assert names(made) == {"0.input_quantizers.input", "0.parametrizations.weight.0"}

    def test_activations_stay_float_even_if_they_are_mapped(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        for keys in ({}, {"example_inputs": torch.randn(3, 2)}):
            made = ready(net, mapping={nn.ReLU: CONFIG, "1": CONFIG}, **keys)
            assert names(made) == {"0.input_quantizers.input", "0.parametrizations.weight.0"}

    def test_exact_names_beat_patterns_and_the_empty_name_is_the_model(self) -> None:
        made = prepare_qat(tiny_net(), mapping={"": CONFIG, "conv*": None, "conv1": OTHER})
        assert names(made) == {*ACTIVATIONS, *WEIGHTS} - {ACTIVATIONS[1], WEIGHTS[1]}
        assert rule_of(made, ACTIVATIONS[0]) == "percentile"

    def test_other_kinds_are_quantized_where_mapped(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Dropout())
        net.qconfig = CONFIG  # type: ignore[assignment]
        made = prepare_qat(net, mapping={"2": CONFIG, nn.Dropout: OTHER})
        assert {"2.activation_quantizer", "3.activation_quantizer"} <= names(made)
        assert "1.activation_quantizer" not in names(made)

    def test_sides_can_stay_float(self) -> None:
        weights = get_default_qconfig(activation_fake_quant=None)
        assert names(ready(tiny_net(), weights)) == set(WEIGHTS)
        outputs = get_default_qconfig(weight_fake_quant=None)
        assert names(ready(tiny_net(), outputs)) == set(ACTIVATIONS)

    def test_own_factories(self) -> None:
        config = QConfig(
            activation=functools.partial(FakeQuantize, observer="mse"),
            weight=functools.partial(FakeQuantize, qscheme=torch.per_channel_symmetric, ch_axis=0),
        )
        made = ready(tiny_net(), config)
        quantizers = named_quantizers(made)
        assert quantizers[WEIGHTS[0]].transient
        assert quantizers[WEIGHTS[0]].observer.channel_len == 4
        assert quantizers[ACTIVATIONS[0]].observer.name == "mse"

    @pytest.mark.parametrize(
        ("mapping", "kind", "text"),
        [
            ({"fcc": CONFIG}, ValueError, 'no module is named "fcc" as in mapping; known: fc'),
            ({"head.*": None}, ValueError, 'no module is named "head.*"'),
            ({3: CONFIG}, TypeError, "names or module types, got 3"),
            ({int: CONFIG}, TypeError, "names or module types, got <class 'int'>"),
            (
                {"fc": "int8"},
                TypeError,
                "mapping['fc'] to be a torch_ext.QConfig or None, got 'int8'",
            ),
            ([("fc", CONFIG)], TypeError, "mapping to be a mapping"),
        ],
    )
    def test_bad_mappings(self, mapping: Any, kind: type[Exception], text: str) -> None:
        net = tiny_net()
        net.qconfig = CONFIG  # type: ignore[assignment]
        with pytest.raises(kind) as caught:
            prepare_qat(net, inplace=True, mapping=mapping)
        assert text in str(caught.value)
        assert not named_quantizers(net)

    def test_bad_attributes_and_none_at_all(self) -> None:
        net = tiny_net()
        with pytest.raises(ValueError, match="expected a qconfig on the model, on a submodule"):
            prepare_qat(net)
        net.fc.qconfig = FakeQuantize  # type: ignore[assignment]
        with pytest.raises(TypeError, match=r"fc\.qconfig to be a torch_ext\.QConfig or None"):
            prepare_qat(net)
        with pytest.raises(TypeError, match="input_qconfig to be a QConfig or None, got 'x'"):
            ready(tiny_net(), input_qconfig="x")

    def test_activation_factories_need_no_arguments(self) -> None:
        config = QConfig(activation=lambda: FakeQuantize(observer="kl"), weight=None)
        made = ready(tiny_net(), config)
        assert {rule_of(made, name) for name in names(made)} == {"kl"}
        optional = {name for name, q in named_quantizers(made).items() if q.optional}
        assert optional == {"add.input_quantizers.a", "add.input_quantizers.b"}

    def test_factories_that_make_something_else(self) -> None:
        one = FakeQuantize()
        config = QConfig(activation=lambda: one, weight=None)
        with pytest.raises(ValueError, match="to make a new quantizer at each call"):
            ready(tiny_net(), config)
        config = QConfig(activation=lambda **_: nn.Identity(), weight=None)
        with pytest.raises(
            TypeError, match="the factory to make a FakeQuantize, got a module Identity"
        ):
            ready(tiny_net(), config)
        config = QConfig(activation=None, weight=lambda: FakeQuantize())
        with pytest.raises(TypeError, match=r"conv1\.weight.*unexpected keyword"):
            ready(tiny_net(), config)


class TestSharing:
    def test_one_module_at_two_places_has_one_quantizer(self) -> None:
        layer = nn.Linear(2, 2)
        net = ready(nn.Sequential(nn.Linear(2, 2), layer, nn.ReLU(), layer))
        assert {n for n in names(net) if "input" in n} == {
            f"{i}.input_quantizers.input" for i in range(2)
        }
        run_calibration(net, torch.randn(4, 2))
        assert int(named_quantizers(net)["1.input_quantizers.input"].observer.tally[0, 0]) == 16

    def test_one_module_with_two_configurations_is_refused(self) -> None:
        layer = nn.Linear(2, 2)
        net = nn.Sequential(layer, nn.Linear(2, 2), layer)
        with pytest.raises(ValueError, match='"0" and "2" are one module'):
            prepare_qat(net, mapping={"": CONFIG, "2": None})

    def test_two_configurations_are_no_conflict_where_nothing_is_quantized(self) -> None:
        x = torch.randn(4, 2)
        for shared in (nn.SiLU(), nn.Dropout(), nn.Flatten()):
            net = nn.Sequential(shared, nn.Linear(2, 2), shared).eval()
            for mapping in ({}, {nn.SiLU: CONFIG}):
                made = prepare_qat(net, mapping={"": CONFIG, "2": None, **mapping})
                assert "1.parametrizations.weight.0" in names(made)
                assert torch.equal(made(x), net(x))
        net = nn.Sequential(shared := nn.SiLU(), nn.Linear(2, 2), shared).eval()
        made = prepare_qat(net, mapping={"": CONFIG, "2": None}, example_inputs=x)
        assert torch.equal(made(x), net(x))
        layer = nn.Linear(2, 2)
        for shared in (layer, nn.AvgPool1d(1)):
            net = nn.Sequential(shared, nn.Linear(2, 2), shared)
            with pytest.raises(ValueError, match='"0" and "2" are one module'):
                prepare_qat(net, mapping={"": CONFIG, "2": None}, example_inputs=x)
        net = nn.Sequential(norm := nn.BatchNorm1d(2), nn.Linear(2, 2), norm)
        with pytest.raises(ValueError, match='"0" and "2" are one module'):  # its output
            prepare_qat(net, mapping={"": CONFIG, "0": CONFIG, "2": None})

        class Scaled(nn.SiLU):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * super().forward(x)  # whose operands an example shows

        net = nn.Sequential(own := Scaled(), nn.Linear(2, 2), own)
        with pytest.raises(ValueError, match='"0" and "2" are one module'):
            prepare_qat(net, mapping={"": CONFIG, "2": None}, example_inputs=x)

    @pytest.mark.parametrize("quantize_both", [True, False])
    def test_tied_weights_stay_one_parameter(self, quantize_both: bool) -> None:
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        net[1].weight = net[0].weight
        mapping = {} if quantize_both else {"1": None}
        made = ready(net, mapping=mapping)
        one = made.get_submodule("0").parametrizations.weight.original  # type: ignore[union-attr]
        other = made.get_submodule("1")
        two = other.parametrizations.weight.original if quantize_both else other.weight  # type: ignore
        assert one is two
        assert len(list(made.parameters())) == 1
        set_fake_quantize(made, "qat")
        made(torch.tensor([1, 2])).sum().backward()
        assert one.grad is not None  # type: ignore[union-attr]
        assert torch.count_nonzero(one.grad) > 0  # type: ignore[union-attr]

    def test_hooks_stay_in_their_order(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2))
        seen: list[str] = []
        net[0].register_forward_hook(lambda m, a, out: seen.append("early"))
        net[0].register_forward_pre_hook(lambda m, a: seen.append("pre") or a[0] * 100)
        made = ready(net)
        made[0].register_forward_hook(lambda m, a, out: seen.append("late"))  # type: ignore[index]
        set_fake_quantize(made, "calibration")
        made(torch.randn(3, 2))
        assert seen == ["pre", "early", "late"]
        observer = named_quantizers(made)["0.input_quantizers.input"].observer
        assert float(observer.extrema.abs().max()) > 10  # what the hook before the call returned

    def test_gradients_and_optimizers_keep_the_parameters(self) -> None:
        net = tiny_net()
        net.fc.weight.requires_grad_(False)
        parameters = dict(net.named_parameters())
        net.qconfig = CONFIG  # type: ignore[assignment]
        prepare_qat(net, inplace=True)
        assert net.conv1.parametrizations.weight.original is parameters["conv1.weight"]
        assert not net.fc.parametrizations.weight.original.requires_grad
        assert len(list(net.parameters())) == len(parameters)
