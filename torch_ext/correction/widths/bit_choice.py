"""The result of choose_bits: a width for each quantizer, applied to a model and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from torch_ext.calibration.change_bits import Width, check_widths, parse_bits, set_widths
from torch_ext.calibration.restore import restored_on_error
from torch_ext.correction.widths.bit_search import BitPoint
from torch_ext.files.storage import FileError, PathLike, read_object, write_atomically
from torch_ext.ops.registry import OptionValue, encode_options
from torch_ext.ops.registry_names import Rule
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.quantizers.transition import change_state
from torch_ext.utils.text import shown, text_table

#: A number of bits, or ``"float"`` for a quantizer that is off.
Bits = int | Literal["float"]
Budget = Literal["size", "operations"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
_KIND, _VERSION = "bit_choice", 1
_UNITS = {"size": "bytes", "operations": "bit operations"}


@dataclass(frozen=True)
class BitChoiceRow:
    """One quantizer of a :class:`BitChoice`."""

    #: The quantizer's name.
    name: str
    #: ``"input"``, ``"output"`` or ``"weight"``, whichever it quantizes.
    of: str
    #: The width that was chosen, or ``"float"``.
    bits: Bits
    #: The loss at that width, with this quantizer alone; with those in ``together``.
    loss: float
    #: The loss at each width that was offered.
    losses: Mapping[Bits, float]
    #: The names of the quantizers that have to have the same width, itself included.
    together: tuple[str, ...]
    #: Bytes of the weight at that width; 0 for an activation.
    size: float
    #: Bit operations of what reads it, for one sample, at the widths chosen; None if not counted.
    operations: float | None
    #: The rule that the range is solved by at that width.
    rule: Rule
    #: All options of the rule.
    options: Mapping[str, OptionValue]


@dataclass(frozen=True)
class BitChoice:
    """The result of :func:`choose_bits`; as text, a table."""

    #: One per quantizer that was chosen for, those of one ``together`` side by side.
    rows: tuple[BitChoiceRow, ...]
    #: What the budget is of: ``"size"`` or ``"operations"``.
    of: Budget
    #: The budget in bytes, or in bit operations for one sample.
    budget: float
    #: The cost of the choice, in the same unit; other quantizers included.
    cost: float
    #: The cost if the quantizers of ``rows`` had 8 bits each.
    eight: float
    #: The sum of the losses that were measured one by one.
    predicted: float
    #: The metric of the float model.
    floating: float
    #: The metric with all quantizers, at the widths that they had.
    as_it_was: float
    #: The metric with all quantizers, at the widths chosen.
    chosen: float
    #: The metric's name.
    metric: str
    #: Cost and sum of losses from the most bits down to the fewest, step by step.
    curve: tuple[BitPoint, ...] = field(repr=False)

    def __str__(self) -> str:
        counted = any(row.operations is not None for row in self.rows)
        header = ["quantizer", "of", "bits", "loss", "bytes"] + ["bit operations"] * counted
        rows = []
        for row in self.rows:
            cells = [row.name, row.of, str(row.bits), f"{row.loss:+.4g}", f"{row.size:.6g}"]
            if row.operations is not None:
                cells.append(f"{row.operations:.6g}")
            rows.append(cells)
        unit = _UNITS[self.of]
        return "\n".join(
            [
                f"{self.cost:.6g} {unit} of a budget of {self.budget:.6g}, "
                f"{self.cost / self.eight:.3g} times the cost with 8 bits",
                f"{self.metric}: float {self.floating:.4g}, as it was {self.as_it_was:.4g}, "
                f"chosen {self.chosen:.4g} (losses add up to {self.predicted:.4g})",
                text_table(header, rows),
            ]
        )

    def apply(self, model: nn.Module) -> None:
        """Gives a model's quantizers the widths chosen, without data.

        Ranges are solved from the statistics that the model holds. The quantizers are in VALIDATION
        then, those that are to stay float in FLOAT; others stay as they are. Where a later
        ``set_fake_quantize`` turns the float ones on, call this again.

        Args:
            model: the model that was measured, or one with the same quantizers and statistics.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: the model has no quantizers or others, or some that cannot change their
                bits, or a rule does not take the grid.
            RuntimeError: a quantizer has no range and has seen no data, or a weight has no finite
                value.

        If it raises, nothing has changed.
        """
        who = "BitChoice.apply"
        prepared = PreparedModel(who, model)
        missing = [row.name for row in self.rows if row.name not in prepared.quantizers]
        if missing:
            raise ValueError(
                f"{who}: expected model to have the quantizers of the choice, got none named "
                f"{shown(missing)}"
            )
        quantizers = {row.name: prepared.quantizers[row.name] for row in self.rows}
        widths = {
            row.name: Width(row.bits, row.rule, row.options)
            for row in self.rows
            if row.bits != "float"
        }
        check_widths(
            who,
            {name: quantizers[name] for name in widths},
            {name: [width] for name, width in widths.items()},
        )
        with restored_on_error(quantizers):
            set_widths(prepared, widths)
            on = {name: quantizers[name] for name in widths}
            change_state(who, on, FakeQuantState.VALIDATION, prepared.read_weight)
            for name, quantizer in quantizers.items():
                if name not in widths:
                    quantizer.enter(FakeQuantState.FLOAT)

    def save(self, path: PathLike) -> None:
        """Writes the choice to a JSON file, which :meth:`load` reads; completely or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "kind": _KIND,
            "version": _VERSION,
            "of": self.of,
            "metric": self.metric,
            "numbers": {name: repr(getattr(self, name)) for name in _NUMBERS},
            "curve": [[repr(point.cost), repr(point.loss)] for point in self.curve],
            "rows": [_to_json(row) for row in self.rows],
        }
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: PathLike) -> BitChoice:
        """Reads a file of :meth:`save`.

        Raises:
            FileError: a ValueError, for invalid contents.
            OSError: the file cannot be read.
        """
        content = read_object(path)
        for key, want in (("kind", _KIND), ("version", _VERSION)):
            if content.get(key) != want:
                raise FileError(path, f"{key}: expected {want!r}, got {content.get(key)!r}")
        try:
            if content["of"] not in BUDGETS:
                raise ValueError(f"of: expected one of {', '.join(BUDGETS)}")
            return cls(
                rows=tuple(_from_json(row) for row in content["rows"]),
                of=content["of"],
                metric=_text(content["metric"]),
                curve=tuple(BitPoint(*map(_number, point)) for point in content["curve"]),
                **{name: _number(content["numbers"][name]) for name in _NUMBERS},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(path, f"{type(error).__name__}: {error}") from error


_NUMBERS = ("budget", "cost", "eight", "predicted", "floating", "as_it_was", "chosen")


def _to_json(row: BitChoiceRow) -> dict[str, Any]:
    """A row as JSON holds it: numbers that may be infinite or NaN as text."""
    return {
        "name": row.name,
        "of": row.of,
        "bits": row.bits,
        "losses": {str(bits): repr(loss) for bits, loss in row.losses.items()},
        "together": row.together,
        "size": repr(row.size),
        "operations": None if row.operations is None else repr(row.operations),
        "rule": row.rule,
        "options": dict(row.options),
    }


def _from_json(row: Any) -> BitChoiceRow:
    losses = {_bits(bits): _number(loss) for bits, loss in row["losses"].items()}
    bits = _bits(row["bits"])
    encode_options(row["rule"], row["options"])
    operations = row["operations"]
    return BitChoiceRow(
        name=_text(row["name"]),
        of=_text(row["of"]),
        bits=bits,
        loss=losses[bits],
        losses=losses,
        together=tuple(map(_text, row["together"])),
        size=_number(row["size"]),
        operations=None if operations is None else _number(operations),
        rule=row["rule"],
        options=row["options"],
    )


def _bits(value: Any) -> Bits:
    if value == "float":
        return "float"
    return parse_bits("bits", int(value) if isinstance(value, str) else value)[0]


def _number(value: Any) -> float:
    return float(_text(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {str(value)[:80]}")
    return value
