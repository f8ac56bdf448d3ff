"""What runs a model for its own purposes has to leave it as it was."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torch_ext._states import FakeQuantState
from torch_ext._walk import named_quantizers, shown
from torch_ext.fake_quant import FakeQuantize


@contextlib.contextmanager
def restored_on_error(quantizers: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Puts buffers, rules and states back when what runs inside fails."""
    put_back = _keep(quantizers)
    try:
        yield
    except BaseException:
        put_back()
        raise


@contextlib.contextmanager
def restored(quantizers: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Puts buffers, rules and states back at the end, however it ends."""
    put_back = _keep(quantizers)
    try:
        yield
    finally:
        put_back()


def _keep(quantizers: Mapping[str, FakeQuantize]) -> Callable[[], None]:
    states = {
        name: (q.state, q.passes_through, q.observer.synced) for name, q in quantizers.items()
    }
    rules = {name: (q.observer.name, q.observer.options) for name, q in quantizers.items()}
    kept = {
        name: {key: value.clone() for key, value in q.state_dict().items()}
        for name, q in quantizers.items()
    }

    def put_back() -> None:
        for name, quantizer in quantizers.items():
            state, passing, synced = states[name]
            rule, options = rules[name]
            quantizer.enter(FakeQuantState.FLOAT)
            quantizer.observer.set_rule(rule, **options)
            quantizer.load_state_dict(kept[name])
            quantizer.observer.synced = synced
            quantizer.enter(state, pass_through=passing)

    return put_back


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; each gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def forked_rng(model: nn.Module) -> Iterator[None]:
    """Torch's random state, of the CPU and of the model's devices, is put back."""
    tensors = (*model.parameters(), *model.buffers())
    cuda = {tensor.device for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in cuda)):
        yield


def autocasting(autocast: torch.dtype | bool | None, device: torch.device) -> Any:
    if autocast is None or autocast is False:
        return contextlib.nullcontext()
    dtype = None if autocast is True else autocast
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def watched(who: str, model: nn.Module) -> Iterator[None]:
    """Warns when the forward itself wrote to the model's parameters or buffers."""
    skip = {
        id(tensor)
        for quantizer in named_quantizers(model).values()
        for tensor in quantizer.buffers()
    }
    tensors = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in skip and not tensor.is_inference()
    }
    versions = {name: tensor._version for name, tensor in tensors.items()}
    yield
    changed = [name for name, tensor in tensors.items() if tensor._version != versions[name]]
    if changed:
        warnings.warn(
            f"{who}: the model's forward changed {shown(changed)} although in eval mode",
            stacklevel=4,
        )
