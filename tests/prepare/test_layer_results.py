"""Results of layers that are quantized where they are made, as the backend's engine asks."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import torch_ext
from nets.yolo_style import YoloStyle
from prepare_steps import names, ready, run_calibration
from torch_ext import FakeQuantize, QConfig, get_default_qconfig, remove_quantizers
from torch_ext.utils.backends import Backend

pytestmark = pytest.mark.usefixtures("one_thread")

RESULT = "0.activation_quantizer"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "linear": lambda: nn.Linear(8, 4),
}
# Neither engine computes these with a layer; both do with those; and XNNPACK with the last too.
APART: dict[str, nn.Module] = {
    "SiLU": nn.SiLU(), "Hardswish": nn.Hardswish(), "Tanh": nn.Tanh(), "Sigmoid": nn.Sigmoid(),
    "GELU": nn.GELU(), "LeakyReLU": nn.LeakyReLU(), "Mish": nn.Mish(), "ELU": nn.ELU(),
    "Hardsigmoid": nn.Hardsigmoid(), "PReLU": nn.PReLU(), "Softmax": nn.Softmax(1),
    "LayerNorm": nn.LayerNorm([4]),
}  # fmt: skip
WITH = {"ReLU": nn.ReLU(), "ReLU6": nn.ReLU6(), "Hardtanh from 0": nn.Hardtanh(0.0, 3.0)}
ACTIVATIONS = {**APART, **WITH, "Hardtanh": nn.Hardtanh()}


def picture() -> Tensor:
    return torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(3))


def net(activation: nn.Module, layer: str = "conv") -> nn.Module:
    last = nn.Linear(4, 2)
    torch.manual_seed(0)
    between = nn.AdaptiveMaxPool2d((None, 4)) if layer == "conv" else nn.Identity()
    return nn.Sequential(LAYERS[layer](), copy.deepcopy(activation), between, last).eval()


def prepared(
    model: nn.Module, backend: Backend | None, example: bool = True, **keys: Any
) -> nn.Module:
    keys |= {"example_inputs": picture()} if example else {}
    return ready(model, get_default_qconfig(backend=backend), **keys)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation: str, layer: str, example: bool) -> None:
    module = ACTIVATIONS[activation]
    if activation == "LayerNorm" and layer == "conv":
        module = nn.LayerNorm([4, 4, 6])
    made = {
        backend: names(prepared(net(module, layer), backend, example))  # type: ignore[arg-type]
        for backend in (None, "openvino", "tensorrt", "x86", "onnxruntime", "xnnpack")
    }
    plain = made[None]
    assert RESULT not in plain
    assert made["openvino"] == made["tensorrt"] == made["x86"] == plain
    own = {
        "onnxruntime": layer == "conv" and activation not in WITH,
        "xnnpack": activation in APART,
    }
    for backend, quantized in own.items():
        assert made[backend] - plain == ({RESULT} if quantized else set()), backend
        assert plain <= made[backend]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "silu": (F.silu, True),
    "in place": (lambda x: F.silu(x, inplace=True), True),
    "composed": (lambda x: x * torch.sigmoid(x), True),
    "method": (lambda x: x.tanh(), True),
    "mean": (lambda x: x.mean((2, 3), keepdim=True) + 0 * x, True),
    "behind what moves": (lambda x: F.gelu(x.flatten(2)).view_as(x), True),
    "a part": (lambda x: torch.cat([F.silu(x[:, :2]), x[:, 2:]], 1), True),
    "relu and mean": (lambda x: x.relu().mean((2, 3), keepdim=True).expand_as(x), True),
    "chunks": (lambda x: torch.cat(x.relu().chunk(2, 1)[::-1], 1), True),
    "relu": (F.relu, False),
    "relu_": (torch.relu_, False),
    "clamp": (lambda x: x.clamp(0, 4), False),
    "clamp from below": (lambda x: torch.clamp(x, min=0.0), False),
    "clamp from 1": (lambda x: x.clamp(1, 4), True),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 1, 1), False),
    "nothing": (lambda x: x, False),
    "size": (lambda x: (y := F.max_pool2d(x.relu(), 3, 1, 1)).view(y.size(0), 4, 4, 6), False),
    "shape": (lambda x: F.relu(x).reshape(x.shape[0], 4, 4, 6), False),
    "size and silu": (lambda x: F.silu(x).view(x.size(0), 4, 4, 6), True),
}


class OfFunction(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.function(self.first(x)))
        return made


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: str, example: bool) -> None:
    call, quantized = FUNCTIONS[function]
    model = prepared(OfFunction(call), "onnxruntime", example)
    run_calibration(model, picture())
    made: dict[str, int] = {}
    for name in ("first", "last"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, result, name=name: made.update({name: len(torch.unique(result))})
        )
    with torch.no_grad():
        model(picture())
    assert (made["first"] <= 256) == quantized  # or values of its own
    assert "last.activation_quantizer" not in names(model)


@torch.no_grad()
@pytest.mark.parametrize("example", [True, False])
def test_validation_computes_what_the_engine_does(example: bool) -> None:
    float_net = net(nn.SiLU())
    model = prepared(copy.deepcopy(float_net), "onnxruntime", example)
    assert torch.equal(model(picture()), float_net(picture()))
    run_calibration(model, picture())
    quantizers = torch_ext.named_quantizers(model)
    before_last = "1.activation_quantizer" if example else "3.input_quantizers.input"
    with parametrize.cached():
        conv, last = model.get_submodule("0"), model.get_submodule("3")
        x = quantizers["0.input_quantizers.input"](picture())
        x = quantizers[RESULT](F.conv2d(x, conv.weight, conv.bias))  # type: ignore[arg-type]
        x = quantizers[before_last](model.get_submodule("2")(F.silu(x)))
        want = F.linear(x, last.weight, last.bias)  # type: ignore[arg-type]
    assert torch.equal(model(picture()), want)
    made = F.conv2d(picture(), float_net[0].weight, float_net[0].bias)  # type: ignore[index]
    seen = quantizers[RESULT].observer.extrema
    assert seen.tolist() == [[float(made.min()), float(made.max())]]


class SameConv(nn.Conv2d):
    """With a forward of its own, as timm's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, [0, 1, 0, 1]), self.weight, self.bias, self.stride)


class NormAct(nn.BatchNorm2d):
    """A norm that applies an activation too, as timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))  # type: ignore[no-any-return]


def normed(norm: nn.Module, *behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)  # type: ignore[operator, union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, *behind, nn.Conv2d(4, 2, 1)).eval()


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NormAct])
def test_nothing_stands_before_a_norm(norm: type[nn.Module], example: bool) -> None:
    model = prepared(normed(norm(4), nn.SiLU()), "onnxruntime", example)
    assert RESULT not in names(model)
    assert "1.activation_quantizer" not in names(model)


@torch.no_grad()
def test_a_norm_that_is_folded_takes_the_layers_place() -> None:
    keys: dict[str, Any] = {"fold_batch_norms": True}
    model = prepared(normed(nn.BatchNorm2d(4), nn.SiLU()), "onnxruntime", **keys)
    assert "1.activation_quantizer" in names(model)
    assert RESULT not in names(model)
    fused = torch_ext.fuse(normed(nn.BatchNorm2d(4), nn.SiLU()), example_inputs=picture())
    fused = prepared(fused, "onnxruntime")
    assert RESULT in names(fused)
    for each in (model, fused):
        run_calibration(each, picture())
    step = torch_ext.named_quantizers(model)["2.activation_quantizer"].calculate_qparams()[0]
    apart = (model(picture()) - fused(picture())).abs().max()
    assert float(apart) < 1.5 * float(step)
    relu = prepared(normed(nn.BatchNorm2d(4), nn.ReLU()), "onnxruntime", **keys)
    assert "1.activation_quantizer" not in names(relu)


def test_a_layer_with_a_forward_of_its_own() -> None:
    torch.manual_seed(0)
    float_net = nn.Sequential(SameConv(3, 4, 2), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    model = prepared(copy.deepcopy(float_net), "onnxruntime")
    assert "0.conv2d_quantizer" in names(model)
    assert RESULT in names(prepared(copy.deepcopy(float_net), "onnxruntime", example=False))
    run_calibration(model, picture())
    quantizer = torch_ext.named_quantizers(model)["0.conv2d_quantizer"]
    assert len(torch.unique(float_net[0](picture()))) > 256
    seen: list[Tensor] = []
    model.get_submodule("1").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(picture())
    assert torch.equal(quantizer(seen[0]), seen[0])  # on its grid


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.conv(x))))  # type: ignore[no-any-return]


def test_a_layer_that_is_called_twice() -> None:
    made = names(prepared(Twice(), "onnxruntime"))
    assert {"conv.activation_quantizer", "conv.activation_quantizer_1"} <= made
    made = names(prepared(Twice(), "onnxruntime", example=False))
    assert "conv.activation_quantizer" in made  # for both calls


class Locked(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


def test_of_a_model_that_cannot_be_copied_nothing_is_known() -> None:
    config = get_default_qconfig(backend="onnxruntime")
    model = Locked().eval()
    model.qconfig = config  # type: ignore[assignment]
    made = torch_ext.prepare_qat(model, inplace=True)
    assert made is model
    assert "conv.activation_quantizer" not in names(made)
    assert {"conv.parametrizations.weight.0", "conv.input_quantizers.input"} <= names(made)


def test_a_stub_behind_a_layer_is_enough() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch_ext.QuantStub(), nn.SiLU(), nn.Conv2d(4, 2, 1))
    for example in (True, False):
        made = names(prepared(copy.deepcopy(model), "onnxruntime", example))
        assert RESULT not in made
        assert "1.activation_quantizer" in made


def test_layers_that_stay_float_keep_a_float_result() -> None:
    for example in (True, False):
        plain = get_default_qconfig(backend="onnxruntime")
        for config in (QConfig(plain.activation, None, "onnxruntime"), None):
            model = net(nn.SiLU())
            made = names(prepared(model, "onnxruntime", example, mapping={"0": config}))
            assert RESULT not in made
    made = names(prepared(net(nn.SiLU()), "onnxruntime", input_qconfig=None))
    assert RESULT not in made  # the layer reads the input in float


@torch.no_grad()
def test_a_detector_with_one_activation_for_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    float_net = torch_ext.fuse(YoloStyle().eval(), example_inputs=x)
    # Its forward cannot be traced, but those of its blocks can.
    for keys in ({"example_inputs": x}, {}):
        model = ready(float_net, get_default_qconfig(backend="onnxruntime"), **keys)
        missing = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and name.endswith(".conv")
            if f"{name}.activation_quantizer" not in names(model)
        }
        assert not missing


@pytest.mark.parametrize("example", [True, False])
def test_copies_pickles_training_and_removal(example: bool) -> None:
    float_net = OfFunction(F.silu).eval()
    model = prepared(copy.deepcopy(float_net), "onnxruntime", example)
    run_calibration(model, picture())
    want = model(picture())
    assert torch.equal(copy.deepcopy(model)(picture()), want)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(picture()), want)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(picture()), want)
    torch_ext.set_fake_quantize(model, "qat")
    model.train()(picture()).square().sum().backward()
    grad = model.get_submodule("first.parametrizations.weight").original.grad  # type: ignore
    assert float(grad.abs().sum()) > 0
    plain = remove_quantizers(model.eval())
    assert torch.equal(plain(picture()), float_net(picture()))


def test_functions_compile_with_their_results() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SameConv(3, 4, 2), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    model = prepared(model, "onnxruntime")
    run_calibration(model, picture())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(picture()), model(picture()))


def test_the_backend_is_part_of_the_config() -> None:
    config = get_default_qconfig(backend="xnnpack")
    assert config.backend == "xnnpack"
    assert "backend='xnnpack'" in repr(config)
    assert config == QConfig(config.activation, config.weight, "xnnpack")
    assert config != QConfig(config.activation, config.weight, "onnxruntime")
    assert config != QConfig(config.activation, config.weight)
    assert pickle.loads(pickle.dumps(config)).backend == "xnnpack"
    assert copy.deepcopy(config).backend == "xnnpack"
    with pytest.raises(ValueError, match="QConfig: unknown backend 'qnnpack'; known: onnxr"):
        QConfig(FakeQuantize, FakeQuantize, "qnnpack")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="QConfig: unknown backend 3; known"):
        QConfig(FakeQuantize, FakeQuantize, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [True, False])
def test_a_taken_name_is_refused(example: bool) -> None:
    model = net(nn.SiLU())
    model[0].activation_quantizer = "mine"  # type: ignore[index]
    with pytest.raises(ValueError, match="0 to have no attribute activation_quantizer"):
        prepared(model, "onnxruntime", example)
    assert not names(model)
