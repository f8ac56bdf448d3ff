"""torch.compile and torch.export: one graph for each state, the same bits, nothing copied."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import torch_ext
from nets.tiny_net import TinyNet, images, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import FakeQuantize, get_default_qconfig, prepare_qat, set_fake_quantize

METHODS = torch_ext.fake_quants()
STATES = ["float", "calibration", "validation", "qat"]


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch.set_num_threads(1)
    torch.compiler.reset()


def ready(method: str, calibrated: bool = True) -> TinyNet:
    """Training mode, dropout off so that runs can be compared."""
    net = tiny_net()
    net.dropout.p = 0.0
    net.qconfig = get_default_qconfig(
        method, method, activation_qkwargs={"histogram": True, "averaging_constant": 0.25}
    )
    net = prepare_qat(net)
    if calibrated:
        set_fake_quantize(net, "calibration")
        net(images())
        set_fake_quantize(net, "qat")
    return net.train()


def step(call: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one forward and backward pass."""
    net.zero_grad()
    out = call(x)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def assert_same_tensors(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    assert all(map(same_bits, left, right))


@pytest.mark.parametrize("method", METHODS)
def test_training_is_one_graph_for_each_state_and_the_same_bits(method: str):
    net = ready(method)
    twin = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for round_ in range(2):
        for state in STATES:
            for one in (net, twin):
                set_fake_quantize(one, state)
            x = images(5, seed=round_)
            assert_same_tensors(step(compiled, net, x), step(twin, twin, x))
            assert same(snapshot(net), snapshot(twin)), state
        assert counter.frame_count == len(STATES), round_


@pytest.mark.parametrize("method", METHODS)
def test_another_batch_size_needs_no_other_graph(method: str):
    net = ready(method)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for state in STATES:
        set_fake_quantize(net, state)
        for size in (4, 7, 9, 3):
            x = images(size)
            torch._dynamo.mark_dynamic(x, 0)
            twin = copy.deepcopy(net)
            assert_same_tensors(step(compiled, net, x), step(twin, twin, x))
            assert same(snapshot(net), snapshot(twin))
    assert counter.frame_count == len(STATES)


def test_learning_that_starts_in_a_compiled_step_starts_as_in_eager():
    net = ready("lsq", calibrated=False)
    set_fake_quantize(net, "qat")
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = images(5, seed=seed)
        assert_same_tensors(step(compiled, net, x), step(twin, twin, x))
        assert same(snapshot(net), snapshot(twin))
    assert all(q.solved.item() for q in net.modules() if isinstance(q, FakeQuantize))


@pytest.mark.parametrize("method", METHODS)
def test_learning_that_starts_compiled_needs_one_graph_a_state(method: str):
    """Training before a calibration and after it, validation before and after: the same graphs."""
    net = ready(method, calibrated=False)
    twin = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for state in ("qat", "validation", "qat", "calibration", "qat", "validation", "qat"):
        for one in (net, twin):
            set_fake_quantize(one, state)
        x = images(5)
        assert_same_tensors(step(compiled, net, x), step(twin, twin, x))
        assert same(snapshot(net), snapshot(twin)), state
    assert counter.frame_count == 3


def generated_code(net: nn.Module, x: Tensor) -> str:
    """What Inductor makes of a training step."""
    from torch._inductor.utils import run_and_get_code

    # Its cache on disk does not know an op's tags.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(net, fullgraph=True)
        _, code = run_and_get_code(lambda: compiled(x).sum().backward())
    return "\n".join(code)


@pytest.mark.parametrize(
    ("method", "state", "ops"),
    [
        ("fake_quant", "calibration", ["observe_"]),
        ("fake_quant", "qat", ["_follow_fake_quant_forward", "_fake_quant_backward"]),
        ("lsq", "qat", ["learned_fake_quant", "_learned_fake_quant_backward"]),
    ],
)
def test_inductor_passes_buffers_on_and_copies_none(method: str, state: str, ops: list[str]):
    """Of a quantizer alone, whose bits are eager's."""
    net = FakeQuantize(method, "percentile")
    net.state = "calibration"
    net(torch.randn(100))
    net.state = "validation"
    net.state = state
    x = torch.randn(40, 50, requires_grad=True)
    twin, other = copy.deepcopy(net), x.detach().clone().requires_grad_()
    code = generated_code(net, x)
    twin(other).sum().backward()
    assert same(snapshot(net), snapshot(twin))
    assert same_bits(x.grad, other.grad)
    for op in ops:
        assert f"torch_ext.{op}.default(" in code
    allocated = re.findall(r"= empty_strided\w*\((\([^)]*\))", code)
    counts = str(tuple(net.observer.counts.shape))
    assert counts not in allocated
    # A buffer of 1 or [C,2] values is what a clone of scale or range would be.
    assert not [shape for shape in allocated if shape in ("(1, )", "(1, 2)", "(1, 5)")]
    assert "clone" not in code


@pytest.mark.parametrize("state", ["calibration", "qat"])
@pytest.mark.parametrize(
    ("method", "inside"),
    [*((method, inside) for method in METHODS for inside in (True, False)), ("lsq anew", False)],
)
def test_checkpointing_and_compiling_observe_once(method: str, state: str, inside: bool):
    """Either way round; the recomputation has the scale of the forward pass."""
    net = ready(method.split()[0], calibrated="anew" not in method)
    set_fake_quantize(net, state)
    twin = copy.deepcopy(net)
    x = images(5).requires_grad_()
    if inside:
        run = torch.compile(
            lambda x: checkpoint(net, x, use_reentrant=False), backend="aot_eager", fullgraph=True
        )
    else:
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        run = lambda x: checkpoint(compiled, x, use_reentrant=False)  # noqa: E731
    for _ in range(2):
        assert_same_tensors(step(run, net, x), step(twin, twin, x))
    # The running statistics of a BatchNorm follow twice: torch's own, without quantizers too.
    left, right = (
        {k: v for k, v in snapshot(one).items() if not re.match(r"bn\d", k)} for one in (net, twin)
    )
    assert same(left, right)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_in_eager_learns_the_same(method: str, use_reentrant: bool):
    net = ready(method, calibrated=False)
    set_fake_quantize(net, "qat")
    for norm in (net.bn1, net.bn2):
        norm.eval()
    twin = copy.deepcopy(net)
    for seed in range(2):
        x = images(5, seed=seed).requires_grad_()
        saved = step(lambda x: checkpoint(net, x, use_reentrant=use_reentrant), net, x)
        assert_same_tensors(saved, step(twin, twin, x))
        assert same(snapshot(net), snapshot(twin))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_statistics_see_what_the_engine_sees(method: str, compiled: bool):
    net = ready(method)
    seen: list[torch.dtype] = []
    net.relu1.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    set_fake_quantize(net, "calibration")
    torch_ext.reset_statistics(net)
    call = torch.compile(net, backend="aot_eager") if compiled else net
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(images())
    observed = net.fc.input_quantizers.input.observer.extrema
    assert same_bits(observed, observed.bfloat16().float())
    assert torch.bfloat16 in seen
    set_fake_quantize(net, "qat")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(images())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert net.conv1.parametrizations.weight.original.grad.abs().sum() > 0
    for quantizer in net.modules():
        if isinstance(quantizer, FakeQuantize):
            assert quantizer.calculate_qparams()[0].dtype == torch.float32
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in quantizer.parameters())


# ---- export --------------------------------------------------------------------------------------

OP = {"fake_quant": "fake_quant", "lsq": "learned_fake_quant", "pact": "learned_fake_quant"}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_validation_exports_to_the_same_numbers(method: str, strict: bool):
    net = ready(method).eval()
    set_fake_quantize(net, "validation")
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    quantizers = sum(isinstance(module, FakeQuantize) for module in net.modules())
    assert targets.count(f"torch_ext.{OP[method]}.default") == quantizers
    x = images(4, seed=5)
    assert same_bits(program.module()(x), net(x))
    assert same_bits(program.run_decompositions().module()(x), net(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("state", ["calibration", "qat"])
def test_a_model_that_would_go_on_changing_is_not_exported(state: str, strict: bool):
    net = ready("fake_quant").eval()
    set_fake_quantize(net, state)
    before = snapshot(net)
    with pytest.raises(
        Exception, match=rf"expected quantizers to be in VALIDATION or FLOAT, got {state}"
    ):
        torch.export.export(net, (images(),), strict=strict)
    assert same(snapshot(net), before)


# ---- the rest of a PyTorch user's life -----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_uses_the_tensors_it_is_given(method: str):
    net = ready(method).eval()
    set_fake_quantize(net, "validation")
    other = ready(method).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    set_fake_quantize(other, "validation")
    given = {k: v.clone() for k, v in other.state_dict().items()}
    before = snapshot(net)
    out = torch.func.functional_call(net, given, (images(),))
    assert same_bits(out, other(images()))
    assert not same_bits(out, net(images()))
    assert same(snapshot(net), before)
