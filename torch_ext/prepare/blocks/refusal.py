"""The error that names all weights and reads that groups do not fit, and the mapping that helps."""

from __future__ import annotations

from torch import nn

from torch_ext.prepare.blocks.dynamic_axes import DynamicAxes
from torch_ext.prepare.blocks.weight_axes import WeightAxes
from torch_ext.prepare.quantizable_modules import target_of


def refuse_groups(who: str, root: nn.Module, dynamic: DynamicAxes, weights: WeightAxes) -> None:
    """Raises ValueError with the weights and the reads that groups do not fit, if there are any."""
    lines = [problem for _, problem in weights.undivided]
    lines += [f"{name}: {why}" for (name, _), why in dynamic.problems.items()]
    if not lines:
        return
    readers = [reader for _, reader in dynamic.problems]
    owners = dict.fromkeys(
        [*(owner for owner, _ in weights.undivided), *(r.module for r in readers)]
    )
    # A function has the QConfig of its module, whose layers shall keep theirs.
    kept = [
        layer
        for module in dict.fromkeys(r.module for r in readers if r.is_function)
        for layer in _layers(root, module)
        if layer not in owners
    ]
    mapping = f"dict.fromkeys([{', '.join(map(_quoted, owners))}])"
    if kept:
        entries = [f"{_quoted(name)}: None" for name in owners]
        entries += [f"{_quoted(name)}: qconfig" for name in dict.fromkeys(kept)]
        mapping = "{" + ", ".join(entries) + "}"
    wanted = "group_size to divide every weight" if not readers else "groups to fit"
    have = "it does not" if not readers else "do not"
    raise ValueError(
        f"{who}: expected {wanted}, got {len(lines)} that {have}; leave them float with "
        f"mapping={mapping}, or give them a QConfig without group_size in the same way: "
        "dict.fromkeys([...], qconfig)\n" + "\n".join(f"  {line}" for line in lines)
    )


def _quoted(name: str) -> str:
    return f'"{name}"'


def _layers(root: nn.Module, module: str) -> list[str]:
    """The layers in a module, by name."""
    inside = root.get_submodule(module).named_modules(prefix=module)
    return [
        name
        for name, inner in inside
        if name != module and (target := target_of(inner)) is not None and target.weights
    ]
