"""Context managers that restore what a run of a model changes: modes, random states, globals."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Values of globals and of attributes of classes that are data.
_DATA = (type(None), bool, int, float, complex, str, bytes, tuple, dict, list, set, Tensor)
_MAX_ENTRIES = 10_000  # of a container, with those inside, whose entries are restored
_NOT_USERS = ("torch", "torch_ext", "builtins", "typing", "abc", "collections")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts all modules in eval mode, and restores each module's mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def forked_rng(model: nn.Module) -> Iterator[None]:
    """Restores torch's random state, of the CPU and of the model's CUDA devices, at the end."""
    tensors = (*model.parameters(), *model.buffers())
    cuda = {tensor.device for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in cuda)):
        yield


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores, after a run of a copy of the model, what the copy shares with it.

    That is the random state of torch, as ``forked_rng`` does, of ``random`` and of NumPy, and data
    that code keeps outside of the modules: attributes of their classes, globals of the files that
    define these, and the entries of such dicts, lists and sets. A table that the run computed,
    without gradients, would otherwise be the one that training finds.
    """
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    states = (random.getstate(), None if numpy_random is None else numpy_random.get_state())
    holders = _holders(model)
    before = [{n: (value, _containers(value)) for n, value in _data(h)} for h in holders]
    try:
        with forked_rng(model):
            yield
    finally:
        random.setstate(states[0])
        if numpy_random is not None:
            numpy_random.set_state(states[1])
        for holder, known in zip(holders, before, strict=True):
            for name, value in _data(holder):
                if name not in known:
                    delattr(holder, name)
                elif value is not known[name][0]:
                    setattr(holder, name, known[name][0])
            for _, containers in known.values():
                for container, entries in containers:
                    _restore_entries(container, entries)


def _holders(model: nn.Module) -> list[Any]:
    """The classes of a model's modules, and the files that define them, once each."""
    found: dict[int, Any] = {}
    for kind in {kind for module in model.modules() for kind in type(module).__mro__}:
        if kind.__module__.partition(".")[0] not in _NOT_USERS:
            home = sys.modules.get(kind.__module__)
            found |= {id(holder): holder for holder in (kind, home) if holder is not None}
    return list(found.values())


def _data(holder: Any) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in list(vars(holder).items())
        if isinstance(value, _DATA) and not name.startswith("__")
    ]


def _containers(value: Any) -> list[tuple[Any, list[Any]]]:
    """A dict, list or set, those inside of it, and the entries of each; few large ones at most."""
    found: list[tuple[Any, list[Any]]] = []
    level, left = [value], _MAX_ENTRIES
    for _ in range(3):
        inside: list[Any] = []
        for container in level:
            if isinstance(container, (dict, list, set)) and len(container) <= left:
                left -= len(container)
                found.append((container, _entries(container)))
                inside += container.values() if isinstance(container, dict) else container
        level = inside
    return found


def _entries(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _restore_entries(container: Any, entries: list[Any]) -> None:
    parts = [
        [id(part) for entry in some for part in (entry if isinstance(container, dict) else [entry])]
        for some in (_entries(container), entries)
    ]
    if parts[0] == parts[1]:
        return
    container.clear()
    if isinstance(container, list):
        container.extend(entries)
    elif isinstance(container, set):
        container.update(entries)
    else:  # a Counter's update() would count the pairs
        for key, value in entries:
            container[key] = value


class _Uncompiled:
    """How many threads run compiled functions as written now; torch's setting is one for all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.stance: Any = None


_UNCOMPILED = _Uncompiled()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Runs functions that ``torch.compile`` made as they are written; in all threads meanwhile."""
    with _UNCOMPILED.lock:
        if _UNCOMPILED.depth == 0:
            _UNCOMPILED.stance = torch.compiler.set_stance("force_eager")
        _UNCOMPILED.depth += 1
    try:
        yield
    finally:
        with _UNCOMPILED.lock:
            _UNCOMPILED.depth -= 1
            if _UNCOMPILED.depth == 0:
                _UNCOMPILED.stance.__exit__(None, None, None)


def autocasting(autocast: torch.dtype | bool | None, device: torch.device) -> Any:
    """The ``torch.autocast`` context of a device, or a null context for None and False.

    True is the device's default dtype, a dtype is that one.
    """
    if autocast is None or autocast is False:
        return contextlib.nullcontext()
    dtype = None if autocast is True else autocast
    return torch.autocast(device.type, dtype=dtype)


def _reads_export_flag() -> bool:
    return torch.compiler._is_exporting_flag


# Dynamo of torch 2.11 takes torch.compiler.is_exporting() for True in every compiled forward.
is_exporting: Callable[[], bool] = (
    _reads_export_flag if torch.__version__.startswith("2.11.") else torch.compiler.is_exporting
)
"""Whether ``torch.export`` runs the forward, also seen from compiled code."""
