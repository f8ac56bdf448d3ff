"""The walk: its order, what it shows of each layer, and that nothing of it is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from corrections import (
    BOTH_WAYS,
    INT4,
    ORDER,
    Several,
    batches,
    calibrated,
    depthwise,
    filled,
    message,
    seen_by_hooks,
)
from snapshots import same, same_bits, snapshot
from torch_ext import FakeQuantState
from torch_ext.correction.walk.layer_walk import LayerCall, LayerWalk
from torch_ext.quantizers.find import PreparedModel

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches()


def walk_of(model: nn.Module, data: Any = DATA, **keys: Any) -> LayerWalk:
    return LayerWalk(PreparedModel("test", model), data, **keys)


def hooks_of(model: nn.Module) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


@BOTH_WAYS
def test_layers_come_in_the_order_of_execution(captured: bool) -> None:
    walk = walk_of(calibrated(filled(Several()), DATA, captured=captured))
    calls: list[str] = []
    with walk.guarded():
        walk.run(lambda call: calls.append(call.name))
    assert walk.order == ORDER
    assert calls == [*ORDER[:3], "shared", *ORDER[3:]] * len(DATA)
    assert walk.left == {}


@BOTH_WAYS
def test_a_call_shows_what_the_layer_reads_and_makes(captured: bool) -> None:
    net = filled(Several())
    model = calibrated(net, DATA, captured=captured)
    made = seen_by_hooks(model, DATA, (nn.Conv1d, nn.Conv2d, nn.Linear), inputs=False)
    quantizers = torch_ext.named_quantizers(model)
    grids: dict[str, Tensor] = {}
    walk = walk_of(model)

    def visit(call: LayerCall) -> None:
        if call.name in made and call.name != "shared":
            want = made[call.name].pop(0)
            assert same_bits(call.output, want), call.name
            assert call.output.shape[call.ch_axis] == call.weight.shape[0]
            floating = call.layer.module.parametrizations.weight.original
            assert not torch.equal(call.weight, floating)
            grids[call.name] = call.input
        assert same_bits(call.again(), call.output)
        assert type(call.weight) is Tensor

    with walk.guarded():
        walk.run(visit)
    # The input lies on the grid of the quantizer that the layer reads through.
    name = "input_quantizers.x" if captured else "first.input_quantizers.input"
    scale = quantizers[name].scale
    steps = grids["first"].double() / scale.double()
    assert float((steps - steps.round()).abs().max()) < 1e-4
    assert len(steps.round().unique()) > 50


def test_the_float_model_is_seen_in_float() -> None:
    net = filled(Several())
    model = calibrated(net, DATA)
    want = seen_by_hooks(net, DATA, (nn.Conv2d,), inputs=False)
    walk = walk_of(model)
    with walk.guarded():
        walk.enter(FakeQuantState.FLOAT)
        seen: dict[str, list[Tensor]] = {}
        walk.run(lambda call: seen.setdefault(call.name, []).append(call.output.clone()))
    for name, outputs in want.items():
        assert all(map(same_bits, seen[name], outputs)), name


@pytest.mark.parametrize("data", [DATA, [torch.cat(DATA)]], ids=["several", "one batch"])
@pytest.mark.parametrize("make", [Several, depthwise])
def test_each_layer_reads_what_changed_layers_made(
    data: list[Tensor], make: Callable[[], nn.Module]
) -> None:
    """Every layer's weight becomes twice as large when its turn has come."""
    net = filled(make())
    net.qconfig = torch_ext.get_default_qconfig(activation_fake_quant=None)
    model = torch_ext.prepare_qat(net)  # weights alone: what a layer reads is exact
    torch_ext.set_fake_quantize(model, "validation")
    walk = walk_of(model, data)
    changed = copy.deepcopy(model)
    found: dict[str, list[Tensor]] = {}

    def finish(name: str) -> None:
        layer = walk.layers[name]
        layer.module.parametrizations.weight.original.data.mul_(2)
        walk.prepared.refresh_weights()

    with walk.guarded():
        walk.run()
        done = list(
            walk.sequentially(
                walk.order, lambda c: found.setdefault(c.name, []).append(c.input.clone()), finish
            )
        )
    assert done == walk.order
    for name in walk.order:
        kinds = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        want = seen_by_hooks(changed, data, kinds, inputs=True)[name]
        assert len(want) == len(found[name])
        for left, right in zip(found[name], want, strict=True):
            if name != "grouped":  # pads by itself what it reads
                torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        changed.get_submodule(name).parametrizations.weight.original.data.mul_(2)
        torch_ext.set_fake_quantize(changed, "validation")


def test_one_batch_is_run_once() -> None:
    model = calibrated(depthwise(), DATA)
    forwards = 0

    def counted(net: nn.Module, batch: Tensor) -> Any:
        nonlocal forwards
        forwards += 1
        return net(batch)

    walk = walk_of(model, DATA[:1], forward=counted)
    with walk.guarded():
        walk.run()
        list(walk.sequentially(walk.order, lambda _: None, lambda _: None))
    assert forwards == 2


class Deciding(nn.Module):
    """Calls its last layer only where the first one is not quantized."""

    plain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        is_float = torch.equal(self.first.weight, self.plain)
        return self.second(y) if is_float else y


@pytest.mark.parametrize("keep", ["closer", "all"])
def test_a_layer_that_the_quantized_model_does_not_call(keep: Any) -> None:
    net = filled(Deciding())
    net.plain = net.first.weight.detach().clone()  # type: ignore[union-attr, assignment]
    data = list(torch.randn(40, 4).split(20))
    net.qconfig = INT4  # type: ignore[assignment]
    model = torch_ext.prepare_qat(net)
    torch_ext.calibrate(model, data, progress=False)
    before = snapshot(model)
    text = message(lambda: torch_ext.correct_bias(model, data, keep=keep), RuntimeError)
    assert 'expected the quantized model to call "second" as the float model does' in text
    assert same(snapshot(model), before)
    assert "second" in torch_ext.reconstruct(model, data).left


class Weird(nn.Module):
    """Weights that hooks and parametrizations compute, attention, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hooked = torch.nn.utils.weight_norm(nn.Linear(8, 8))  # type: ignore[no-untyped-call]
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        y = self.attention(y, y, y, need_weights=False)[0]
        return self.normed(self.hooked(y).relu())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@BOTH_WAYS
def test_weights_that_are_computed_and_modules_that_are_left(captured: bool) -> None:
    torch.manual_seed(1)
    net = Weird().eval()
    net.qconfig = INT4
    ids = torch.randint(0, 10, (2, 4))
    model = torch_ext.prepare_qat(net, example_inputs=(ids,) if captured else None)
    torch_ext.calibrate(model, [ids], progress=False, allow_unobserved=True)
    want = model(ids)
    kept = vars(model.hooked)["weight"]
    walk = walk_of(model, [ids])
    seen: list[str] = []
    outputs: list[Tensor] = []
    with walk.guarded():
        walk.run(lambda call: seen.append(call.name), outputs.append)
    assert seen == walk.order == ["hooked", "normed"]
    assert same_bits(outputs[0], want.detach())
    reasons = {name: why.partition(" ")[0] for name, why in walk.left.items()}
    assert reasons["embedding"] == "a"
    assert reasons["attention"] == "a"
    assert reasons["attention.out_proj"] == "attention"
    assert set(reasons) - {"unused"} == {"embedding", "attention", "attention.out_proj"}
    assert vars(model.hooked)["weight"] is kept
    assert same_bits(model(ids), want)


@pytest.mark.parametrize("where", ["visit", "forward", "finish"])
def test_an_error_leaves_the_model_as_it_was(where: str) -> None:
    model = calibrated(filled(Several()), DATA).train()
    torch_ext.set_fake_quantize(model, "qat", pattern="fc.*")
    before, hooks, random = snapshot(model), hooks_of(model), torch.get_rng_state()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    walk = walk_of(model, forward=fail if where == "forward" else None)

    def run() -> None:
        with walk.guarded():
            torch.rand(1)
            walk.run(fail if where == "visit" else None)
            list(walk.sequentially(walk.order, lambda _: None, fail))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert same(snapshot(model), before)
    assert hooks_of(model) == hooks
    assert torch.equal(torch.get_rng_state(), random)


class TestBadInput:
    def test_data(self) -> None:
        model = calibrated(filled(Several()), DATA)

        def run(data: Any) -> None:
            walk = walk_of(model, data)
            with walk.guarded():
                walk.run()
                walk.run()

        assert "expected data to be batches, got a tensor" in message(
            lambda: run(DATA[0]), TypeError
        )
        assert "that can be run over again" in message(lambda: run(iter(DATA)), TypeError)
        assert "expected data to give batches, got none" in message(lambda: run([]))

        class Shuffled:
            def __iter__(self) -> Any:
                return (x for x in torch.cat(DATA)[torch.randperm(12)].split(4))

        assert "the same batches each time it is run over, got another batch 1" in message(
            lambda: run(Shuffled())
        )

        class Shorter:
            count = len(DATA) + 1

            def __iter__(self) -> Any:
                self.count -= 1
                return iter(DATA[: self.count])

        assert "got 2, of 3 the first time" in message(lambda: run(Shorter()))

    def test_no_layer(self) -> None:
        model = calibrated(filled(Several()), DATA)
        text = message(lambda: walk_of(model, pattern="*input*"))
        assert "test: expected convolutions or linear layers with quantized weights" in text
        assert "no quantizer matches" in message(lambda: walk_of(model, pattern="nothing"))

    def test_a_model_without_ranges(self) -> None:
        net = filled(Several())
        net.qconfig = INT4
        model = torch_ext.prepare_qat(net)
        before = snapshot(model)
        want = "test: expected every quantizer to have a range"
        with pytest.raises(RuntimeError, match=want), walk_of(model).guarded():
            pass
        assert same(snapshot(model), before)
