"""What was done to a model: its quantizers, and the modules that stayed float."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torch_ext.prepare.attach import attached
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import check_model, named_quantizers, role_of
from torch_ext.quantizers.grid import dtype_name
from torch_ext.utils.text import text_table

_HEADER = ("quantizer", "of", "method", "observer", "grid", "state", "scale")


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer."""

    name: str
    of: str  # see role_of
    method: str
    observer: str
    grid: str
    state: str
    scale: str

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.name, self.of, self.method, self.observer, self.grid, self.state, self.scale
        )  # fmt: skip


@dataclass(frozen=True)
class Description:
    """Printed, a table."""

    quantizers: tuple[QuantizerRow, ...]
    float_modules: tuple[tuple[str, str], ...]  # name and type of leaf modules without a quantizer

    def __str__(self) -> str:
        text = text_table(_HEADER, [row.cells for row in self.quantizers])
        if self.float_modules:
            left = ", ".join(f"{name} ({kind})" for name, kind in self.float_modules)
            text += f"\nfloat: {left}"
        return text


def describe(model: nn.Module) -> Description:
    """The quantizers of a model and the leaf modules that have none."""
    root = check_model("describe", model)
    quantizers = named_quantizers(root)
    inside = tuple(f"{name}." for name in quantizers)
    left = []
    for name, module in root.named_modules():
        own = isinstance(module, FakeQuantize) or name.startswith(inside)
        if not name or own or attached(module) or any(module.children()):
            continue
        left.append((name, type(module).__name__))
    rows = tuple(_row(name, quantizer) for name, quantizer in quantizers.items())
    return Description(rows, tuple(left))


def _row(name: str, quantizer: FakeQuantize) -> QuantizerRow:
    observer = quantizer.observer
    options = ", ".join(f"{key}={value}" for key, value in observer.options.items())
    scheme = str(observer.qscheme).removeprefix("torch.").replace("_", " ")
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
    if quantizer.solved.is_meta or not bool(quantizer.solved):
        return "none yet"
    try:
        scale, _ = quantizer.calculate_qparams()
    except ValueError:  # an optimizer left the numbers
        return "not finite"
    low, high = float(scale.min()), float(scale.max())
    return f"{low:.6g}" if len(scale) == 1 else f"{low:.6g} to {high:.6g} ({len(scale)})"
