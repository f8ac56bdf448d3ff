"""prepare_qat: what is quantized, under which names and configuration, and what stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from counted_graphs import compile_counting
from nets.tiny_net import ACTIVATIONS, WEIGHTS, TinyNet, images, tiny_net
from prepare_steps import CONFIG, OTHER, names, ready, run_calibration
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
        host = name.partition(".parametrizations")[0].partition(".input_quantizers")[0]
        assert module.training == modes[host], name
    weight = net.get_parameter("conv1.parametrizations.weight.original")
    assert weight.dtype == dtype
    assert net.get_buffer("fc.input_quantizers.input.scale").dtype == torch.float32


def test_the_model_itself_stays_unless_inplace() -> None:
    plain = tiny_net()
    net = ready(plain)
    assert net is not plain
    assert not any(isinstance(m, FakeQuantize) for m in plain.modules())
    assert prepare_qat(plain, inplace=True) is plain
    assert names(plain) == names(net)


LAYERS: list[tuple[nn.Module, tuple[int, ...], tuple[int, int]]] = [
    (nn.Conv1d(4, 6, 3), (2, 4, 8), (0, 6)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), (0, 6)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 8, 8), (0, 6)),
    (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5), (0, 6)),
    (nn.ConvTranspose1d(4, 6, 3), (2, 4, 8), (1, 6)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 8, 8), (1, 6)),
    (nn.ConvTranspose3d(4, 6, 3), (2, 4, 5, 5, 5), (1, 6)),
    (nn.Linear(4, 6), (2, 4), (0, 6)),
]


@pytest.mark.parametrize(
    ("layer", "shape", "channels"), LAYERS, ids=[type(row[0]).__name__ for row in LAYERS]
)
def test_a_layer_reads_its_input_and_its_weight_quantized(
    layer: nn.Module, shape: tuple[int, ...], channels: tuple[int, int]
) -> None:
    net = ready(nn.Sequential(nn.ReLU(), copy.deepcopy(layer), nn.ReLU()))
    # Behind the step that brings the output channels of all groups to one axis.
    place = int(isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1)
    weight = f"1.parametrizations.weight.{place}"
    assert names(net) == {"1.input_quantizers.input", weight}
    quantizers = named_quantizers(net)
    observer = quantizers[weight].observer
    assert (observer.ch_axis, observer.channel_len) == channels
    run_calibration(net, torch.randn(shape))
    x = torch.randn(shape)
    given = quantizers["1.input_quantizers.input"]
    assert given.range[0, 0] == 0  # the ReLU before it made no negative value
    rounded = torch.fake_quantize_per_tensor_affine(
        x.relu(), float(given.scale), int(given.zero_point), -128, 127
    )
    with torch.no_grad():
        layer = copy.deepcopy(layer)
        layer.weight.copy_(net[1].weight)  # type: ignore
        assert torch.equal(net(x), layer(rounded).relu())


@pytest.mark.parametrize(
    "module",
    [
        *[kind() for kind in (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.PReLU)],
        *[kind(-1) for kind in (nn.Softmax, nn.LogSoftmax, nn.GLU)],
        *[nn.Dropout(), nn.Identity(), nn.BatchNorm1d(4), nn.AvgPool1d(2)],
    ],
    ids=lambda module: type(module).__name__,
)
def test_activations_norms_and_poolings_stay_float(module: nn.Module) -> None:
    net = ready(nn.Sequential(nn.Linear(4, 4), module))
    assert names(net) == {"0.input_quantizers.input", "0.parametrizations.weight.0"}


def test_a_stub_has_its_output_quantized() -> None:
    net = ready(nn.Sequential(nn.ReLU(), torch_ext.QuantStub()))
    assert names(net) == {"1.activation_quantizer"}
    run_calibration(net, torch.randn(2, 4))
    out, scale = net(torch.randn(2, 4)), named_quantizers(net)["1.activation_quantizer"].scale
    assert torch.equal((out / scale).round() * scale, out)


def test_embeddings_have_quantized_weights_only() -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        net = ready(nn.Sequential(kind(10, 4), nn.Linear(4, 2)))
        assert names(net) == {
            "0.parametrizations.weight.0",
            "1.parametrizations.weight.0",
            "1.input_quantizers.input",
        }
        run_calibration(net, torch.tensor([[1, 2], [3, 9]]))


class Operators(nn.Module):
    """One module per operation."""

    def __init__(self) -> None:
        super().__init__()
        self.add, self.mul, self.twice = torch_ext.Add(), torch_ext.Mul(), torch_ext.Mul()
        self.cat, self.matmul = torch_ext.Cat(1), torch_ext.MatMul()
        self.stub = torch_ext.QuantStub()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        joined = self.cat([self.add(a, b), self.mul(a, a), self.twice(a, 2.0)])
        out: Tensor = self.stub(self.matmul(joined, joined.T).mean(1))
        return out


def test_operations_as_modules_read_their_operands_quantized() -> None:
    plain = Operators()
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    joined = torch.cat([a + b, a * a, a * 2], 1)
    assert torch.equal(plain(a, b), (joined @ joined.T).mean(1))
    net = ready(plain)
    pairs = {f"{n}.input_quantizers.{x}" for n in ("add", "mul", "twice", "matmul") for x in "ab"}
    assert names(net) == {*pairs, "cat.input_quantizers.tensors", "stub.activation_quantizer"}
    with pytest.warns(
        torch_ext.QuantizationWarning, match="no floating tensor of their own, pass through"
    ):
        run_calibration(net, a, b)
    found = named_quantizers(net)

    def rounded(x: Tensor, name: str) -> Tensor:
        scale, zero_point = found[name].calculate_qparams()
        return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), -128, 127)

    a_, b_ = rounded(a, "add.input_quantizers.a"), rounded(b, "add.input_quantizers.b")
    square = rounded(a, "mul.input_quantizers.a")
    parts = [a_ + b_, square * square, a * 2]  # a number is no operand, so nothing is quantized
    joined = torch.cat([rounded(part, "cat.input_quantizers.tensors") for part in parts], 1)
    product = rounded(joined, "matmul.input_quantizers.a") @ rounded(
        joined.T, "matmul.input_quantizers.b"
    )
    assert torch.equal(net(a, b), rounded(product.mean(1), "stub.activation_quantizer"))
    # Each tensor is observed once: `a` alone in `a * a`, the three parts of the concatenation.
    tally = {name: int(quantizer.observer.tally[0, 0]) for name, quantizer in found.items()}
    assert tally["mul.input_quantizers.a"] == 12
    assert tally["mul.input_quantizers.b"] == tally["twice.input_quantizers.a"] == 0
    assert tally["cat.input_quantizers.tensors"] == 36


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

    net = ready(Old())
    assert names(net) == {"quant.activation_quantizer", "ops.activation_post_process"}
    run_calibration(net, torch.randn(5))


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
    assert {row.of for row in found.quantizers} == {"input", "weight"}
    assert dict(found.float_modules) == {
        "bn1": "BatchNorm2d",
        "bn2": "BatchNorm2d",
        "relu1": "ReLU",
        "dropout": "Dropout",
    }
    assert not found.functions_seen
    assert "functions (x + y, torch.matmul, torch.cat, ...): float" in text
    seen = torch_ext.describe(ready(tiny_net(), example_inputs=images(1)))
    assert seen.functions_seen
    assert "functions (" not in str(seen)
    assert torch_ext.describe(tiny_net()).functions_seen  # of a float model there is nothing to say
    assert "none yet" in text
    run_calibration(net.eval(), images())
    assert "none yet" not in str(torch_ext.describe(net))
    assert "validation" in str(torch_ext.describe(net))


@pytest.mark.parametrize("sequential", [True, False])
def test_compiling_gives_one_graph_per_state(sequential: bool) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU()) if sequential else tiny_net()
    x = torch.randn(3, 4) if sequential else images(3)
    net = ready(plain.eval(), get_default_qconfig(activation_observer="percentile"))
    compiled, graphs = compile_counting(net)
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


def test_describe_says_that_functions_were_not_looked_at_beside_weights_alone() -> None:
    assert not torch_ext.describe(ready(nn.Sequential(nn.Embedding(5, 4)))).functions_seen
