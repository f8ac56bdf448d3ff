"""The observer module: a statistic of the data, and the rule that computes a range from it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from torch_ext import ops
from torch_ext.ops.registry import OptionValue, encode_options, observer_info
from torch_ext.ops.registry_names import Rule
from torch_ext.ops.statistics import ScaleRule
from torch_ext.quantizers.grid import DType, Grid, dtype_name, parse_grid, text_of_grid
from torch_ext.quantizers.parts.groups import from_rows, rows_of
from torch_ext.quantizers.parts.keep_dtype import TensorMap, keep_dtype
from torch_ext.quantizers.parts.keys import check_keys, check_scale_rule
from torch_ext.utils.arguments import parse_flag, parse_integer

# Mantissa bits and octaves of the histogram, which takes 256 KiB, or 24 KiB per channel.
_LAYOUT_PER_TENSOR = (10, 16)
_LAYOUT_PER_CHANNEL = (7, 12)
_GRID_PARTS = {"dtype", "qscheme", "quant_min", "quant_max", "scale_rule", "power_of_two"}


class Observer(nn.Module):
    """Accumulates a statistic of the tensors it is called with; a rule computes a range from it.

    The statistic depends on the values alone: batch size, batch order, number of threads and
    device do not change a bit of it.

    Args:
        name: the rule, one of ``torch_ext.observers()``.
        dtype: the integers of the grid: ``torch.int8``, ``"uint8"``, ``"int4"``, ``"qint8"`` or
            others of 2 to 16 bits. Or a float format, ``"float8_e4m3"`` or ``"float8_e5m2"``,
            which is symmetric: the scale takes the range to its largest number, 448 or 57344.
            ``"float6_e2m3"``, ``"float6_e3m2"`` and ``"float4_e2m1"`` only in groups.
        qscheme: ``torch.per_tensor_symmetric``, ``per_tensor_affine``, ``per_channel_symmetric``
            or ``per_channel_affine``, or the name as text.
        ch_axis: the axis of the channels, with a per-channel scheme; else -1. With ``group_size``
            the axis that groups lie along, 1 by default.
        channel_len: the number of channels C; 1 with a per-tensor scheme. With ``group_size`` the
            number of groups.
        quant_min, quant_max: the ends of the grid; None: those of the dtype. With [-127,127] a
            symmetric scale is the largest magnitude divided by 127.
        scale_rule: ``"grid"``, or ``"tvm"`` to divide by 2^(bits-1); ``"floor"`` and ``"even"`` (of
            float formats) for scales 2^k by which the largest values may saturate, see
            ``ops.qparams``.
        power_of_two: round the scale up to 2^k; not with ``"floor"`` and ``"even"``.
        mantissa_bits, octaves: layout of the histogram, 5..10 and 4..32; None: 10 and 16, with
            channels 7 and 12.
        histogram: keep a histogram although this rule reads none, so that rules that do can be
            solved later from the same statistic.
        transient: keep no histogram although the rule reads one. For weights, whose range is
            computed from the weight itself.
        group_size: so many consecutive values along ``ch_axis`` share a scale; ``qscheme`` then
            only says whether the grid is symmetric. For weights: the statistic is that of the whole
            tensor, and :meth:`range` raises; see :class:`FakeQuantize`.
        **options: options of the rule, such as ``percentile=99.9``.

    Raises:
        TypeError, ValueError, RuntimeError: an unknown rule, key or option, or a value that does
            not fit the grid or the rule.

    Attributes:
        extrema: float32 [C,2], buffer: least and greatest finite value.
        tally: int64 [C,5], buffer: numbers of finite, zero, tiny, infinite and NaN values. Tiny
            ones are below the histogram's window.
        counts: int64 [C,2,octaves,2^mantissa_bits], buffer: the histogram; [C,2,0,0] without one.
        grid_text: the grid, and how a range becomes a scale on it, as the text that ops take.
        synced: whether the statistic holds the data of all ranks, see ``sync_observers``. Files of
            ``save_observer_params`` keep it, ``state_dict`` does not.
    """

    _version = 1
    _in_groups = False  # whether a few values each share a scale

    extrema: Tensor
    tally: Tensor
    counts: Tensor
    grid_text: str
    synced: bool

    def __init__(
        self,
        name: Rule,
        dtype: DType = torch.int8,
        qscheme: torch.qscheme | str = torch.per_tensor_symmetric,
        ch_axis: int = -1,
        channel_len: int = 1,
        quant_min: int | None = None,
        quant_max: int | None = None,
        *,
        scale_rule: ScaleRule = "grid",
        power_of_two: bool = False,
        mantissa_bits: int | None = None,
        octaves: int | None = None,
        histogram: bool | None = None,
        transient: bool = False,
        group_size: int | None = None,
        **options: OptionValue,
    ) -> None:
        super().__init__()
        who = f"Observer({name})"
        info = observer_info(name)
        check_keys(who, options, name, KEYS)
        ends = (quant_min, quant_max, group_size, self._in_groups)
        grid = parse_grid(who, dtype, qscheme, ch_axis, channel_len, *ends)
        check_scale_rule(who, scale_rule, parse_flag(who, "power_of_two", power_of_two))
        keeps_histogram = info["statistic"] == "histogram"
        if histogram is not None:
            keeps_histogram = parse_flag(who, "histogram", histogram) or keeps_histogram
        if parse_flag(who, "transient", transient) and histogram:
            raise ValueError(f"{who}: expected histogram to be False with transient, got True")
        if group_size is not None and histogram:
            raise ValueError(f"{who}: expected histogram to be False with group_size, got True")
        keeps_histogram &= not transient and group_size is None

        self.dtype, self.qscheme = grid.dtype, grid.qscheme
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        self.ch_axis, self.channel_len = grid.ch_axis, grid.channel_len
        self.group_size = grid.group_size
        self.scale_rule: ScaleRule = scale_rule
        self.power_of_two = power_of_two
        layout = _LAYOUT_PER_CHANNEL if grid.per_channel else _LAYOUT_PER_TENSOR
        mantissa_bits = layout[0] if mantissa_bits is None else mantissa_bits
        octaves = layout[1] if octaves is None else octaves
        self.mantissa_bits = parse_integer(who, "mantissa_bits", mantissa_bits, 5, 10)
        self.octaves = parse_integer(who, "octaves", octaves, 4, 32)
        self.transient = transient
        self.set_rule(name, **options)
        self._allocate(keeps_histogram)

    def _allocate(self, histogram: bool) -> None:
        # A statistic for each group would take half as much memory as the weight.
        channels = 1 if self.group_size is not None else self.channel_len
        bins = (self.octaves, 2**self.mantissa_bits) if histogram else (0, 0)
        self.register_buffer("extrema", torch.empty(channels, 2, dtype=torch.float32))
        self.register_buffer("tally", torch.empty(channels, 5, dtype=torch.int64))
        self.register_buffer("counts", torch.empty(channels, 2, *bins, dtype=torch.int64))
        self.reset_()

    @property
    def symmetric(self) -> bool:
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    @property
    def scale_axis(self) -> int:
        """The axis of the C scales in what ops get: 0 with groups, which are rows there."""
        return self.ch_axis if self.group_size is None else 0

    @property
    def solves_in_parts(self) -> bool:
        """Whether there are too many rows to have the histograms of all of them at a time."""
        return self.group_size is not None and self._statistic == "histogram"

    def as_rows(self, x: Tensor) -> Tensor:
        """What ops get of ``x``: with groups one group a row, otherwise ``x`` itself.

        Raises RuntimeError if groups do not fill the axis that they lie along.
        """
        return x if self.group_size is None else rows_of(x, self.ch_axis, self.group_size)

    @property
    def statistic(self) -> str:
        """What the rule reads: ``"none"``, ``"extrema"`` or ``"histogram"``."""
        return self._statistic

    @property
    def has_histogram(self) -> bool:
        return self.counts.shape[2] > 0

    @property
    def saw_data(self) -> bool:
        """Whether the statistic holds a finite value."""
        return bool((self.tally[:, 0] > 0).any())

    @property
    def options(self) -> dict[str, OptionValue]:
        """The rule's options, defaults included; change them with :meth:`set_rule`."""
        return dict(self._options)

    @property
    def encoded_options(self) -> tuple[float, ...]:
        """The options as numbers, as ops take them; see ``ops.registry.encode_options``."""
        return self._encoded

    def from_rows(self, rows: Tensor, x: Tensor) -> Tensor:
        """The inverse of :meth:`as_rows`, for what an op made of the rows of ``x``."""
        return rows if self.group_size is None else from_rows(rows, x, self.ch_axis)

    def set_rule(self, name: Rule, **options: OptionValue) -> None:
        """Changes the rule or its options; the statistic stays. If it raises, nothing changes.

        Args:
            name: the new rule.
            **options: its options; defaults for those left out.

        Raises:
            TypeError, ValueError, RuntimeError: an unknown rule or option, or one that does not fit
                the grid.
        """
        encoded = self.check_rule(name, **options)
        info = observer_info(name)
        self.name: Rule = name
        self._statistic: str = info["statistic"]
        self._options = {
            row["name"]: options.get(row["name"], row["default"]) for row in info["options"]
        }
        self._encoded: tuple[float, ...] = tuple(encoded)

    @property
    def grid(self) -> Grid:
        """The grid: dtype, qscheme, ends, channels; change it with :meth:`set_grid`."""
        channels = (self.ch_axis, self.channel_len, self.group_size)
        return Grid(self.dtype, self.qscheme, self.quant_min, self.quant_max, *channels)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _GRID_PARTS and "power_of_two" in self.__dict__:  # else __init__ is under way
            self._write_grid_text()

    def _write_grid_text(self) -> None:  # at each change, as every forward reads it
        ends, how = (self.quant_min, self.quant_max), (self.scale_rule, self.power_of_two)
        self.grid_text = text_of_grid(self.dtype, *ends, self.symmetric, *how)

    def set_grid(self, grid: Grid, scale_rule: ScaleRule = "grid", power: bool = False) -> None:
        """Changes the grid, of the same channels; statistic and rule stay.

        A statistic does not depend on the grid. Whether the rule supports it, :meth:`check_rule`
        tells afterwards.

        Args:
            grid: the new one.
            scale_rule: how the scale is computed, as at construction.
            power: ``power_of_two``, likewise.
        """
        channels = (self.ch_axis, self.channel_len, self.group_size)
        assert (grid.ch_axis, grid.channel_len, grid.group_size) == channels
        self.dtype, self.qscheme = grid.dtype, grid.qscheme
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        self.scale_rule, self.power_of_two = scale_rule, power

    def kept_settings(self) -> Callable[[], None]:
        """The function that it returns sets the grid and the rule that there are now again."""
        grid = (self.grid, self.scale_rule, self.power_of_two)
        name, options = self.name, self.options

        def restore() -> None:
            self.set_grid(*grid)
            self.set_rule(name, **options)

        return restore

    def check_rule(self, name: Rule, **options: OptionValue) -> list[float]:
        """Raises unless the rule supports the options, this grid and this histogram layout.

        Returns the encoded options.
        """
        encoded = encode_options(name, options)
        reads = observer_info(name)["statistic"] == "histogram"
        bins = (self.octaves, 2**self.mantissa_bits) if reads else (0, 0)
        # Solving an empty statistic runs all of the rule's checks.
        ops.solve_many(
            [name],
            [torch.tensor([[math.inf, -math.inf]], dtype=torch.float32, device="cpu")],
            [torch.zeros(1, 5, dtype=torch.int64, device="cpu")],
            [torch.zeros(1, 2, *bins, dtype=torch.int64, device="cpu")],
            options=[encoded],
            grids=[self.grid_text],
        )
        return encoded

    def forward(self, x: Tensor) -> Tensor:
        """Adds ``x``, a floating tensor of any shape, to the statistic; returns ``x`` itself.

        Raises RuntimeError if ``x.size(ch_axis)`` is not ``channel_len``.
        """
        if self._statistic != "none":
            buffers: Any = self._buffers  # Module.__getattr__ is slow
            statistic = (buffers["extrema"], buffers["tally"], buffers["counts"])
            ops.observe_(x, *statistic, self.ch_axis if self.group_size is None else -1)
        return x

    def range(self) -> Tensor:
        """The range [C,2] float32 of the statistic; (0,0) for channels without a finite value.

        Raises RuntimeError if the rule reads a histogram and ``transient`` leaves it out, and for
        groups, whose ranges come from the values.
        """
        return self._solve()[0]

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale [C] float32 and zero point [C] int32 of :meth:`range`.

        Warns if no finite value was observed; then the scale is 1 and the zero point 0.
        """
        if self._statistic != "none" and not self.saw_data:
            warnings.warn(
                f"Observer({self.name}): no finite value was observed; scale 1, zero_point 0",
                stacklevel=2,
            )
        return self._solve()[1:]

    def _solve(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._statistic == "histogram" and not self.has_histogram:
            raise RuntimeError(
                f"Observer({self.name}): expected a histogram, got none, because transient is True;"
                " compute the range from the data with ops.follow_"
            )
        if self.group_size is not None and self._statistic != "none":
            raise RuntimeError(
                f"Observer({self.name}): expected group_size to be None, got {self.group_size}: "
                "its statistic is of the whole tensor; a FakeQuantize solves groups from a weight"
            )
        ranges, scales, zero_points = ops.solve_many(
            [self.name],
            [self.extrema],
            [self.tally],
            [self.counts],
            options=[self._encoded],
            grids=[self.grid_text],
        )
        count = 1 if self.group_size is None else self.channel_len  # of groups all are the same
        return (
            ranges[0].repeat(count, 1), scales[0].repeat(count), zero_points[0].repeat(count)
        )  # fmt: skip

    @torch.no_grad()
    def merge_(self, other: Observer) -> Self:
        """Adds another observer's statistic: the result is that of both data sets together.

        Raises:
            TypeError: ``other`` is no Observer.
            ValueError: its shapes or ``ch_axis`` differ.
        """
        if not isinstance(other, Observer):
            kind = type(other).__name__
            raise TypeError(f"merge_: expected other to be an Observer, got {kind}")
        for field in ("extrema", "counts"):
            want, have = tuple(getattr(self, field).shape), tuple(getattr(other, field).shape)
            if want != have:
                raise ValueError(f"merge_: expected other.{field} to be {want}, got {have}")
        if self.ch_axis != other.ch_axis:
            raise ValueError(
                f"merge_: expected other.ch_axis to be {self.ch_axis}, got {other.ch_axis}"
            )
        device = self.extrema.device
        ops.merge_(
            self.extrema,
            self.tally,
            self.counts,
            other.extrema.to(device),
            other.tally.to(device),
            other.counts.to(device),
        )
        self.synced |= other.synced
        return self

    @torch.no_grad()
    def reset_(self) -> Self:
        """Empties the statistic."""
        self.extrema[:, 0] = math.inf
        self.extrema[:, 1] = -math.inf
        self.tally.zero_()
        self.counts.zero_()
        self.synced = False
        return self

    def reset_parameters(self) -> None:
        """Empties the statistic. Deferred initialization calls it after ``to_empty``."""
        self.reset_()

    def _apply(self, fn: TensorMap, recurse: bool = True) -> Self:
        return super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]

    def extra_repr(self) -> str:
        words = [self.name, dtype_name(self.dtype), str(self.qscheme).removeprefix("torch.")]
        words += [f"[{self.quant_min}, {self.quant_max}]"]
        if self.ch_axis >= 0:
            words.append(f"ch_axis={self.ch_axis}, channel_len={self.channel_len}")
        words += [f"group_size={self.group_size}"] if self.group_size is not None else []
        words += [f"{name}={value}" for name, value in self._options.items()]
        words += ["transient"] if self.transient else []
        return ", ".join(words)


# The keys that every observer takes beside its rule's options, in the order of the signature.
KEYS = tuple(
    name
    for name, parameter in inspect.signature(Observer).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD and name != "name"
)
