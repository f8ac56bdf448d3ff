"""Which tensors or layers of an engine's network a model's quantizers belong to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from torch_ext.export.common.entries import refuse
from torch_ext.files.storage import PathLike, name_problem
from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import shown

Names = Mapping[str, str | Sequence[str]] | PathLike | None


def network_names(who: str, names: Names, wanted: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The names in the network for each of ours; without `names` they are the same.

    Raises ValueError where one of ours is not named or unknown, where two share a name, and for
    names that no line of text can hold.
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
    found: dict[str, tuple[str, ...]] = {}
    problems: dict[str, str] = {}
    owners: dict[str, str] = {}
    for own in wanted:
        theirs = given.get(own, ())
        listed = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        if not listed:
            problems[own] = "names has none for it"
        for one in listed:
            if not isinstance(one, str) or (problem := name_problem(one)):
                want = problem if isinstance(one, str) else "text"
                problems[own] = f"expected its name to be {want}, got {str(one)[:80]!r}"
            elif one in owners:
                problems[own] = f"its name {one!r} is that of {owners[one]}"
            else:
                owners[one] = own
        found[own] = listed
    refuse(who, problems, "pass names={quantizer: name in the network}")
    return found
