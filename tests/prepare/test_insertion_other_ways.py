"""Forwards that go another way each time: skipped layers, experts, boxes, caches, branches."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grid_checks import off_grid
from prepare_steps import names, ready, run_calibration
from torch_ext import set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(x, 0.5, self.training)).tanh() + x


class SkipsLayers(nn.Module):
    """Layerdrop: while training, some layers are left out at random; ``draw`` says by what."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(4))
        self.gate, self.head, self.draw = nn.Linear(6, 6), nn.Linear(6, 2), draw

    def _drawn(self) -> float:
        if self.draw == "torch":
            return float(torch.rand([]))
        return random.random() if self.draw == "python" else float(numpy.random.uniform())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self._drawn() < 0.5:
                continue
            x = layer(x)
        if not self.training or self._drawn() < 0.5:
            x = x.sigmoid() * self.gate(x)
        return self.head(x)


@pytest.mark.parametrize("draw", ["torch", "python", "numpy"])
def test_layers_that_are_skipped_at_random(draw: str) -> None:
    random.seed(0)
    numpy.random.seed(0)
    net = ready(SkipsLayers(draw), example_inputs=tokens())
    assert sum(name.endswith("weight.0") for name in names(net)) == 6
    run_calibration(net.eval(), tokens())
    assert off_grid(net, tokens()) == ([], {"linear": 6})
    set_fake_quantize(net, "qat")
    torch.manual_seed(0)
    for _ in range(12):
        net.train()(tokens()).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_preparing_leaves_random_numbers() -> None:
    model = SkipsLayers("python")
    before = random.getstate(), numpy.random.get_state()[2]
    ready(model, example_inputs=tokens())
    assert (random.getstate(), numpy.random.get_state()[2]) == before


class Experts(nn.Module):
    """A mixture of experts: each row goes to one, and what no row goes to is not called."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(count)
        )
        self.weights = nn.Parameter(torch.randn(count, 6, 6))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in chosen.unique():
            rows = torch.where(chosen == i)[0]
            mixed = self.experts[int(i)](x[rows]) * x[rows].sigmoid()
            out.index_add_(0, rows, F.linear(mixed, self.weights[i]))
        return out


def test_experts() -> None:
    x = tokens(6)
    net = ready(Experts(), example_inputs=(x, torch.tensor([0, 1, 2, 2, 1, 0])))
    found = names(net)
    assert "parametrizations.weights.0" in found
    # One for the products of all experts, and one for what the last step reads.
    assert {name for name in found if "mul" in name} == {"mul_quantizer"}
    set_fake_quantize(net, "calibration")
    net(x, torch.tensor([0, 1, 2, 2, 1, 0]))
    set_fake_quantize(net, "validation")
    for chosen, called in (([0, 1, 2, 2, 1, 0], 9), ([1] * 6, 3), ([2, 0, 2, 0, 2, 2], 6)):
        assert off_grid(net, x, torch.tensor(chosen)) == ([], {"linear": called})


class Boxes(nn.Module):
    """A detector's end: boxes above a threshold are decoded, image after image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box, self.again = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            x = self.body(image)
            kept = x[x[:, 0] > 0]
            if kept.shape[0]:
                kept = kept + self.box(kept)
            found.append({"boxes": torch.cat([kept, kept.exp()], 1), "labels": self.again(kept)})
        return found


def test_boxes() -> None:
    net = ready(Boxes(), example_inputs=([tokens(8), tokens(5, 1)],))
    set_fake_quantize(net, "calibration")
    net([tokens(8), tokens(5, 1)])
    set_fake_quantize(net, "validation")
    for count in (1, 2):
        assert off_grid(net, [tokens(9, 3)] * count) == ([], {"linear": 3 * count})


class Cached(nn.Module):
    """Keeps a table for the size that it saw last, as YOLO keeps its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(3, 4, 3, padding=1), (0, 0)
        self.table = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.size != (x.shape[2], x.shape[3]):
            self.size = (x.shape[2], x.shape[3])
            rows, columns = (torch.arange(n, device=x.device) + 0.5 for n in self.size)
            grid = torch.meshgrid(rows, columns, indexing="ij")
            scale = x.new_full((1, *self.size), 2.0)
            self.table = torch.cat([torch.stack(grid), scale * scale])
        y = self.conv(x)
        return torch.cat([y * y.sigmoid(), self.table.expand(len(x), -1, -1, -1)], 1)


@pytest.mark.parametrize("called_before", [False, True])
def test_a_table_for_another_size(called_before: bool) -> None:
    model = Cached().eval()
    if called_before:
        model(torch.randn(2, 3, 6, 6))
    net = ready(model, example_inputs=torch.randn(2, 3, 6, 6))
    run_calibration(net, torch.randn(2, 3, 6, 6))
    for size in (6, 8, 6, 5):
        x = torch.randn(2, 3, size, size)
        assert off_grid(net, x) == ([], {"conv2d": 1})
        assert net(x).shape == (2, 7, size, size)


class Keeps(nn.Module):
    """Computes a product of parameters once, and keeps it in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            kept = self.left @ self.right
            self.kept = None if self.training else kept
        else:
            kept = self.kept
        return x @ kept


def test_what_the_first_call_keeps_for_the_second() -> None:
    net = ready(Keeps().eval(), example_inputs=tokens())
    run_calibration(net, tokens())
    net.kept = None
    for products in (2, 1, 1):
        found, seen = off_grid(net, tokens())
        assert not found
        assert sum(seen.values()) == products


@torch.compile(backend="eager")
def mixed(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.sin() + y.cos(), x], 1)


class CallsCompiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(mixed(self.first(x), x))


def test_a_function_that_is_compiled_by_itself() -> None:
    net = ready(CallsCompiled(), example_inputs=tokens())
    assert {"cat_quantizer", "cos_quantizer", "sin_quantizer"} < names(net)
    run_calibration(net, tokens())
    assert off_grid(net, tokens()) == ([], {"linear": 2})
    with torch.no_grad():
        whole = torch.compile(net, fullgraph=True, backend="eager")
        assert torch.equal(whole(tokens()), net(tokens()))


class Checkpoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + checkpoint(self.inner, x, use_reentrant=False))


def test_a_checkpoint_inside_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ready(Checkpoints(), example_inputs=tokens())
    run_calibration(net, tokens())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        torch.compile(net, fullgraph=True, backend="aot_eager")(tokens())
    # What the guide says to set.
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    monkeypatch.setattr(torch._dynamo.config, name, True)
    torch._dynamo.reset()
    have = torch.compile(net, fullgraph=True, backend="aot_eager")(tokens())
    assert torch.equal(have, net(tokens()))
    have.sum().backward()
    compiled = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net(tokens()).sum().backward()
    eager = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(eager) == 6
    assert all(map(torch.allclose, compiled, eager))


class Transforms(nn.Module):
    """One buffer is the weight of two products, as in a cosine transform of rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(6, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.linear(x, self.basis)  # type: ignore[arg-type]
        return self.last(F.linear(rows.T, self.basis))  # type: ignore[arg-type]


def test_a_weight_that_is_a_buffer_is_quantized_for_each_reader() -> None:
    net = ready(Transforms(), example_inputs=tokens(6))
    run_calibration(net, tokens(6))
    assert off_grid(net, tokens(6)) == ([], {"linear": 3})


class Branches(nn.Module):
    """The same layer at another line in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = Residual(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            y = self.stem(x).exp()
            return self.out(y), self.out(y.neg())
        y = self.stem(x).exp()
        return self.out(y)


def test_a_layer_at_another_line_in_train_mode_is_the_same_call() -> None:
    net = ready(Branches(), example_inputs=tokens())
    assert {name for name in names(net) if name.startswith(("stem", "input"))} == {
        "stem.fc.parametrizations.weight.0",
        "stem.tanh_quantizer",
        "input_quantizers.x",
    }


class Targets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.extra = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(x)
        if self.training:
            assert targets is not None, "targets, please"
            return (self.extra(y) - targets).square().mean()
        return y


def test_an_example_for_train_mode_is_followed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = ready(Targets(), example_inputs=[(tokens(),), (tokens(), tokens())])
    set_fake_quantize(net, "calibration")
    net.eval()(tokens())
    net.train()(tokens(), tokens())
    set_fake_quantize(net, "validation")
    assert off_grid(net, tokens(), tokens()) == ([], {"linear": 2})


class Conv1D(nn.Module):
    """As transformers writes it: the weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class AddMM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = Conv1D(), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        y = torch.addmm(y.sum(), y, self.weight.t())
        return torch.addmm(y, mat1=y, mat2=y.T @ y)


def as_linear(weight: Tensor) -> Tensor:
    """What a linear layer with the weight [in, out] multiplies by in VALIDATION, as [in, out]."""
    layer = nn.Linear(*weight.shape)
    layer.weight.data.copy_(weight.t())
    net = ready(nn.Sequential(layer))
    set_fake_quantize(net, "validation", allow_unobserved=True)
    return net[0].weight.detach().t()  # type: ignore[index,union-attr]


def test_addmm_is_a_layer_or_a_product() -> None:
    model = AddMM()
    net = ready(model, example_inputs=tokens(4))
    assert names(net) == {
        "input_quantizers.x",
        "layer.parametrizations.weight.0",
        "parametrizations.weight.0",
        "tanh_quantizer",
        "addmm_quantizer",
        "matmul_quantizer",
    }
    run_calibration(net, tokens(4))
    seen: list[tuple[Tensor, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.addmm:
                seen.append((*args, *(kwargs or {}).values()))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        net(tokens(4))
    for (_, x, weight), given, name in (
        (seen[0], model.layer.weight, "input_quantizers.x"),
        (seen[1], model.weight.t(), "tanh_quantizer"),
    ):
        assert torch.equal(weight, as_linear(given))
        step = net.get_submodule(name).calculate_qparams()[0]  # type: ignore[operator]
        assert torch.equal((x / step).round() * step, x)


class FillsBuffer(nn.Module):
    """Its other way multiplies what was written into a new tensor of zeros."""

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        h = torch.sigmoid(x)
        y = h @ h.T
        if other:
            filled = torch.zeros_like(h)
            filled[:] = h
            return filled @ filled.T
        return y


def test_zeros_that_data_is_written_to_are_data() -> None:
    x = torch.randn(3, 4)
    net = ready(FillsBuffer(), example_inputs=x)
    run_calibration(net, x)
    with pytest.raises(RuntimeError, match="got matmul at"):
        net(x, True)


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        return self.second(torch.tanh(x)) if other else self.first(x)


def test_the_way_of_a_second_example_has_to_be_calibrated_too() -> None:
    x = torch.randn(3, 4)
    net = ready(TwoWays(), example_inputs=[(x,), (x, True)])
    set_fake_quantize(net, "calibration")
    net(x)
    with pytest.raises(RuntimeError, match=r"got none for tanh_quantizer"):
        set_fake_quantize(net, "validation")
    net(x, True)
    set_fake_quantize(net, "validation")
    assert off_grid(net, x, True)[0] == []


def test_code_without_a_file_has_lines_too() -> None:
    source = """
class Net(nn.Module):
    def forward(self, x, other=False):
        h = torch.sigmoid(x)
        if other:
            return h + torch.tanh(h)
        return h + x
"""
    scope: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(compile(source, "<stdin>", "exec"), scope)
    x = torch.randn(3, 4)
    net = ready(scope["Net"](), example_inputs=x)
    run_calibration(net, x)
    with pytest.raises(RuntimeError, match="got add at <stdin>:6"):
        net(x, True)
