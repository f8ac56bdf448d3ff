"""Prepared models pickled as a whole: for torch.save(model), and for processes that are spawned."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nets.tiny_net import calibrated, images, tiny_net
from paths import ROOT
from snapshots import same, same_bits, snapshot
from torch_ext import (
    calibrate,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)


def again(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def trained(method: str) -> nn.Module:
    model = tiny_net()
    model.qconfig = get_default_qconfig(method, method)  # type: ignore[assignment]
    model = prepare_qat(model)
    set_fake_quantize(model, "qat")
    model(images()).square().mean().backward()
    return model


@pytest.mark.parametrize("method", ["fake_quant", "lsq", "pact"])
def test_a_pickled_model_goes_on_as_the_original(method: str) -> None:
    model = trained(method)
    loaded = again(model)
    assert same(snapshot(loaded), snapshot(model))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert [n for n, _ in loaded.named_modules()] == [n for n, _ in model.named_modules()]
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(named_quantizers(loaded)) == list(named_quantizers(model))
    kinds = [[kind.__name__ for kind in type(m).__mro__] for m in loaded.modules()]
    assert kinds == [[kind.__name__ for kind in type(m).__mro__] for m in model.modules()]
    torch.manual_seed(1)
    want = model(images())
    torch.manual_seed(1)
    assert same_bits(loaded(images()), want)
    for one in (model, loaded):
        set_fake_quantize(one, "validation")
    assert same_bits(loaded.eval()(images()), model.eval()(images()))
    assert same_bits(copy.deepcopy(loaded)(images()), model(images()))


def test_what_is_pickled_shares_nothing_with_the_original() -> None:
    model = calibrated(get_default_qconfig())
    loaded, before = again(model), snapshot(model)
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.zero_()
    assert same(snapshot(model), before)


def test_another_process_reads_a_whole_model(tmp_path: Path) -> None:
    model = calibrated(get_default_qconfig(activation_observer="kl")).eval()
    path = tmp_path / "model.pt"
    torch.save({"model": model, "out": model(images())}, path)
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "helpers")!r})
import torch
from nets.tiny_net import images
saved = torch.load({str(path)!r}, weights_only=False)
import torch_ext
assert torch.equal(saved["model"](images()), saved["out"])
torch_ext.resolve(saved["model"], activation_observer="percentile")
torch_ext.set_fake_quantize(saved["model"], "qat")
saved["model"].train()(images()).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


class Shared(nn.Module):
    """A weight of two layers, attention, and a module that is listed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(self.first(x), self.second(x), self.again(x))[0]
        return out


def test_what_is_shared_stays_shared() -> None:
    model = Shared()
    model.qconfig = get_default_qconfig("lsq", "lsq")
    x = torch.randn(5, 3, 4)
    prepared = prepare_qat(model).eval()
    calibrate(prepared, [(x,)])
    loaded = again(prepared)
    assert loaded.again is loaded.first
    weights = [m.parametrizations.weight.original for m in (loaded.first, loaded.second)]
    assert weights[0] is weights[1]
    assert len(list(loaded.parameters())) == len(list(prepared.parameters()))
    assert same_bits(loaded(x), prepared(x))


def test_a_layer_that_is_the_whole_model() -> None:
    model = nn.Linear(4, 3)
    model.qconfig = get_default_qconfig()
    prepared, x = prepare_qat(model), torch.randn(7, 4)
    calibrate(prepared, [x])
    assert same_bits(again(prepared)(x), prepared(x))
    assert type(again(prepared)).__name__ == type(prepared).__name__
    assert same_bits(copy.deepcopy(prepared)(x), prepared(x))


def test_a_weight_that_something_else_computes_is_named() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    model.qconfig = get_default_qconfig()
    prepared = prepare_qat(model)
    before = snapshot(prepared)
    with pytest.raises(RuntimeError) as caught:
        pickle.dumps(prepared)
    assert "expected weight of a Linear to have quantizers alone, got a _WeightNorm" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert same(snapshot(prepared), before)
    # What the message says works.
    other = prepare_qat(copy.deepcopy(model))
    other.load_state_dict(prepared.state_dict())
    assert same(snapshot(other), before)
