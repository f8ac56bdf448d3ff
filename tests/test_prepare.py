"""prepare_qat: what is quantized, under which names and configuration, and what stays."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from nets import ACTIVATIONS, WEIGHTS, TinyNet, images, same_bits, tiny_net
from torch_ext import FakeQuantize, QConfig, get_default_qconfig, prepare_qat, set_fake_quantize
from torch_ext._walk import named_quantizers


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


CONFIG = get_default_qconfig()
OTHER = get_default_qconfig(activation_observer="percentile", weight_qkwargs={"dtype": "int4"})


def names(model: nn.Module) -> set[str]:
    return set(named_quantizers(model))


def ready(model: nn.Module, config: QConfig | None = CONFIG, **keys: Any) -> nn.Module:
    model.qconfig = config  # type: ignore[assignment]
    return prepare_qat(model, **keys)


def rule_of(model: nn.Module, name: str) -> str:
    quantizer = model.get_submodule(name)
    assert isinstance(quantizer, FakeQuantize)
    return quantizer.observer.name


def run_calibration(model: nn.Module, *inputs: Any) -> None:
    set_fake_quantize(model, "calibration")
    with torch.no_grad():
        model(*inputs)
    set_fake_quantize(model, "validation")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_prepared_model_computes_what_it_did(training: bool, dtype: torch.dtype) -> None:
    plain = tiny_net().to(dtype).train(training)
    plain.dropout.train(not training)
    modes = {name: module.training for name, module in plain.named_modules()}
    net = ready(copy.deepcopy(plain))
    x = images().to(dtype)
    outs = []
    for model in (plain, net):
        torch.manual_seed(7)
        outs.append(model(x))
    assert same_bits(outs[0].detach().double(), outs[1].detach().double())
    assert outs[1].dtype == dtype
    assert names(net) == {*ACTIVATIONS, *WEIGHTS}
    for name, module in net.named_modules():
        host = name.partition(".parametrizations")[0].removesuffix(".activation_quantizer")
        host = host.removesuffix(".observer").removesuffix(".activation_quantizer")
        host = "" if host.startswith("input_quantizers") else host
        assert module.training == modes[host], name
    weight = net.get_parameter("conv1.parametrizations.weight.original")
    assert weight.dtype == dtype
    assert net.get_buffer("fc.activation_quantizer.scale").dtype == torch.float32


def test_the_model_itself_stays_unless_inplace() -> None:
    plain = tiny_net()
    net = ready(plain)
    assert net is not plain
    assert "QuantizedTinyNet" not in repr(plain)
    assert not any(isinstance(m, FakeQuantize) for m in plain.modules())
    assert prepare_qat(plain, inplace=True) is plain
    assert names(plain) == names(net)


LAYERS: list[tuple[nn.Module, tuple[int, ...], dict[str, tuple[int, ...]], bool]] = [
    (nn.Conv1d(4, 6, 3), (2, 4, 8), {"weight": (0, 6)}, True),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), {"weight": (0, 6)}, True),
    (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5), {"weight": (0, 6)}, True),
    (nn.ConvTranspose1d(4, 6, 3), (2, 4, 8), {"weight": (1, 6)}, True),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 8, 8), {"weight": (1, 3)}, True),
    (nn.ConvTranspose3d(4, 6, 3), (2, 4, 5, 5, 5), {"weight": (1, 6)}, True),
    (nn.Linear(4, 6), (2, 4), {"weight": (0, 6)}, True),
    *[(cls(), (2, 4), {}, True) for cls in (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish)],
    *[(cls(), (2, 4), {}, True) for cls in (nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)],
    *[(cls(), (2, 4), {}, True) for cls in (nn.PReLU, nn.LeakyReLU, nn.ELU, nn.Softplus)],
    (nn.Softmax(-1), (2, 4), {}, True),
    (nn.GLU(), (2, 4), {}, True),
    (torch_ext.QuantStub(), (2, 4), {}, True),
    *[(m, (2, 4), {}, False) for m in (nn.Dropout(), nn.Identity(), nn.LogSoftmax(-1))],
    (nn.BatchNorm1d(4), (2, 4), {}, False),
]


@pytest.mark.parametrize(
    ("layer", "shape", "weights", "output"), LAYERS, ids=[type(row[0]).__name__ for row in LAYERS]
)
def test_what_is_quantized_of_each_layer(
    layer: nn.Module, shape: tuple[int, ...], weights: dict[str, tuple[int, int]], output: bool
) -> None:
    net = ready(nn.Sequential(nn.ReLU(), copy.deepcopy(layer)), input_qconfig=None)
    want = {"0.activation_quantizer"} | ({"1.activation_quantizer"} if output else set())
    want |= {f"1.parametrizations.{name}.0" for name in weights}
    assert names(net) == want
    for name, (axis, count) in weights.items():
        observer = named_quantizers(net)[f"1.parametrizations.{name}.0"].observer
        assert (observer.ch_axis, observer.channel_len) == (axis, count)
    run_calibration(net, torch.randn(shape))
    assert isinstance(net, nn.Sequential)
    out = net(torch.randn(shape))
    if output:
        scale = named_quantizers(net)["1.activation_quantizer"].scale
        assert torch.equal((out / scale).round() * scale, out)


def test_embeddings_have_quantized_weights_only() -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        net = ready(nn.Sequential(kind(10, 4), nn.Linear(4, 2)), input_qconfig=None)
        assert names(net) == {
            "0.parametrizations.weight.0",
            "1.parametrizations.weight.0",
            "1.activation_quantizer",
        }
        run_calibration(net, torch.tensor([[1, 2], [3, 9]]))


class Operators(nn.Module):
    """One module per operation."""

    def __init__(self) -> None:
        super().__init__()
        self.add, self.mul = torch_ext.Add(), torch_ext.Mul()
        self.cat, self.matmul = torch_ext.Cat(1), torch_ext.MatMul()
        self.stub = torch_ext.QuantStub()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        joined = self.cat([self.add(a, b), self.mul(a, 2.0)])
        out: Tensor = self.stub(self.matmul(joined, joined.T).mean(1))
        return out


def test_operations_as_modules_compute_and_are_quantized() -> None:
    plain = Operators()
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    joined = torch.cat([a + b, a * 2], 1)
    assert torch.equal(plain(a, b), (joined @ joined.T).mean(1))
    net = ready(plain)
    assert names(net) == {
        *(f"{name}.activation_quantizer" for name in ("add", "mul", "cat", "matmul", "stub")),
        "input_quantizers.a",
        "input_quantizers.b",
    }
    run_calibration(net, a, b)


def test_torch_ao_modules() -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    stubs = pytest.importorskip("torch.ao.quantization")

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.ops = stubs.QuantStub(), quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            out: Tensor = self.ops.add(x, x)
            return out

    net = ready(Old(), input_qconfig=None)
    assert names(net) == {"quant.activation_quantizer", "ops.activation_post_process"}
    run_calibration(net, torch.randn(5))


def test_attention_and_transformers_see_data_in_their_fast_paths() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = ready(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    found = names(net)
    assert "layers.1.self_attn.parametrizations.in_proj_weight.0" in found
    assert "layers.1.self_attn.out_proj.parametrizations.weight.0" in found
    assert "layers.1.self_attn.activation_quantizer" in found
    assert "layers.1.self_attn.out_proj.activation_quantizer" not in found
    x = torch.randn(3, 5, 8)
    run_calibration(net, x)
    with torch.no_grad():
        out = net(x)
    set_fake_quantize(net, "float")
    assert 0 < float((out - net(x)).detach().abs().max()) < 0.5


class TestConfiguration:
    """attribute > name > type > parent, as in torch."""

    def test_attributes_of_submodules(self) -> None:
        net = tiny_net()
        net.qconfig = CONFIG  # type: ignore[assignment]
        net.fc.qconfig = OTHER  # type: ignore[assignment]
        net.conv2.qconfig = None  # type: ignore[assignment]
        made = prepare_qat(net)
        assert rule_of(made, "fc.activation_quantizer") == "percentile"
        assert rule_of(made, "conv1.activation_quantizer") == "min_max"
        assert names(made) == {*ACTIVATIONS, *WEIGHTS} - {ACTIVATIONS[2], WEIGHTS[1]}

    def test_a_submodule_alone(self) -> None:
        net = tiny_net()
        net.fc.qconfig = CONFIG  # type: ignore[assignment]
        assert names(prepare_qat(net)) == {ACTIVATIONS[4], WEIGHTS[2]}

    def test_precedence(self) -> None:
        net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "b": nn.Linear(2, 2)})
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
            input_qconfig=None,
        )
        assert rule_of(made, "a.0.activation_quantizer") == "percentile"  # name before type
        assert rule_of(made, "a.1.activation_quantizer") == "mse"  # the parent's, by type
        assert rule_of(made, "b.activation_quantizer") == "mix"  # its own attribute first

    def test_types_beat_an_inherited_none(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        net.qconfig = None  # type: ignore[assignment]
        made = prepare_qat(net, mapping={nn.ReLU: CONFIG})
        assert names(made) == {"1.activation_quantizer"}

    def test_exact_names_beat_patterns_and_the_empty_name_is_the_model(self) -> None:
        made = prepare_qat(tiny_net(), mapping={"": CONFIG, "conv*": None, "conv1": OTHER})
        assert names(made) == {*ACTIVATIONS, *WEIGHTS} - {ACTIVATIONS[2], WEIGHTS[1]}
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
            ({"fc": "int8"}, TypeError, "mapping['fc'] to be a QConfig or None, got 'int8'"),
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
        with pytest.raises(TypeError, match=r"fc\.qconfig to be a QConfig or None"):
            prepare_qat(net)
        with pytest.raises(TypeError, match="input_qconfig to be a QConfig or None, got 'x'"):
            ready(tiny_net(), input_qconfig="x")

    def test_activation_factories_need_no_arguments(self) -> None:
        config = QConfig(activation=lambda: FakeQuantize(observer="kl"), weight=None)
        made = ready(tiny_net(), config)
        assert {rule_of(made, name) for name in names(made)} == {"kl"}
        assert named_quantizers(made)["input_quantizers.x"].optional

    def test_factories_that_make_something_else(self) -> None:
        one = FakeQuantize()
        config = QConfig(activation=lambda: one, weight=None)
        with pytest.raises(ValueError, match="to make a new quantizer at each call"):
            ready(tiny_net(), config)
        config = QConfig(activation=lambda **_: nn.Identity(), weight=None)
        with pytest.raises(TypeError, match="the factory to make a FakeQuantize, got Identity"):
            ready(tiny_net(), config)
        config = QConfig(activation=None, weight=lambda: FakeQuantize())
        with pytest.raises(TypeError, match=r"conv1\.weight.*unexpected keyword"):
            ready(tiny_net(), config)


class TestSharing:
    def test_one_module_at_two_places_has_one_quantizer(self) -> None:
        act = nn.ReLU()
        net = ready(nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act))
        assert {n for n in names(net) if "activation" in n} == {
            f"{i}.activation_quantizer" for i in range(3)
        }
        run_calibration(net, torch.randn(4, 2))
        assert int(named_quantizers(net)["1.activation_quantizer"].observer.tally[0, 0]) == 16

    def test_one_module_with_two_configurations_is_refused(self) -> None:
        act = nn.ReLU()
        net = nn.Sequential(act, nn.Linear(2, 2), act)
        with pytest.raises(ValueError, match='"0" and "2" are one module'):
            prepare_qat(net, mapping={"": CONFIG, "2": None})

    @pytest.mark.parametrize("quantize_both", [True, False])
    def test_tied_weights_stay_one_parameter(self, quantize_both: bool) -> None:
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        net[1].weight = net[0].weight
        mapping = {} if quantize_both else {"1": None}
        made = ready(net, mapping=mapping, input_qconfig=None)
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
        net[0].register_forward_hook(lambda m, a, out: seen.append("early") or out * 100)
        net[0].register_forward_pre_hook(lambda m, a: seen.append("pre"))
        made = ready(net)
        made[0].register_forward_hook(lambda m, a, out: seen.append("late"))  # type: ignore[index]
        set_fake_quantize(made, "calibration")
        made(torch.randn(3, 2))
        assert seen == ["pre", "early", "late"]
        observer = named_quantizers(made)["0.activation_quantizer"].observer
        assert float(observer.extrema.abs().max()) > 10  # what the earlier hook returned

    def test_gradients_and_optimizers_keep_the_parameters(self) -> None:
        net = tiny_net()
        net.fc.weight.requires_grad_(False)
        parameters = dict(net.named_parameters())
        net.qconfig = CONFIG  # type: ignore[assignment]
        prepare_qat(net, inplace=True)
        assert net.conv1.parametrizations.weight.original is parameters["conv1.weight"]
        assert not net.fc.parametrizations.weight.original.requires_grad
        assert len(list(net.parameters())) == len(parameters)


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
        net = ready(Inputs(), mapping={Inputs: CONFIG})
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

    def test_input_qconfig_none(self) -> None:
        assert not any("input" in n for n in names(ready(tiny_net(), input_qconfig=None)))

    def test_a_sequential_is_neither_longer_nor_run_differently(self) -> None:
        plain = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 1))
        net = ready(copy.deepcopy(plain))
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
        net = ready(torch.fx.symbolic_trace(tiny_net().eval()))
        twin = copy.deepcopy(net)
        # Tracing goes through modules that are not torch's own, such as Add.
        assert names(net) == names(twin) == {*ACTIVATIONS, *WEIGHTS} - {"add.activation_quantizer"}
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
            ready(net)

    def test_containers_that_may_run_every_child_are_refused(self) -> None:
        class Own(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                for layer in self:
                    x = layer(x)
                return x

        act = nn.ReLU()
        for net in (Own(nn.Linear(2, 2)), nn.Sequential(act, nn.Linear(2, 2), act)):
            with pytest.raises(ValueError, match="cannot quantize the inputs, as") as caught:
                ready(net)
            assert "QuantStub" in str(caught.value)
            assert ready(net, input_qconfig=None)


def empty_linear() -> nn.Module:
    layer = nn.Linear(2, 1)
    layer.weight = nn.Parameter(torch.empty(0, 2))
    return layer


class Hostile:
    @staticmethod
    def weight_norm() -> nn.Module:
        layer = nn.Linear(2, 2)
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.weight = weight  # as the hook-based weight norm leaves it
        return layer

    @staticmethod
    def taken() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.activation_quantizer = nn.Identity()
        return layer


class TestRefusals:
    @pytest.mark.parametrize(
        ("layer", "text"),
        [
            (nn.LazyLinear(2), "1.weight to be initialised, got a lazy one"),
            (nn.Embedding(3, 2, sparse=True), "1.weight to have dense gradients and no max_norm"),
            (nn.Embedding(3, 2, max_norm=1.0), "max_norm=1.0; give the module qconfig=None"),
            (Hostile.weight_norm(), "1.weight to be a parameter, got a Tensor"),
            (empty_linear(), "1.weight to be floating and not empty"),
            (Hostile.taken(), '"1" to have no attribute activation_quantizer, got a Identity'),
        ],
    )
    def test_modules_that_cannot_be_quantized(self, layer: nn.Module, text: str) -> None:
        net = nn.Sequential(nn.ReLU(), layer)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            ready(net, inplace=True)
        assert text in str(caught.value)
        assert not named_quantizers(net)
        assert ready(net, mapping={"1": None})

    def test_twice(self) -> None:
        net = ready(tiny_net())
        with pytest.raises(ValueError, match='prepared already \\("input_quantizers"\\)'):
            prepare_qat(net)

    def test_wrappers_scripts_and_others(self) -> None:
        with pytest.raises(ValueError, match="expected a plain model, got a DataParallel"):
            ready(nn.DataParallel(tiny_net()))
        with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got 3"):
            prepare_qat(3)  # type: ignore[type-var]
        with pytest.raises(ValueError, match="modules to quantize, found none"):
            ready(nn.Sequential(nn.Dropout()), input_qconfig=None)

    def test_a_failure_half_way_leaves_the_model_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch_ext import _attach

        def fail(module: nn.Module, quantizer: FakeQuantize) -> Any:
            if isinstance(module, nn.Linear):
                raise MemoryError
            return attach(module, quantizer)

        attach = _attach.attach_output
        monkeypatch.setattr(_attach, "attach_output", fail)
        net = tiny_net()
        keys, kinds = list(net.state_dict()), [type(m) for m in net.modules()]
        with pytest.raises(MemoryError):
            ready(net, inplace=True)
        assert list(net.state_dict()) == keys
        assert [type(m) for m in net.modules()] == kinds
        assert not any(m._forward_hooks for m in net.modules())


def test_another_parametrization_comes_first() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    made = ready(net)
    run_calibration(made, torch.randn(4, 3))
    quantizer = named_quantizers(made)["0.parametrizations.weight.1"]
    assert isinstance(made, nn.Sequential)
    chain = made[0].parametrizations.weight
    weight = chain[0](chain.original0, chain.original1)
    assert torch.allclose(quantizer.range[:, 1], weight.amax(1))


def test_the_meta_device() -> None:
    with torch.device("meta"):
        net = TinyNet()
    net.qconfig = CONFIG  # type: ignore[assignment]
    made = prepare_qat(net)
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"meta"}


def test_names_are_the_same_for_every_configuration() -> None:
    assert names(ready(tiny_net(), CONFIG)) == names(ready(tiny_net(), OTHER))


def test_whole_models_and_pickle() -> None:
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(ready(tiny_net()))
    outputs = ready(tiny_net(), get_default_qconfig(weight_fake_quant=None)).eval()
    loaded = pickle.loads(pickle.dumps(outputs))
    run_calibration(loaded, images())
    assert names(loaded) == set(ACTIVATIONS)


def test_deep_copies_are_apart() -> None:
    net = ready(tiny_net()).eval()
    twin = copy.deepcopy(net)
    run_calibration(twin, images())
    assert isinstance(twin, TinyNet)
    assert all(not bool(q.solved) for q in named_quantizers(net).values())
    assert same_bits(net(images()).detach(), tiny_net().eval()(images()).detach())


def test_float_checkpoints_load_by_their_own_keys() -> None:
    source, net = tiny_net(seed=8), ready(tiny_net()).eval()
    torch_ext.load_float_state_dict(net, source.state_dict())
    assert same_bits(net(images()).detach(), source.eval()(images()).detach())
    back = torch_ext.float_state_dict(net)
    assert back.keys() == source.state_dict().keys()
    for key, value in source.state_dict().items():
        assert torch.equal(back[key], value)


def test_other_checkpoints_are_refused_whole() -> None:
    net = ready(tiny_net())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = tiny_net(seed=8).state_dict()
    cases = [
        ({k: v for k, v in state.items() if k != "fc.weight"}, True, "missing: fc.weight"),
        (state | {"head": torch.ones(1)}, True, "unexpected: head"),
        (state | {"fc.weight": torch.ones(3, 5)}, False, "of shape [3, 4], got [3, 5]"),
        (state | {"fc.weight": 3}, False, "of shape [3, 4], got 3"),
    ]
    for bad, strict, text in cases:
        with pytest.raises(ValueError, match="load_float_state_dict: expected") as caught:
            torch_ext.load_float_state_dict(net, bad, strict)
        assert text in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_table_tells_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    net = ready(tiny_net(), verbose=True)
    text = capsys.readouterr().out
    found = torch_ext.describe(net)
    assert str(found) + "\n" == text
    assert {row.name for row in found.quantizers} == names(net)
    assert {row.of for row in found.quantizers} == {"input", "output", "weight"}
    assert dict(found.float_modules) == {
        "bn1": "BatchNorm2d",
        "bn2": "BatchNorm2d",
        "dropout": "Dropout",
    }
    assert "none yet" in text
    run_calibration(net.eval(), images())
    assert "none yet" not in str(torch_ext.describe(net))
    assert "validation" in str(torch_ext.describe(net))


@pytest.mark.parametrize("sequential", [True, False])
def test_compiling_gives_one_graph_per_state(sequential: bool) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU()) if sequential else tiny_net()
    x = torch.randn(3, 4) if sequential else images(3)
    net = ready(plain.eval(), get_default_qconfig(activation_observer="percentile"))
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=count, fullgraph=True)
    for round_ in range(2):
        for state in ("float", "calibration", "validation", "qat"):
            set_fake_quantize(net, state)
            want_model = copy.deepcopy(net)
            with torch.no_grad():
                assert same_bits(compiled(x), want_model(x))
            quantizers = named_quantizers(want_model)
            for name, quantizer in named_quantizers(net).items():
                assert same_bits(quantizer.range, quantizers[name].range)
                assert same_bits(quantizer.observer.tally, quantizers[name].observer.tally)
        assert len(graphs) == 4, round_


def test_export_keeps_names_and_values() -> None:
    net = ready(tiny_net().eval())
    run_calibration(net, images())
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": {0: batch}})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("torch_ext.fake_quant.default") == len(ACTIVATIONS + WEIGHTS)
    x = images(4, seed=5)
    assert same_bits(program.module()(x).detach(), net(x).detach())
