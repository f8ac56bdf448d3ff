"""prepare_qat with example_inputs on the architectures that people use."""

from __future__ import annotations

import pytest
import torch

from grid_checks import off_grid
from nets.architectures import ZOO, architecture
from prepare_steps import CONFIG, names, run_calibration
from snapshots import same_bits
from torch_ext import float_state_dict, prepare_qat, set_fake_quantize

# Convolutions, linear layers and products of two activations in one forward, counted by hand.
CALLS = {
    "resnet18": 20 + 1,
    "mobilenet_v3_small": 52 + 2,
    "efficientnet_b0": 81 + 1,
    "vit_b_16": 1 + 12 * (4 + 1) + 1,
    "convnext_atto": 4 + 12 * 3 + 1,
    "swin": 1 + 4 * (4 + 2) + 1 + 1,
}
# Quantizers of activations and of weights: another number is another placement.
QUANTIZERS = {
    "resnet18": (30, 21),
    "mobilenet_v3_small": (79, 54),
    "efficientnet_b0": (124, 82),
    "vit_b_16": (111, 50),
    "convnext_atto": (54, 41),
    "swin": (47, 19),
}


@pytest.mark.parametrize("name", ZOO)
def test_a_real_architecture(name: str) -> None:
    torch.set_num_threads(1)
    plain, x = architecture(name)
    plain.qconfig = CONFIG  # type: ignore[assignment]
    model = prepare_qat(plain, example_inputs=x)
    assert type(model).__mro__[1] is type(plain)

    # FLOAT is the original, in eval mode and in train mode, with its buffers and gradients.
    # (Without gradients torch runs attention by a fused path of its own, which rounds otherwise.)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert same_bits(plain.eval()(x).detach(), model.eval()(x).detach())
    losses = []
    for one in (plain, model):
        torch.manual_seed(1)
        losses.append(one.train()(x).square().mean())
        losses[-1].backward()
    assert same_bits(losses[0].detach(), losses[1].detach())
    state = float_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    assert all(same_bits(value, state[key]) for key, value in plain.state_dict().items())
    own = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        twin = own[key] if key in own else own[_original(key)]
        assert parameter.grad is not None
        assert twin.grad is not None
        assert torch.equal(parameter.grad, twin.grad), key

    run_calibration(model.eval(), x)
    found, seen = off_grid(model, x)
    assert not found
    assert sum(seen.values()) == CALLS[name]
    weights = {one for one in names(model) if ".parametrizations." in one}
    assert (len(names(model) - weights), len(weights)) == QUANTIZERS[name]
    assert sum(seen.values()) == CALLS[name]

    set_fake_quantize(model, "qat")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.zero_grad()
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    before = next(model.parameters()).detach().clone()
    optimizer.step()
    assert not torch.equal(before, next(model.parameters()))


def _original(key: str) -> str:
    owner, _, name = key.rpartition(".")
    return f"{owner}.parametrizations.{name}.original".strip(".")
