"""Training steps of a net prepared with an example, on ranks and in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nets.tiny_net import images, tiny_net
from torch_ext import (
    calibrate,
    get_default_qconfig,
    keep_statistics_local,
    prepare_qat,
    set_fake_quantize,
)

STEPS = 3


def _net(keys: dict[str, Any]) -> Any:
    """In QAT with fixed ranges, which do not depend on how a batch is split."""
    frozen = {"averaging_constant": 0.0}
    net = tiny_net()
    net.dropout.p = 0.0
    net.qconfig = get_default_qconfig(activation_qkwargs=frozen)  # type: ignore[assignment]
    made = prepare_qat(net, **keys)
    calibrate(made, [images(16, seed=5)], state="qat")
    made.train()
    for norm in (made.bn1, made.bn2):
        norm.eval()  # whose statistics would be those of each rank's part
    return made


def _batch(step: int, rank: int) -> Tensor:
    return images(4, seed=100 + 10 * step + rank)


def _found(net: nn.Module) -> dict[str, Any]:
    """Parameters after the steps, and the output in VALIDATION."""
    found = {}
    for name, parameter in net.named_parameters():
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = full.detach().numpy().copy()
    set_fake_quantize(net, "validation")
    with torch.no_grad():
        found["output"] = np.asarray(net.eval()(images(5)))
    return found


def one_process(world: int, **keys: Any) -> dict[str, Any]:
    """The same steps on the batches of all ranks."""
    net = _net(keys)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = torch.cat([_batch(step, rank) for rank in range(world)])
        net(batch).square().mean().backward()
        optimizer.step()
    return _found(net)


def on_ranks(rank: int, world: int, how: str, keys: dict[str, Any]) -> dict[str, Any]:
    net = _net(keys)
    wrapped = net
    if how == "ddp":
        wrapped = DistributedDataParallel(keep_statistics_local(net))
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for layer in (net.conv1, net.conv2, net.fc):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(_batch(step, rank)).square().mean().backward()
        optimizer.step()
    return _found(net)
