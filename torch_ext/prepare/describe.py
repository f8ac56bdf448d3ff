"""Describes a prepared model: its quantizers, and the modules that stayed float."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torch_ext.prepare.attach import attached
from torch_ext.prepare.insertion.running import is_tracked
from torch_ext.quantizers.dynamic import DynamicFakeQuantize
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import check_model, named_quantizers, role_of
from torch_ext.quantizers.grid import dtype_name
from torch_ext.utils.text import text_table

_NOT_SEEN = (
    "functions (x + y, torch.matmul, torch.cat, ...): float, as they were not looked at; "
    "prepare_qat(model, example_inputs=...) quantizes them"
)
_HEADER = ("quantizer", "of", "method", "observer", "grid", "state", "scale")


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer in a :class:`Description`, as text."""

    #: Its name in the model.
    name: str
    #: ``"input"`` of the model or of a layer, ``"output"`` of a module, function or the model, or
    #: ``"weight"``.
    of: str
    #: The fake-quant method, such as ``"lsq"``.
    method: str
    #: The rule with its options, such as ``"percentile(percentile=99.9)"``.
    observer: str
    #: The dtype, its integers and the scheme, as ``int8 [-128, 127], per tensor symmetric`` or
    #: ``int4 [-8, 7], groups of 32 symmetric`` or ``int8 [-128, 127], dynamic per token
    #: symmetric``.
    grid: str
    #: The value of its :class:`FakeQuantState`.
    state: str
    #: The scale, or the least and the greatest of all channels; ``"none yet"`` before solving,
    #: ``"dynamic"`` if each call has its own.
    scale: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts of this row of the table, from left to right."""
        return (
            self.name, self.of, self.method, self.observer, self.grid, self.state, self.scale
        )  # fmt: skip


@dataclass(frozen=True)
class Description:
    """The result of :func:`describe`; ``str()`` gives a table."""

    #: One row per quantizer.
    quantizers: tuple[QuantizerRow, ...]
    #: Name and type of each leaf module without a quantizer.
    float_modules: tuple[tuple[str, str], ...]
    #: Whether ``prepare_qat`` saw what functions the forward calls: with ``example_inputs`` it did.
    functions_seen: bool = True

    def __str__(self) -> str:
        text = text_table(_HEADER, [row.cells for row in self.quantizers])
        if self.float_modules:
            modules = ", ".join(f"{name} ({kind})" for name, kind in self.float_modules)
            text += f"\nfloat: {modules}"
        if not self.functions_seen:
            text += f"\n{_NOT_SEEN}"
        return text


def describe(model: nn.Module) -> Description:
    """Lists the quantizers of a model, and its leaf modules that have none.

    Args:
        model: any model, wrapped or not; one that is not prepared has no quantizers to list.

    Raises:
        TypeError: ``model`` is no module.
    """
    root = check_model("describe", model)
    quantizers = named_quantizers(root)
    inside = tuple(f"{name}." for name in quantizers)
    float_modules = []
    for name, module in root.named_modules():
        of_quantizer = isinstance(module, FakeQuantize) or name.startswith(inside)
        if not name or of_quantizer or attached(module) or any(module.children()):
            continue
        float_modules.append((name, type(module).__name__))
    rows = tuple(_row(name, quantizer) for name, quantizer in quantizers.items())
    by_forward = any(is_tracked(module) for module in root.modules())
    return Description(rows, tuple(float_modules), functions_seen=by_forward or not rows)


def _row(name: str, quantizer: FakeQuantize) -> QuantizerRow:
    observer = quantizer.observer
    options = ", ".join(f"{key}={value}" for key, value in observer.options.items())
    scheme = str(observer.qscheme).removeprefix("torch.").replace("_", " ")
    if isinstance(quantizer, DynamicFakeQuantize):
        scheme = scheme.replace("per tensor", f"dynamic {quantizer.scales_text}")
    elif observer.group_size is not None:
        scheme = scheme.replace("per channel", f"groups of {observer.group_size}")
    return QuantizerRow(
        name=name,
        of=role_of(name, quantizer),
        method=quantizer.method,
        observer=f"{observer.name}({options})" if options else observer.name,
        grid=f"{dtype_name(observer.dtype)} [{observer.quant_min}, {observer.quant_max}], {scheme}",
        state=quantizer.state.value,
        scale=_scale(quantizer),
    )


def _scale(quantizer: FakeQuantize) -> str:
    if quantizer.rangeless:
        return "dynamic"
    if quantizer.solved.is_meta or not bool(quantizer.solved):
        return "none yet"
    try:
        scale, _ = quantizer.calculate_qparams()
    except ValueError:  # training made the learned parameters infinite or NaN
        return "not finite"
    low, high = float(scale.min()), float(scale.max())
    return f"{low:.6g}" if len(scale) == 1 else f"{low:.6g} to {high:.6g} ({len(scale)})"
