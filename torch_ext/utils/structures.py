"""Structures of values, such as what a model returns: their parts, and the same with other parts.

Known are mappings, tuples (named too), lists, dataclasses and what ``torch.utils._pytree`` knows;
transformers' ``ModelOutput`` is a mapping and a dataclass at once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree

_PLAIN = (int, float, bool, str, bytes, type(None))


def parts_of(value: Any) -> dict[Any, Any]:
    """The parts by key, field or index; empty for what has none."""
    if type(value) in _PLAIN:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", range(len(value)))
        return dict(zip(fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    node = pytree.SUPPORTED_NODES.get(type(value))
    return {} if node is None else dict(enumerate(node.flatten_fn(value)[0]))


def rebuilt(value: Any, parts: dict[Any, Any]) -> Any:
    """The structure of the same class with other parts, all those of :func:`parts_of`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _with_fields(value, parts)
    if type(value) in (dict, list, tuple):
        return type(value)(parts if type(value) is dict else parts.values())
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for key, part in parts.items():
            made[key] = part
        return made
    if isinstance(value, tuple):
        named = hasattr(value, "_fields")
        return type(value)(*parts.values()) if named else type(value)(list(parts.values()))
    if isinstance(value, list):
        made = copy.copy(value)
        made[:] = parts.values()
        return made
    node = pytree.SUPPORTED_NODES[type(value)]
    return node.unflatten_fn(list(parts.values()), node.flatten_fn(value)[1])


def _with_fields(value: Any, parts: dict[Any, Any]) -> Any:
    if all(field.init for field in dataclasses.fields(value)):
        return dataclasses.replace(value, **parts)
    made = copy.copy(value)
    for name, part in parts.items():
        object.__setattr__(made, name, part)  # also where the class is frozen
    return made
