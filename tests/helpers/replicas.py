"""The copies of a model that ``torch.nn.parallel.replicate`` makes, on the CPU, where it raises."""

from __future__ import annotations

from typing import Any

from torch import nn


def replicate_on_cpu(network: nn.Module, count: int) -> list[nn.Module]:
    """Copies whose parameters are results computed from the network's, as a broadcast gives them.

    Those of the first copy share memory with the network's, and so do its buffers.
    """
    modules = list(network.modules())
    index = {module: i for i, module in enumerate(modules)}
    copies: list[list[Any]] = [
        [module._replicate_for_data_parallel() for module in modules]  # type: ignore[no-untyped-call]
        for _ in range(count)
    ]
    for number, replicas in enumerate(copies):
        for module, replica in zip(modules, replicas, strict=True):
            replica._former_parameters = {}
            for key, child in module._modules.items():
                copied = None if child is None else replicas[index[child]]
                setattr(replica, key, copied) if copied is not None else None
            for key, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[key] = None
                else:
                    made = parameter.view_as(parameter) if number == 0 else parameter.clone()
                    setattr(replica, key, made)
                    replica._former_parameters[key] = made
            for key, buffer in module._buffers.items():
                if buffer is not None and number > 0:
                    replica._buffers[key] = buffer.clone()
    return [replicas[0] for replicas in copies]
