"""Training of test_distributed.py: DDP and FSDP2."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nets.tiny_net import TinyNet, images, prepared
from ranks.jobs import BATCHES, CONFIG, Values, batches, calibrated_on, plain
from snapshots import same, snapshot
from torch_ext import (
    calibrate,
    fake_quantize_states,
    get_default_qconfig,
    keep_statistics_local,
    load_observer_params,
    named_quantizers,
    quantization_parameters,
    set_fake_quantize,
    sync_observers,
)

RATE = 0.25  # averaging constant
STEPS = 3
LEARNING = get_default_qconfig("lsq", "lsq")


def training_net() -> TinyNet:
    net = prepared(get_default_qconfig(activation_qkwargs={"averaging_constant": RATE}))
    calibrate(net, batches())
    set_fake_quantize(net, "qat")
    net.train()
    for norm in (net.bn1, net.bn2):
        norm.eval()  # their running statistics would be those of each rank's data
    return net


def training_batch(step: int, rank: int) -> Tensor:
    return images(4, seed=100 + 10 * step + rank) * (1 + rank + step)


def train(net: nn.Module, rank: int, sync: bool) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(STEPS):
        torch.manual_seed(step)  # dropout
        optimizer.zero_grad()
        net(training_batch(step, rank)).square().mean().backward()
        optimizer.step()
        if sync:
            sync_observers(net)


def ranges(net: nn.Module) -> Values:
    return {
        f"{name}.{field}": getattr(quantizer, field).detach().numpy().copy()
        for name, quantizer in named_quantizers(net).items()
        for field in ("range", "scale", "zero_point", "solved")
    }


def train_ddp(rank: int, world: int) -> dict[str, Any]:
    """Three steps, with and without `sync_observers` after each."""
    found: dict[str, Any] = {}
    for sync in (True, False):
        net = DistributedDataParallel(keep_statistics_local(training_net()))
        train(net, rank, sync)
        found["synced" if sync else "left alone"] = ranges(net)
        parameters = [p.detach().numpy().copy() for p in net.parameters()]
        found["parameters" if sync else "others"] = parameters
        if sync:
            before = ranges(net)
            sync_observers(net)
            found["same again"] = all(np.array_equal(before[k], v) for k, v in ranges(net).items())
    return found


def train_fsdp(rank: int, world: int) -> dict[str, Any]:
    """Three steps with sharded parameters, then VALIDATION, then CALIBRATION anew."""
    net = training_net()
    for layer in (net.conv1, net.conv2, net.fc):
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    train(net, rank, sync=True)
    found: dict[str, Any] = {"synced": ranges(net)}
    sharded = [p for p in net.parameters() if hasattr(p, "full_tensor")]
    found["sharded"] = len(sharded) == len(list(net.parameters()))
    full = [p.full_tensor().detach() for p in sharded]
    found["parameters"] = [p.numpy().copy() for p in full]
    set_fake_quantize(net, "validation")
    net.eval()
    with torch.no_grad():
        found["output"] = net(images(5)).numpy().copy()
    # A sharded forward waits for that of the others: as many batches on each rank.
    data = batches()[: BATCHES // world * world]
    calibrate(net, data[rank::world], state="calibration")
    sync_observers(net)
    set_fake_quantize(net, "validation")
    found["calibrated"] = ranges(net)
    alone = training_net()
    with torch.no_grad():
        for parameter, value in zip(alone.parameters(), full, strict=True):
            parameter.copy_(value)
    calibrate(alone, data)
    found["alone"] = ranges(alone)
    return found


def learned(net: nn.Module) -> list[Any]:
    found = [
        p.full_tensor() if hasattr(p, "full_tensor") else p for p in quantization_parameters(net)
    ]
    return [p.detach().numpy().copy() for p in found]


def learn(rank: int, world: int) -> dict[str, Any]:
    """lsq without calibration through DDP, and from a calibration through FSDP2."""
    net = prepared(LEARNING)
    set_fake_quantize(net, "qat")
    net(training_batch(0, rank))
    found: dict[str, Any] = {"own start": learned(net)}
    net = prepared(LEARNING)
    set_fake_quantize(net, "qat")
    wrapped = DistributedDataParallel(keep_statistics_local(net))
    train(wrapped, rank, sync=True)
    found["ddp"] = learned(net)

    sharded, refused = prepared(LEARNING), prepared(LEARNING)
    calibrate(sharded, batches())
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    found["before"] = learned(sharded)
    for one in (sharded, refused):
        fully_shard(one, mesh=mesh)
    try:
        set_fake_quantize(refused, "qat")
    except RuntimeError as error:
        found["refused"] = str(error)
    found["refused in"] = {state.value for state in fake_quantize_states(refused).values()}
    set_fake_quantize(sharded, "qat")
    train(sharded, rank, sync=True)
    set_fake_quantize(sharded, "validation")
    found["fsdp"] = learned(sharded)
    found["output"] = sharded(images(5)).detach().numpy().copy()
    # Loading writes each rank's part.
    source = prepared(LEARNING)
    calibrate(source, batches())
    with contextlib.redirect_stdout(None):
        load_observer_params(source, sharded)
    found["loaded"] = learned(sharded)
    return found


def without_ranges(rank: int, world: int) -> tuple[Values, Values]:
    """QAT without calibration where only rank 1 sees data; then ranges by quantizer."""
    net = prepared(mapping={"conv2": LEARNING})
    set_fake_quantize(net, "qat")
    sync_observers(net)  # nobody has a range
    untouched = ranges(net)
    if rank == 1:
        net(images(4))
    sync_observers(net)
    return untouched, ranges(net)


def broadcast(rank: int, world: int) -> tuple[bool, Values]:
    """Calibration through DDP; whether this rank's statistic was its own, and the merged one."""
    net = prepared(CONFIG)
    set_fake_quantize(net, "calibration")
    wrapped = DistributedDataParallel(keep_statistics_local(net))
    alone = calibrated_on([])
    for i, x in enumerate(batches()[rank::world]):
        # DDP's forward waits for that of the others: the one that is too many goes past it.
        (wrapped if i < BATCHES // world else wrapped.module)(x)
        alone(x)
    own = same(
        {k: v for k, v in snapshot(net).items() if "observer" in k},
        {k: v for k, v in snapshot(alone).items() if "observer" in k},
    )
    sync_observers(wrapped)
    set_fake_quantize(wrapped, "validation")
    return own, plain(net)
