"""Random inputs for an ONNX file, and the time of two ways to compute, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import numpy as np

from torch_ext.utils.arguments import bounded

Shapes = Mapping[str, Sequence[int]]
_LEAST_RUNS = 5


def random_inputs(
    who: str, packages: Any, proto: Any, batch: int, shapes: Shapes | None
) -> dict[str, Any]:
    """Inputs of a file by name: normal floats, and integers that are 0.

    `batch` is the size of an open first axis, `shapes` the whole shape of some inputs.

    Raises:
        TypeError: `shapes` is no mapping.
        ValueError: another axis is open, an input is no tensor of numbers, or `shapes` has names or
            sizes that the file does not have.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    if shapes is not None and not isinstance(shapes, Mapping):
        raise TypeError(
            f"{who}: expected shapes to be a mapping from an input's name to its shape, got "
            f"{bounded(shapes)}"
        )
    given = dict(shapes or {})
    if unknown := [name for name in given if name not in {value.name for value in inputs}]:
        names = ", ".join(value.name for value in inputs)
        raise ValueError(f"{who}: shapes names {bounded(unknown[0])}, the file has {names}")
    random = np.random.default_rng(0)
    made = {}
    for value in inputs:
        kind = _type(packages, value)
        if kind is None:
            raise ValueError(
                f"{who}: expected the file's inputs to be tensors of numbers, to make random ones, "
                f"got {value.name}, which is {_title(packages, value)}; seconds=0 only lists layers"
            )
        axes = value.type.tensor_type.shape.dim
        shape = _shape(who, value.name, axes, batch, given.get(value.name))
        if np.issubdtype(kind, np.floating):
            made[value.name] = random.standard_normal(shape).astype(kind)
        else:
            made[value.name] = np.full(shape, kind == np.bool_, kind)
    return made


def _type(packages: Any, value: Any) -> Any:
    """The type of an input's numbers; None for one that is no tensor, or of text."""
    if not value.type.HasField("tensor_type"):
        return None
    kind = packages.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return None if kind == np.object_ else kind


def _title(packages: Any, value: Any) -> str:
    kind = str(value.type.WhichOneof("value") or "nothing").removesuffix("_type")
    return "a tensor of text" if kind == "tensor" else f"of type {kind}"


def _shape(who: str, name: str, axes: Any, batch: int, given: Sequence[int] | None) -> list[int]:
    fixed = [axis.dim_value if axis.HasField("dim_value") else None for axis in axes]
    if given is not None:
        sizes = _sizes(given)
        fits = len(sizes) == len(fixed) and all(
            size > 0 and size == (size if want is None else want)
            for size, want in zip(sizes, fixed, strict=True)
        )
        if not fits:
            wanted = ", ".join(axis.dim_param or str(axis.dim_value or "?") for axis in axes)
            raise ValueError(
                f"{who}: expected the shape of {name} to be [{wanted}], got {bounded(given)}"
            )
        return sizes
    open_axes = [i for i, size in enumerate(fixed) if size is None]
    if any(open_axes):
        axis = max(open_axes)
        raise ValueError(
            f"{who}: expected shapes to give {name}, whose axis {axis} "
            f"({axes[axis].dim_param or 'without a name'}) is open in the file, got none"
        )
    return [batch if size is None else size for size in fixed]


def _sizes(given: object) -> list[int]:
    """A shape as integers, numpy's too; for anything else what fits no input."""
    try:
        sizes = list(given)  # type: ignore[call-overload]
        return [-1 if isinstance(size, bool) else index(size) for size in sizes]
    except TypeError:
        return [-1]


def side_by_side(
    first: Callable[[], object], second: Callable[[], object], seconds: float
) -> tuple[float, float]:
    """The least time of each in milliseconds, of alternating runs for about so many seconds."""
    best = [float("inf"), float("inf")]
    for run in (first, second):
        run()  # the first run allocates
    end = time.perf_counter() + seconds
    runs = 0
    while runs < _LEAST_RUNS or time.perf_counter() < end:
        for i, run in enumerate((first, second)):
            begun = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - begun)
        runs += 1
    return best[0] * 1000, best[1] * 1000
