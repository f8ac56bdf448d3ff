"""Prepared models that DataParallel copies, and DDP and FSDP2 with ``example_inputs``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nets.tiny_net import images, tiny_net
from prepare_steps import CONFIG
from ranks import inserted, processes
from replicas import replicate_on_cpu
from snapshots import same, same_bits, snapshot
from torch_ext import calibrate, get_default_qconfig, prepare_qat, set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDED: dict[str, Any] = {"example_inputs": images(), "fold_batch_norms": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "example": {"example_inputs": images()},
    "folded": FOLDED,
}


def ready(kind: str, config: Any = CONFIG) -> nn.Module:
    net = tiny_net()
    net.dropout.p = 0.0
    net.qconfig = config  # type: ignore[assignment]
    return prepare_qat(net, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_compute_what_the_model_does(kind: str) -> None:
    net = ready(kind)
    calibrate(net, [images()])
    x = images(5, seed=9)
    net.eval()
    for state in ("validation", "float"):
        set_fake_quantize(net, state)  # type: ignore[arg-type]
        for replica in replicate_on_cpu(net, 2):
            assert same_bits(replica(x).detach(), net(x).detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["fake_quant", "lsq"])
def test_gradients_of_replicas_reach_the_model(kind: str, method: Any) -> None:
    # Frozen ranges, so that the copies quantize alike.
    keys = {"averaging_constant": 0.0}
    config = get_default_qconfig(method, method, activation_qkwargs=keys, weight_qkwargs=keys)
    net = ready(kind, config)
    calibrate(net, [images()], state="qat")
    net.eval()
    parts = images(8, seed=9).chunk(2)
    net(torch.cat(parts)).square().sum().backward()
    want = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    replicas = replicate_on_cpu(net, 2)
    outputs = [replica(x) for replica, x in zip(replicas, parts, strict=True)]
    torch.cat(outputs).square().sum().backward()
    have = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert have.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(have[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_through_replicas_is_refused(kind: str) -> None:
    net, wanted = ready(kind), ready(kind)
    set_fake_quantize(net, "calibration")
    before = snapshot(net)
    with pytest.raises(RuntimeError, match=r"DataParallel: .* in CALIBRATION: .*model\.module"):
        replicate_on_cpu(net, 2)
    assert same(snapshot(net), before)
    calibrate(nn.DataParallel(net).module, [images()])
    calibrate(wanted, [images()])
    assert same(snapshot(net), snapshot(wanted))


@pytest.mark.parametrize("kind", ["example", "folded"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_step_on_two_ranks_is_that_of_one_process(kind: str, how: str) -> None:
    keys = KINDS[kind]
    want = inserted.one_process(2, **keys)
    for found in processes.run(2, inserted.on_ranks, how, keys):
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert np.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
