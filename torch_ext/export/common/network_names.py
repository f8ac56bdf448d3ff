"""The names that a model's quantizers or layers have in an engine's network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from torch_ext.export.common.entries import refuse
from torch_ext.files.storage import PathLike, name_problem
from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import shown

Names = Mapping[str, str | Sequence[str]] | PathLike | None


def network_names(who: str, names: Names, wanted: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The names in the network for each of the names in `wanted`.

    Args:
        names: a mapping from our name to one name or several in the network; or an ONNX file of
            :func:`onnx`, whose metadata has them; None if the network uses our names.

    Raises:
        ValueError: for a name in `wanted` that `names` lacks or maps to nothing, for a name that is
            not in `wanted`, for a network's name that is given twice or that a line of text cannot
            hold.
        TypeError: if `names` is neither a mapping nor a path.
    """
    wanted = list(wanted)
    if names is None:
        given: Mapping[str, str | Sequence[str]] = {name: name for name in wanted}
    elif isinstance(names, Mapping):
        given = names
        if unknown := [str(name) for name in given if name not in wanted]:
            raise ValueError(f"{who}: names: unknown {shown(unknown)}; known: {shown(wanted)}")
    elif isinstance(names, (str, os.PathLike)):
        from torch_ext.export.common.onnx_metadata import read_onnx_names

        given = read_onnx_names(names)
    else:
        raise TypeError(
            f"{who}: expected names to be a mapping or an ONNX file, got {bounded(names)}"
        )
    mapped: dict[str, tuple[str, ...]] = {}
    problems: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in wanted:
        value = given.get(name, ())
        targets = (value,) if isinstance(value, str) else tuple(value)
        if not targets:
            problems[name] = "names has none for it"
        for target in targets:
            if not isinstance(target, str) or (problem := name_problem(target)):
                want = problem if isinstance(target, str) else "text"
                problems[name] = f"expected its name to be {want}, got {str(target)[:80]!r}"
            elif target in owners:
                problems[name] = f"its name {target!r} is that of {owners[target]}"
            else:
                owners[target] = name
        mapped[name] = targets
    refuse(who, problems, "pass names={quantizer: name in the network}")
    return mapped
