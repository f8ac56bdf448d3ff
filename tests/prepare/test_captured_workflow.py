"""A model prepared with an example, with every other function of the package, and with torch's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_ext
from counted_graphs import compile_counting
from grid_checks import off_grid
from prepare_steps import CONFIG, OTHER, names, ready, run_calibration
from ranks.processes import run
from snapshots import same, same_bits, snapshot
from torch_ext import named_quantizers

HISTOGRAM = torch_ext.get_default_qconfig(activation_observer="percentile")


pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Residual, concatenation, product, attention and functional layers, after one another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.gate, self.down = nn.Conv2d(6, 6, 1), nn.Conv2d(12, 8, 3, stride=2)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = x + x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = self.down(torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1))
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = self.head(F.dropout(x.mean(1), 0.2, self.training))
        return out


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def images(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def captured(config: torch_ext.QConfig = HISTOGRAM, **keys: Any) -> nn.Module:
    return ready(block().eval(), config, example_inputs=images(2), **keys)


def test_calibrate_resolve_describe_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = captured(verbose=True)
    assert capsys.readouterr().out == f"{torch_ext.describe(net)}\n"
    assert {row.name for row in torch_ext.describe(net).quantizers} == names(net)
    summary = torch_ext.calibrate(net, [images(4), images(4, 2)], progress=False)
    assert not summary.unobserved
    assert set(torch_ext.fake_quantize_states(net)) == names(net)
    assert off_grid(net, images())[0] == []
    before = net(images()).detach()
    torch_ext.resolve(net, activation_observer="kl")
    assert not same_bits(net(images()).detach(), before)
    torch_ext.save_observer_params(net, tmp_path / "params.safetensors")
    other = captured()
    torch_ext.load_observer_params(tmp_path / "params.safetensors", other)
    torch_ext.set_fake_quantize(other, "validation")
    assert same_bits(other(images()).detach(), net(images()).detach())
    torch_ext.reset_statistics(net)


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_methods_that_learn(method: str) -> None:
    net = captured(torch_ext.get_default_qconfig(method, "lsq"))
    run_calibration(net, images())
    torch_ext.set_fake_quantize(net, "qat")
    learned = torch_ext.quantization_parameters(net)
    before = [p.detach().clone() for p in learned]
    optimizer = torch.optim.SGD(learned, lr=0.01)
    net(images()).square().sum().backward()
    optimizer.step()
    assert not all(map(same_bits, before, learned))
    torch_ext.set_fake_quantize(net, "validation")
    assert off_grid(net, images())[0] == []


def test_statistics_do_not_depend_on_the_batches() -> None:
    nets = [captured() for _ in range(2)]
    torch_ext.calibrate(nets[0], [images(8)], progress=False)
    parts = [images(8)[i : i + 1] for i in reversed(range(8))]
    with torch.no_grad():  # a float net may round differently for another batch size
        torch_ext.calibrate(nets[1], parts, progress=False)
    left, right = (named_quantizers(net) for net in nets)
    for name, quantizer in left.items():
        assert torch.allclose(quantizer.range, right[name].range, rtol=1e-4, atol=1e-5), name
        assert int(quantizer.observer.tally[0, 0]) == int(right[name].observer.tally[0, 0])


def test_float_checkpoints() -> None:
    source, net = block(seed=7), captured()
    torch_ext.load_float_state_dict(net, source.state_dict())
    assert same_bits(net(images()).detach(), source.eval()(images()).detach())
    assert torch_ext.float_state_dict(net).keys() == source.state_dict().keys()
    fresh = captured()
    fresh.load_state_dict(net.state_dict())
    assert same_bits(fresh(images()).detach(), net(images()).detach())


def test_copies_and_pickles() -> None:
    net = captured()
    twin = copy.deepcopy(copy.deepcopy(net))
    assert isinstance(twin, Block)
    run_calibration(twin, images())
    assert not any(bool(q.solved) for q in named_quantizers(net).values())
    assert off_grid(twin, images())[0] == []
    for state in ("float", "validation"):
        torch_ext.set_fake_quantize(twin, state)
        read = pickle.loads(pickle.dumps(twin))
        assert same_bits(read(images()).detach(), twin(images()).detach())
        assert off_grid(read, images())[0] == off_grid(twin, images())[0]


def test_compiling_gives_one_graph_per_state(monkeypatch: pytest.MonkeyPatch) -> None:
    net = captured()
    compiled, graphs = compile_counting(net)
    # Only eager code runs attention by torch's fused path, which rounds otherwise.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    for _ in range(2):
        for state in ("float", "calibration", "validation", "qat"):
            torch_ext.set_fake_quantize(net, state)
            twin = copy.deepcopy(net)
            with torch.no_grad():
                assert same_bits(compiled(images()), twin(images()))
            assert same(snapshot(net), snapshot(twin))
    assert len(graphs) == 4


def test_export_of_validation() -> None:
    net = captured()
    run_calibration(net, images())
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": {0: batch}})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    calls = targets.count("torch_ext.fake_quant.default")
    # The operands of the cat share one, and so do the parts of one linear layer's result that
    # attention reads as query, key and value.
    assert calls == len(names(net)) + 1 + 2
    x = images(7, 3)
    assert same_bits(program.module()(x).detach(), net(x).detach())


def test_several_ranks() -> None:
    found = run(2, _synced)
    whole = captured()
    torch_ext.calibrate(whole, [images(8)], state="calibration", progress=False)
    for name, quantizer in named_quantizers(whole).items():
        if not quantizer.transient:
            want = int(quantizer.observer.tally.sum())
            assert [rank[name] for rank in found] == [want, want], name


def _synced(rank: int, world: int) -> dict[str, int]:
    torch.set_num_threads(1)
    net = captured()
    shard = images(8)[rank * 4 : rank * 4 + 4]
    torch_ext.calibrate(net, [shard], state="calibration", progress=False)
    torch_ext.sync_observers(net)
    return {name: int(q.observer.tally.sum()) for name, q in named_quantizers(net).items()}


def test_fused_batch_norms() -> None:
    plain = block().eval()
    plain.bn.running_var.uniform_(0.5, 2)
    fused = torch_ext.fuse(plain)
    net = ready(fused, example_inputs=images())
    assert same_bits(net(images()).detach(), fused(images()).detach())
    assert names(net) == names(ready(plain, example_inputs=images()))


def test_other_observers_and_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        plain = block().to(dtype).eval()
        net = ready(plain, OTHER, example_inputs=images().to(dtype))
        assert same_bits(
            net(images().to(dtype)).detach().double(), plain(images().to(dtype)).detach().double()
        )
        run_calibration(net, images().to(dtype))
    made = ready(block().to("meta"), CONFIG, example_inputs=images().to("meta"))
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"meta"}
