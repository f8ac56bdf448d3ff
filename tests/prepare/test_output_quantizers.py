"""The option to quantize what a model returns, in whatever structure."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torch_ext
from counted_graphs import compile_counting
from prepare_steps import CONFIG, OTHER, names, ready, rule_of, run_calibration
from torch_ext import named_quantizers, remove_quantizers, set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.linspace(-3, 2, 24).sin().view(6, 4)


class Named(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass(frozen=True)
class Fields:
    scores: Tensor
    levels: list[Any]
    count: int = 3
    later: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict[str, Any]):
    """As transformers' class: entries are attributes too, and those that are None are left out."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Registered:
    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b


pytree.register_pytree_node(
    Registered, lambda value: ([value.a, value.b], None), lambda parts, _: Registered(*parts)
)

# What is made of two tensors, the names of quantizers, and how to get at the tensors again.
STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str], Callable[[Any], Any]]] = {
    "tensor": (lambda a, b: a, ["0"], lambda o: [o]),
    "tuple": (lambda a, b: (a, None, b, 3), ["0", "2"], lambda o: [o[0], o[2]]),
    "list": (lambda a, b: [a, [b]], ["0", "1_0"], lambda o: [o[0], o[1][0]]),
    "dict": (
        lambda a, b: {"values": a, "aux.x": b, "ids": a.argmax(1)},
        ["values_", "aux_x"],
        lambda o: [o["values"], o["aux.x"]],
    ),
    "named": (Named, ["first", "second"], lambda o: [o.first, o.second]),
    "ordered": (
        lambda a, b: collections.OrderedDict(b=b, a=a),
        ["b", "a"],
        lambda o: [o["b"], o["a"]],
    ),
    "dataclass": (
        lambda a, b: Fields(a, [b, "text"]),
        ["scores", "levels_0"],
        lambda o: [o.scores, o.levels[0]],
    ),
    "model output": (
        lambda a, b: ModelOutput(a.mean(), a, (b,)),
        ["logits", "hidden_0"],
        lambda o: [o.logits, o["hidden"][0]],
    ),
    "registered": (Registered, ["0", "1"], lambda o: [o.a, o.b]),
    "return type": (lambda a, b: a.max(1), ["0"], lambda o: [o.values]),
}


class Net(nn.Module):
    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        out = self.fc(x)
        return self.make(out, out.relu() * 0.5)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_tensors_are_on_their_grids_in_the_same_structure(kind: str) -> None:
    make, keys, tensors = STRUCTURES[kind]
    plain = Net(make)
    net = ready(copy.deepcopy(plain), output_qconfig=OTHER, example_inputs=X)
    found = [n.removeprefix("output_quantizers.") for n in names(net) if n.startswith("output")]
    assert sorted(found) == sorted(keys)
    want = plain(X)
    for state in ("float", "calibration"):
        set_fake_quantize(net, state)
        have = net(X)
        assert type(have) is type(want)
        for left, right in zip(tensors(have), tensors(want), strict=True):
            assert torch.equal(left, right)
    set_fake_quantize(net, "validation")
    have = net(X)
    assert type(have) is type(want)
    for key, left, right in zip(keys, tensors(have), tensors(want), strict=True):
        quantizer = named_quantizers(net)[f"output_quantizers.{key}"]
        assert quantizer.observer.name == "percentile"
        assert int(quantizer.observer.tally[0, 0]) == right.numel()
        step = float(quantizer.scale)
        assert torch.equal((left / step).round() * step, left)
        assert 0 < float((left - right).abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["tensor", "dict", "named", "dataclass", "model output"])
def test_compiled_in_one_graph_a_state(kind: str) -> None:
    make, _, tensors = STRUCTURES[kind]
    net = ready(Net(make), output_qconfig=CONFIG, example_inputs=X)
    compiled, graphs = compile_counting(net)
    for _ in range(2):
        for state in ("float", "calibration", "validation", "qat"):
            set_fake_quantize(net, state)
            twin = copy.deepcopy(net)
            have, want = compiled(X), twin(X)
            assert type(have) is type(want)
            for left, right in zip(tensors(have), tensors(want), strict=True):
                assert torch.equal(left, right)
        assert len(graphs) == 4


@pytest.mark.parametrize("example", [X, None])
def test_a_sequential_has_it_in_its_last_step(example: Tensor | None, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    net = ready(plain, output_qconfig=OTHER, example_inputs=example)
    assert rule_of(net, "1.1.output_quantizers.0") == "percentile"
    assert len(net) == 2  # type: ignore[arg-type]
    run_calibration(net, X)
    want = net(X)
    step = float(named_quantizers(net)["1.1.output_quantizers.0"].scale)
    assert torch.equal((want / step).round() * step, want)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(X), want)
    for strict in (True, False):
        assert torch.equal(torch.export.export(net, (X,), strict=strict).module()(X), want)
    assert [r.of for r in torch_ext.describe(net).quantizers if "output" in r.name] == ["output"]
    back = remove_quantizers(net)
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]


def test_onnx_has_a_pair_of_nodes_at_the_output(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    net = ready(Net(lambda a, b: a).eval(), output_qconfig=CONFIG, example_inputs=X)
    run_calibration(net, X)
    torch_ext.export.onnx(net, (X,), tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    node = made_by[graph.output[0].name]
    while node.op_type == "Identity":
        node = made_by[node.input[0]]
    assert node.op_type == "DequantizeLinear"
    assert made_by[node.input[0]].input[1] == "output_quantizers.0/scale"


def test_what_only_train_mode_returns_is_optional() -> None:
    class Heads(Net):
        def forward(self, x: Tensor) -> Any:
            out = self.fc(x)
            return {"out": out, "aux": out * 2} if self.training else {"out": out}

    net = ready(Heads(lambda a, b: a).eval(), output_qconfig=CONFIG, example_inputs=X)
    quantizers = named_quantizers(net)
    assert quantizers["output_quantizers.aux"].optional
    assert not quantizers["output_quantizers.out"].optional
    with pytest.warns(torch_ext.QuantizationWarning, match=r"output_quantizers\.aux"):
        run_calibration(net, X)


def test_a_tensor_that_is_returned_twice_has_one_quantizer() -> None:
    net = ready(Net(lambda a, b: (a, {"again": a})), output_qconfig=CONFIG, example_inputs=X)
    assert "output_quantizers.0" in names(net)
    run_calibration(net, X)
    first, rest = net(X)
    assert first is rest["again"]
    assert int(named_quantizers(net)["output_quantizers.0"].observer.tally[0, 0]) == 18


class TestRefusals:
    def test_another_structure_than_the_examples(self) -> None:
        net = Net(lambda a, b: a)
        made = ready(net, output_qconfig=CONFIG, example_inputs=X)
        made.make = lambda a, b: {"a": a}
        made(X)  # in FLOAT nothing is looked at
        set_fake_quantize(made, "calibration")
        with pytest.raises(RuntimeError, match="got a floating tensor at a; pass an example that"):
            made(X)

        class Ways(Net):
            def forward(self, x: Tensor, full: bool) -> Any:
                out = self.fc(x)
                return {"a": out} if full else out

        both = [(X, True), (X, False)]  # the way out
        made = ready(Ways(lambda a, b: a), output_qconfig=CONFIG, example_inputs=both)
        assert {"output_quantizers.a", "output_quantizers.0"} < names(made)
        set_fake_quantize(made, "calibration")
        made(X, True)
        made(X, False)

    def test_several_tensors_without_an_example(self) -> None:
        net = ready(Net(lambda a, b: (a, b)), output_qconfig=CONFIG)
        net(X)
        set_fake_quantize(net, "calibration")
        with pytest.raises(RuntimeError, match="return one floating tensor with output_qconfig"):
            net(X)

    def test_bad_arguments(self) -> None:
        net = Net(lambda a, b: a)
        with pytest.raises(TypeError, match="output_qconfig to be a QConfig or None, got 'int8'"):
            ready(net, output_qconfig="int8")
        with pytest.raises(ValueError, match="return floating tensors with output_qconfig, got n"):
            ready(Net(lambda a, b: a.argmax(1)), output_qconfig=CONFIG, example_inputs=X)
        only_weights = torch_ext.get_default_qconfig(activation_fake_quant=None)
        assert not any("output" in name for name in names(ready(net, output_qconfig=only_weights)))
        net.output_quantizers = nn.Identity()
        with pytest.raises(ValueError, match="to have no attribute output_quantizers, got a Ident"):
            ready(net, output_qconfig=CONFIG)

    def test_a_last_step_that_is_used_twice(self) -> None:
        last = nn.Linear(4, 4)
        net = nn.Sequential(last, nn.ReLU(), last)
        with pytest.raises(
            ValueError, match="cannot quantize the outputs, as its last step is use"
        ):
            ready(net, output_qconfig=CONFIG)
        stub = nn.Sequential(last, nn.ReLU(), last, torch_ext.QuantStub())  # the way out
        assert "3.activation_quantizer" in names(ready(stub))

    def test_prepared_twice(self) -> None:
        weights = torch_ext.get_default_qconfig(activation_fake_quant=None)
        net = ready(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), weights, output_qconfig=CONFIG)
        with pytest.raises(ValueError, match=r"prepared already .*1\.output_quantizers"):
            torch_ext.prepare_qat(net)
