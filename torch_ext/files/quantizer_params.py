"""The parameters of one quantizer as they are saved and loaded, and checks of their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torch_ext.ops.registry import observer_info
from torch_ext.ops.registry_names import Rule
from torch_ext.ops.statistics import ScaleRule
from torch_ext.quantizers.dynamic import DynamicFakeQuantize
from torch_ext.quantizers.fake_quantize import HELD, FakeQuantize
from torch_ext.quantizers.grid import dtype_name, is_float, parse_grid, text_of_grid
from torch_ext.quantizers.learned import LearnedFakeQuantize
from torch_ext.quantizers.parts.keys import POWERS_OF_TWO
from torch_ext.utils.text import joined

# Field -> dtype and shape; C is the number of channels or groups, S that of the statistic's rows,
# which is 1 with groups; None any size.
FIELDS: Mapping[str, tuple[torch.dtype, tuple[str | int | None, ...]]] = {
    "range": (torch.float32, ("C", 2)),
    "scale": (torch.float32, ("C",)),
    "zero_point": (torch.int32, ("C",)),
    "solved": (torch.uint8, (1,)),
    "observer.extrema": (torch.float32, ("S", 2)),
    "observer.tally": (torch.int64, ("S", 5)),
    "observer.counts": (torch.int64, ("S", 2, None, None)),
}
STATISTIC = ("observer.extrema", "observer.tally", "observer.counts")

# A sum of larger counts could overflow int64.
_MAX_COUNT = 2**62


@dataclass(frozen=True)
class Params:
    """A quantizer's tensors, by the names in ``FIELDS``, and its grid. ``params[field]`` works."""

    tensors: Mapping[str, Tensor]
    observer: Rule
    quant_min: int
    quant_max: int
    symmetric: bool
    ch_axis: int
    scale_rule: ScaleRule
    power_of_two: bool
    spec: Mapping[str, Any]  # the whole configuration, as `spec_of` gives it
    synced: bool = False  # whether the statistic holds the data of all ranks

    def __getitem__(self, field: str) -> Tensor:
        return self.tensors[field]

    @property
    def solved(self) -> bool:
        """Whether there is a range."""
        return bool(self.tensors["solved"]) and not self.rangeless

    @property
    def is_dynamic(self) -> bool:
        """Whether scales come from the values of each call."""
        return bool(self.spec.get("dynamic", False))

    @property
    def rangeless(self) -> bool:
        """Whether there is nothing else than such scales."""
        return self.is_dynamic and self.spec["scale_dtype"] is None

    @property
    def held(self) -> bool:
        """Whether the range stays when the weight changes; see ``FakeQuantize.hold_range``."""
        return int(self.tensors["solved"]) == HELD

    def on_cpu(self) -> Params:
        """A detached copy on the CPU, which stays when the quantizer changes."""
        tensors = {
            field: tensor.detach().to("cpu", copy=True) for field, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    @property
    def channels(self) -> int:
        """The number of channels, or of groups."""
        return self.tensors["range"].shape[0]

    @property
    def group_size(self) -> int | None:
        """Of groups that each have a range; dynamic ones have none."""
        size: int | None = self.spec.get("group_size")
        return None if self.is_dynamic else size

    @property
    def groups(self) -> str:
        """The groups, for messages."""
        return "no groups" if self.group_size is None else f"groups of {self.group_size}"

    @property
    def is_float(self) -> bool:
        """Whether the grid is of a float format."""
        return is_float(self.spec["dtype"])

    @property
    def values(self) -> str:
        """The values of the grid, for messages: ``[-128, 127]`` or ``float8_e4m3``."""
        ends = f"[{self.quant_min}, {self.quant_max}]"
        return str(self.spec["dtype"]) if self.is_float else ends

    @property
    def grid(self) -> str:
        """The grid as the text that ops take."""
        ends = (self.quant_min, self.quant_max)
        dtype, symmetric = self.spec["dtype"], self.symmetric
        return text_of_grid(dtype, *ends, symmetric, self.scale_rule, self.power_of_two)


def tensors_of(quantizer: FakeQuantize) -> dict[str, Tensor]:
    """The quantizer's tensors by the names in ``FIELDS``; not copied."""
    scale, zero_point = quantizer.calculate_qparams()
    # In a quantizer that learns its range these are no buffers, but computed.
    values = {"range": quantizer.range, "scale": scale, "zero_point": zero_point}
    if quantizer.rangeless:  # so that nothing takes the range for one
        values["solved"] = torch.zeros_like(quantizer.solved)
    return {
        field: values[field] if field in values else quantizer.get_buffer(field) for field in FIELDS
    }


def params_of(quantizer: FakeQuantize) -> Params:
    """The parameters of a quantizer; the tensors are not copied."""
    observer = quantizer.observer
    return Params(
        tensors=tensors_of(quantizer),
        observer=observer.name,
        quant_min=observer.quant_min,
        quant_max=observer.quant_max,
        symmetric=observer.symmetric,
        ch_axis=observer.ch_axis,
        scale_rule=observer.scale_rule,
        power_of_two=observer.power_of_two,
        spec=spec_of(quantizer),
        synced=observer.synced,
    )


def spec_of(quantizer: FakeQuantize) -> dict[str, Any]:
    """A quantizer's arguments as values that JSON holds."""
    observer = quantizer.observer
    learned = {}
    if isinstance(quantizer, LearnedFakeQuantize):
        learned = {
            "use_grad_scaling": quantizer.use_grad_scaling,
            "learn_zero_point": quantizer.learn_zero_point,
        }
    return {
        "method": quantizer.method,
        **learned,
        "averaging_constant": quantizer.averaging_constant,
        "observer": observer.name,
        "options": observer.options,
        "dtype": dtype_name(observer.dtype),
        "qscheme": str(observer.qscheme).removeprefix("torch."),
        "ch_axis": observer.ch_axis,
        "channel_len": observer.channel_len,
        "quant_min": observer.quant_min,
        "quant_max": observer.quant_max,
        "scale_rule": observer.scale_rule,
        "power_of_two": observer.power_of_two,
        "mantissa_bits": observer.mantissa_bits,
        "octaves": observer.octaves,
        "histogram": observer.has_histogram,
        "transient": observer.transient,
        # Without groups as it was before there were any.
        **({} if observer.group_size is None else {"group_size": observer.group_size}),
        **(quantizer.keys_beside_observer() if isinstance(quantizer, DynamicFakeQuantize) else {}),
    }


def params_from(tensors: Mapping[str, Tensor], spec: Any, histogram: bool = True) -> Params:
    """Checks the tensors and the spec of a quantizer in a file, and joins them.

    Args:
        tensors: by the names in ``FIELDS``.
        spec: as :func:`spec_of` gives it, optionally with ``synced``.
        histogram: False for a file format that keeps no histograms.

    Raises:
        ValueError: the message begins with the field that is wrong.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"description: expected an object, got {str(spec)[:80]}")
    spec = dict(spec)
    synced = spec.pop("synced", False)
    if not isinstance(synced, bool):
        raise ValueError(f"synced: expected true or false, got {str(synced)[:80]}")
    if spec.get("power_of_two") is True and spec.get("scale_rule") in POWERS_OF_TWO:
        spec["power_of_two"] = False  # files of before these two excluded each other; had no effect
    keys = ("dtype", "qscheme", "ch_axis", "channel_len", "quant_min", "quant_max", "group_size")
    for key in keys:
        if key not in spec and key != "group_size":
            raise ValueError(f"{key}: missing")
    # Dynamic groups have no channels, and no range that is kept.
    dynamic = spec.get("dynamic") is True
    fixed = spec | {"ch_axis": -1, "group_size": None} if dynamic else spec
    try:
        values = [fixed.get(key) for key in keys]
        grid = parse_grid("description", *values, in_groups=dynamic)  # type: ignore[misc]
        rows = grid.channel_len if grid.group_size is None else 1
        check_shapes(tensors, FIELDS, grid.channel_len, rows)
        bins = _histogram_of(json.dumps(spec))
    except TypeError as error:
        raise ValueError(str(error)) from error
    have = tuple(tensors["observer.counts"].shape[2:])
    if histogram and have != bins:
        raise ValueError(f"observer.counts: expected a histogram {list(bins)}, got {list(have)}")
    params = Params(
        tensors=tensors,
        observer=spec["observer"],
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        symmetric=grid.symmetric,
        ch_axis=grid.ch_axis,
        scale_rule=spec["scale_rule"],
        power_of_two=spec["power_of_two"],
        spec=spec,
        synced=synced,
    )
    check_parameters(params)
    check_statistic(tensors)
    return params


@lru_cache(maxsize=256)  # most quantizers of a model have the same spec
def _histogram_of(text: str) -> tuple[int, int]:
    """Octaves and bins of the histogram that a quantizer with this spec (as JSON) keeps.

    Raises ValueError if the spec is of no possible quantizer, or not complete.
    """
    spec = json.loads(text)
    try:
        with torch.device("meta"):  # allocates nothing, however many channels the file claims
            quantizer = _quantizer(spec)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"description: {error}") from error
    for key, value in spec_of(quantizer).items():
        if key not in spec:
            raise ValueError(f"{key}: missing")
        if spec[key] != value:
            raise ValueError(f"{key}: expected {value!r}, got {str(spec[key])[:80]}")
    octaves, bins = quantizer.observer.counts.shape[2:]
    return octaves, bins


def _quantizer(spec: Mapping[str, Any]) -> FakeQuantize:
    keys = dict(spec)
    options = keys.pop("options", None)
    rule = keys.pop("observer", "")
    known = [row["name"] for row in observer_info(rule)["options"]]
    if not isinstance(options, dict) or set(options) != set(known):
        raise ValueError(f"expected options to be of {joined(known)}, got {str(options)[:80]}")
    return FakeQuantize(keys.pop("method", ""), rule, **keys, **options)


@torch.no_grad()
def quantizer_of(params: Params) -> FakeQuantize:
    """A new quantizer with the configuration and the statistic of ``params``, but no range."""
    quantizer = _quantizer(params.spec)
    for field in STATISTIC:
        quantizer.get_buffer(field).copy_(params[field])
    quantizer.observer.synced = params.synced
    return quantizer


def check_shapes(
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, tuple[torch.dtype, tuple[str | int | None, ...]]],
    channels: int,
    rows: int,
) -> None:
    """Raises ValueError for a tensor that is missing, or of another dtype or shape.

    ``channels`` and ``rows`` are the sizes C and S in ``FIELDS``.
    """
    sizes: Mapping[str | int | None, int] = {"C": channels, "S": rows}
    for field, (dtype, shape) in fields.items():
        if field not in tensors:
            raise ValueError(f"{field}: missing")
        tensor = tensors[field]
        want = [sizes.get(size, size) for size in shape]
        fits = len(want) == tensor.dim() and all(
            size in (None, have) for size, have in zip(want, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            have = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{field}: expected {dtype} {want}, got {have}")


def check_parameters(params: Params) -> None:
    """Raises ValueError for a range, scale, zero point or solved flag that no solve gives."""
    range_, scale, zero_point = params["range"], params["scale"], params["zero_point"]
    ordered = range_.isfinite().all() & (range_[:, 0] <= range_[:, 1]).all()
    _require("range", bool(ordered), "finite and lo <= hi", range_)
    _require("scale", bool((scale.isfinite() & (scale > 0)).all()), "finite and above 0", scale)
    inside = (zero_point >= params.quant_min) & (zero_point <= params.quant_max)
    inside &= (zero_point == 0) if params.is_float else True
    _require("zero_point", bool(inside.all()), "on the grid", zero_point)
    _require("solved", int(params["solved"]) in (0, 1, HELD), "0, 1 or 2", params["solved"])
    if params.rangeless:
        _require("solved", int(params["solved"]) == 0, "0 with dynamic scales", params["solved"])


def check_statistic(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for extrema, tally and counts that no data gives."""
    extrema, tally, counts = (tensors[field] for field in STATISTIC)
    in_bounds = bool(((tally >= 0) & (tally <= _MAX_COUNT)).all())
    _require("observer.tally", in_bounds, "at least 0", tally)
    finite, special = tally[:, 0], tally[:, 1] + tally[:, 2]
    _require("observer.tally", bool((special <= finite).all()), "zeros + tiny <= finite", tally)
    low, high = extrema[:, 0], extrema[:, 1]
    empty = (low == torch.inf) & (high == -torch.inf)
    filled = low.isfinite() & high.isfinite() & (low <= high)
    agree = torch.where(finite > 0, filled, empty)
    _require("observer.extrema", bool(agree.all()), "min <= max where values were seen", extrema)
    if counts.numel():
        _require("observer.counts", bool((counts >= 0).all()), "at least 0", counts)
        approximate = counts.double().sum((1, 2, 3))  # which cannot overflow
        _require("observer.counts", bool((approximate <= _MAX_COUNT).all()), "countable", counts)
        total = counts.sum((1, 2, 3)) + special
        _require("observer.counts", bool((total == finite).all()), "as many as the tally", counts)


def _require(field: str, valid: bool, want: str, have: Tensor) -> None:
    if not valid:
        values = ", ".join(f"{value:g}" for value in have.flatten()[:8].tolist())
        more = ", ..." if have.numel() > 8 else ""
        raise ValueError(f"{field}: expected values to be {want}, got {values}{more}")
