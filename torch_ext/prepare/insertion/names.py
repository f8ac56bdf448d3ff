"""Names of the quantizers of values."""

from __future__ import annotations

from torch import fx, nn

from torch_ext.prepare.attach import OUTPUT, SUFFIX
from torch_ext.prepare.insertion.operations import operation
from torch_ext.prepare.insertion.recording import Key, Recording

_STEPS_RUN_BY_TORCH = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Names:
    """Where the quantizer of a value hangs: a module's name, and the child's.

    A result of a module that is one node: ``<module>.activation_quantizer``. A function's: on the
    module whose forward calls it, ``add_quantizer``. A parameter: ``<parameter>_quantizer``. From
    the second call of the same in the forward on, a number follows: ``add_quantizer_1``. The calls
    of the first recording are counted first.
    """

    def __init__(self, recordings: list[Recording]) -> None:
        self._of: dict[Key, tuple[str, str]] = {}
        calls: dict[tuple[str, str], int] = {}
        for recording in recordings:
            for node in recording.graph.nodes:
                key = recording.keys[node]
                if key in self._of:
                    continue
                home, stem = _home(recording, node)
                count = calls[home, stem] = calls.get((home, stem), -1) + 1
                self._of[key] = (home, f"{stem}_{count}" if count else stem)

    def of(self, key: Key) -> tuple[str, str]:
        return self._of[key]


def _home(recording: Recording, node: fx.Node) -> tuple[str, str]:
    target = str(node.target)
    if node.op == "call_module":
        module = recording.model.get_submodule(target)
        # One that has children may run each of them.
        steps = {name for name, _ in module.named_children()} - {"parametrizations"}
        return _above(recording, target, OUTPUT) if steps else (target, OUTPUT)
    if node.op == "get_attr":
        holder, _, name = target.rpartition(".")
        return _host(recording, holder, f"{name}{SUFFIX}")
    kind = operation(recording, node) or getattr(node.target, "__name__", target).strip("_")
    return _host(recording, recording.owners[node], f"{kind}{SUFFIX}")


def _host(recording: Recording, name: str, stem: str) -> tuple[str, str]:
    """The module itself, or the next one above that is no container of steps."""
    module = recording.model.get_submodule(name)
    container = isinstance(module, _STEPS_RUN_BY_TORCH)
    return _above(recording, name, stem) if name and container else (name, stem)


def _above(recording: Recording, name: str, stem: str) -> tuple[str, str]:
    parent, _, own = name.rpartition(".")
    return _host(recording, parent, f"{own}_{stem}")
