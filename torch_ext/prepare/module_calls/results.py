"""Quantizers of what a model returns, in whatever structure it returns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from torch_ext.prepare.module_calls.arguments import (
    Seen,
    all_idle,
    derived_class,
    end_of,
    host_problem,
    key_for,
    made_before,
    quantized_once,
)
from torch_ext.prepare.module_classes import Forward, Undo, swap_class
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.transition import OUTPUTS
from torch_ext.utils.structures import parts_of, rebuilt

# The keys, indices and fields that lead to a tensor; empty for the result itself.
Path = tuple[Any, ...]


class OutputQuantizers(nn.ModuleDict):
    """The quantizers of the tensors that a module returns.

    Args:
        keys: of the quantizer for each tensor, by its path; None if the structure is not known, so
            that one tensor is expected, which has the quantizer ``"0"``.
    """

    def __init__(self, keys: Mapping[Path, str] | None) -> None:
        super().__init__()
        self.keys_by_path = None if keys is None else dict(keys)

    def at(self, path: Path, is_another: bool) -> nn.Module:
        """The quantizer of the tensor at a path; ``is_another``: after other tensors of a call.

        Raises:
            RuntimeError: no such tensor was planned.
        """
        if self.keys_by_path is None and is_another:
            raise RuntimeError(
                "prepare_qat: expected the model to return one floating tensor with output_qconfig "
                "and without example_inputs, got several; pass example_inputs"
            )
        key = "0" if self.keys_by_path is None else self.keys_by_path.get(path)
        if key is None:
            raise RuntimeError(
                "prepare_qat: expected the model to return what it returned for the example_inputs,"
                f" got a floating tensor at {text_of(path)}; pass an example that returns it too "
                "(example_inputs=[(first,), (second,)])"
            )
        return self[key]


def text_of(path: Path) -> str:
    """A path as text: ``0``, ``logits`` or ``features_0``."""
    return "_".join(str(step) for step in path) or "0"


def output_host(who: str, root: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module that get the output quantizers as a child.

    That is the root, or the last step of a Sequential, because a Sequential calls every child.

    Raises:
        ValueError: that module cannot have such a child; the message says why.
    """
    name, host = end_of(root, -1)
    if problem := host_problem(root, name, host, "last"):
        raise ValueError(
            f"{who}: cannot quantize the outputs, as {problem}; pass output_qconfig=None "
            "and put a torch_ext.QuantStub() last"
        )
    return name, host


def add_output_keys(keys: dict[Path, str], result: Any) -> None:
    """Adds keys of quantizers for the tensors in a result, by their paths.

    Floating tensors of one dimension or more have one. A tensor that is there twice has one key.
    """
    seen: list[tuple[Tensor, str]] = []

    def add(path: Path, value: Tensor) -> Tensor:
        known = next((key for before, key in seen if before is value), None)
        seen.append((value, keys.setdefault(path, known or _new_key(keys, path))))
        return value

    _replaced(result, (), add)


def _new_key(keys: dict[Path, str], path: Path) -> str:
    """A name that a module can have as a child, and that no other path has."""
    key = key_for(text_of(path).replace(".", "_"))
    while key in keys.values():
        key += "_"
    return key


def attach_outputs(
    host: nn.Module, quantizers: Mapping[str, FakeQuantize], keys: Mapping[Path, str] | None
) -> Undo:
    """Adds the quantizers and swaps the class; returns the function that undoes it."""
    outputs = OutputQuantizers(keys)
    for key, quantizer in quantizers.items():
        outputs[key] = quantizer
    outputs.train(host.training)
    host.add_module(OUTPUTS, outputs)
    swap_back = swap_class(host, class_with_outputs)

    def undo() -> None:
        swap_back()
        delattr(host, OUTPUTS)

    return undo


def class_with_outputs(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass that quantizes what the forward of ``base`` returns."""
    return derived_class(base, class_with_outputs, _forward_with_outputs)


def _forward_with_outputs(base: type[nn.Module]) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = base.forward(self, *args, **kwargs)
        outputs = self._modules[OUTPUTS]
        assert isinstance(outputs, OutputQuantizers)
        if all_idle(outputs.values()):
            return made
        seen: Seen = []

        def quantized(path: Path, value: Tensor) -> Tensor:
            made = made_before(value, seen)  # asked first: a second place may have no quantizer
            if made is not None:
                return made
            return quantized_once(outputs.at(path, bool(seen)), value, seen)

        return _replaced(made, (), quantized)

    return forward


def _replaced(value: Any, path: Path, replace: Callable[[Path, Tensor], Tensor]) -> Any:
    """The value with its tensors replaced; itself if these stay the same."""
    if isinstance(value, Tensor):
        # Tensors without dimensions are losses and counts.
        return replace(path, value) if value.is_floating_point() and value.dim() > 0 else value
    parts = parts_of(value)
    new = {key: _replaced(part, (*path, key), replace) for key, part in parts.items()}
    changed = any(new[key] is not part for key, part in parts.items())
    return rebuilt(value, new) if changed else value
