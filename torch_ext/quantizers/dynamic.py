"""Quantizers whose scales come from the values that they quantize, at each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_ext import _C, ops
from torch_ext.ops.grid_text import words
from torch_ext.ops.registry import OptionValue
from torch_ext.ops.registry_names import Rule
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.grid import (
    dtype_name,
    is_float,
    needs_groups,
    parse_dtype,
    text_of_grid,
)
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.parts.keep_dtype import TensorMap
from torch_ext.quantizers.solve import Solution
from torch_ext.quantizers.state_table import FOLLOW, QUANTIZE
from torch_ext.utils.arguments import bounded, parse_integer

_PER_TENSOR = ("per_tensor_symmetric", "per_tensor_affine")
# The format of block scales that are relative to a tensor's: NVFP4's.
_SCALE_DTYPE = "float8_e4m3"
_LARGEST_SCALE = _C.float_formats()[_SCALE_DTYPE]["largest"]
# The bounds between which every block scale is a normal number, and every value finite.
_LEAST_SCALE = 2.0**-120
_LARGEST_VALUE = torch.finfo(torch.float32).max * (1 - 2.0**-23)


class DynamicObserver(Observer):
    """Holds the grid of a :class:`DynamicFakeQuantize` without a tensor scale; observes nothing."""

    _in_groups = True

    def set_rule(self, name: Rule, **options: OptionValue) -> None:
        if name != "min_max":
            raise ValueError(
                f"Observer({name}): expected name to be min_max with dynamic=True, got {name}: "
                "the scales are those of the least and greatest value of each call; only a "
                "tensor scale (scale_dtype) is calibrated"
            )
        super().set_rule(name, **options)
        self._statistic = "none"

    def forward(self, x: Tensor) -> Tensor:
        return x


class TensorScaleObserver(Observer):
    """Observes a tensor whose block scales are relative to one scale of the whole tensor.

    Its range is what the largest block scale takes to the grid's largest number, so rules see the
    format of the block scales, not the small grid of the values.
    """

    _in_groups = True

    values_text: str  # the grid of the values and of their scales; `grid_text` is that of the range

    def set_rule(self, name: Rule, **options: OptionValue) -> None:
        if name == "fixed_scale":
            raise ValueError(
                f"Observer({name}): expected name to be a rule that reads data with scale_dtype, "
                f"got {name}: its scale would be that of no tensor"
            )
        super().set_rule(name, **options)

    def _write_grid_text(self) -> None:
        self.grid_text = _SCALE_DTYPE + words(symmetric=True)
        ends = (self.quant_min, self.quant_max)
        values = text_of_grid(self.dtype, *ends, self.symmetric)
        self.values_text = f"{values} scale_dtype={_SCALE_DTYPE}"


class DynamicFakeQuantize(FakeQuantize, dynamic=True):
    """A :class:`FakeQuantize` that computes its scales at each call, from the values of that call.

    ``FakeQuantize(dynamic=True)`` is one. A scale is that of the least and the greatest value of
    its group: of ``group_size`` values along an axis, or of all values along it (per token). There
    is nothing to calibrate: CALIBRATION and FLOAT return the input, QAT and VALIDATION quantize,
    with the straight-through gradient. A group with a value that is not finite becomes NaN.

    With ``scale_dtype`` a group's scale is rounded to that format, relative to one scale of the
    whole tensor (NVFP4), which is calibrated by ``observer`` as a range is: ``max(|lo|, |hi|) /
    (448 * the grid's largest number)``. CALIBRATION observes for it, QAT lets it follow, and
    VALIDATION without it raises.

    Args:
        group_size: how many consecutive values share a scale; None: all along the axis.
        ch_axis: the axis along which groups lie. By default the last one; ``prepare_qat`` takes
            the one that the layer sums over: channels of a convolution, the last but one axis of a
            second factor.
        scale_dtype: ``"float8_e4m3"``, or None.

    The other arguments and the errors are those of :class:`FakeQuantize`.

    Attributes:
        axis: where groups lie; negative counts from the end.
        scale: the tensor scale; 1 without ``scale_dtype``.
    """

    is_dynamic = True

    def _make_observer(self, rule: Rule, scale_dtype: object, keys: dict[str, Any]) -> Observer:
        who = "FakeQuantize(dynamic)"
        if self.method != "fake_quant":
            raise ValueError(
                f"{who}: expected method to be fake_quant, got {self.method}: a scale that comes "
                "from the values is not learned"
            )
        size = keys.pop("group_size", None)
        self.group_size: int | None = (
            None if size is None else parse_integer(who, "group_size", size, 2, 2**31 - 1)
        )
        self.axis_given = "ch_axis" in keys
        self.axis = parse_integer(who, "ch_axis", keys.pop("ch_axis", -1), -64, 63)
        parse_integer(who, "channel_len", keys.pop("channel_len", 1), 1, 1)
        _check_scheme(who, keys.get("qscheme", torch.per_tensor_symmetric))
        dtype = parse_dtype(who, keys.get("dtype", torch.int8))[0]
        if needs_groups(dtype) and self.group_size is None:
            raise ValueError(
                f"{who}: expected group_size with {dtype_name(dtype)}, got None: so few levels "
                "do not span a whole row; 32 is usual, 16 for NVFP4"
            )
        self.scale_dtype = _parse_scale_dtype(who, scale_dtype, self.group_size, keys)
        if self.scale_dtype is not None:
            return TensorScaleObserver(rule, **keys)
        if keys.get("transient"):
            raise ValueError(
                f"{who}: expected a quantizer of activations, got transient=True: the scales of a "
                "weight come from the weight without it; give group_size alone"
            )
        if keys.get("histogram"):
            raise ValueError(
                f"{who}: expected histogram to be False, got True: nothing is observed"
            )
        return DynamicObserver(rule, **keys)

    def _allocate(
        self, use_grad_scaling: bool, learn_zero_point: bool, alpha: float | None
    ) -> None:
        super()._allocate(use_grad_scaling, learn_zero_point, alpha)
        self._check_grid()
        if self.rangeless:
            # Nothing to save; loaded where a range is needed, these would pass for one.
            for module in (self, self.observer):
                module._non_persistent_buffers_set.update(module._buffers)

    @property
    def rangeless(self) -> bool:
        return self.scale_dtype is None

    def _check_grid(self) -> None:
        """Lets the op check the grid, as :meth:`Observer.check_rule` does."""
        observer = self.observer
        least, most = observer.quant_min, observer.quant_max
        if observer.symmetric and not least < 0 < most:
            lost = "negative" if least == 0 else "positive"
            raise ValueError(
                "FakeQuantize(dynamic): expected qscheme to be per_tensor_affine with "
                f"{dtype_name(observer.dtype)} of [{least}, {most}], got per_tensor_symmetric: "
                f"{lost} values would all become 0"
            )
        tensor_scale = None
        if self.scale_dtype is not None:
            tensor_scale = torch.ones(1, dtype=torch.float32, device="cpu")
        probe = torch.zeros(self.group_size or 1, dtype=torch.float32, device="cpu")
        ops.dynamic_fake_quant(
            probe, self.group_size, grid=self.grid_text, tensor_scale=tensor_scale
        )

    @property
    def grid_text(self) -> str:
        """The grid of the values, and how scales are computed, as the text that ops take."""
        observer: Any = self._modules["observer"]
        text: str = observer.grid_text if self.scale_dtype is None else observer.values_text
        return text

    @property
    def scales_text(self) -> str:
        """In words what shares a scale: ``"per token"``, or ``"groups of 32 along axis -1"``."""
        if self.group_size is None:
            return "per token" if self.axis == -1 else f"along axis {self.axis}"
        return f"groups of {self.group_size} along axis {self.axis}"

    def forward(self, x: Tensor, axis: int | None = None) -> Tensor:
        """As :meth:`FakeQuantize.forward`; ``axis`` is where groups lie in this tensor."""
        if self._action not in QUANTIZE:
            return super().forward(x)
        return self._along(x, axis, super().forward)

    def quantize_only(self, x: Tensor, axis: int | None = None) -> Tensor:
        if self._action not in QUANTIZE:
            return super().quantize_only(x)
        return self._along(x, axis, super().quantize_only)

    def _along(self, x: Tensor, axis: int | None, quantize: TensorMap) -> Tensor:
        """Calls a function with the axis of groups moved to the end, as the op needs it."""
        place = self.axis if axis is None or self.axis_given else axis
        self._check_shape(x.shape, place)
        if place in (-1, x.dim() - 1):
            return quantize(x)
        return quantize(x.movedim(place, -1)).movedim(-1, place)

    @property
    def _of_label(self) -> str:
        return f' in "{self.label}"' if self.label else ""

    def _check_shape(self, shape: torch.Size, axis: int) -> None:
        """Raises, before a range follows values that the op then refuses."""
        axes = len(shape)
        if not -axes <= axis < axes:
            have = f"{axes} axes, shape {list(shape)}" if axes else "a scalar"
            raise RuntimeError(
                f"FakeQuantize(dynamic): expected x to have an axis {axis} (ch_axis), along which "
                f"groups lie, got {have}{self._of_label}"
            )
        if self.group_size is not None and shape[axis] % self.group_size != 0:
            raise RuntimeError(
                f"FakeQuantize(dynamic): expected group_size to be a divisor of axis {axis}, "
                f"{shape[axis]}, got {self.group_size}, with x of shape {list(shape)}"
                f"{self._of_label}"
            )

    def _quantize(self, x: Tensor, action: str) -> Tensor:
        tensor_scale = None
        if self.scale_dtype is not None:
            buffers: Any = self._buffers
            tensor_scale = self._follow(x) if action in FOLLOW else buffers["scale"]
        return ops.dynamic_fake_quant(
            x, self.group_size, grid=self.grid_text, tensor_scale=tensor_scale
        )

    @torch.no_grad()
    def _follow(self, x: Tensor) -> Tensor:
        """Moves the range towards that of ``x``; returns the tensor scale, which it stores."""
        # The op's own scale is that of the block scales' format; nobody is to see it in `scale`.
        unused = (torch.empty_like(self.scale), torch.empty_like(self.zero_point))
        constant = 0.0 if self._holds else self.averaging_constant
        arguments = self._follow_arguments()
        ops.follow_(x.detach(), self.range, *unused, self.solved, constant, **arguments)
        scale = self._tensor_scale(self.range)
        self.scale.copy_(scale)
        return scale

    def _set(self, solution: Solution) -> None:
        if self.scale_dtype is not None:
            solution = solution._replace(scale=self._tensor_scale(solution.range))
        super()._set(solution)

    def _tensor_scale(self, range_: Tensor) -> Tensor:
        """Float32 [1] of a range: the range's end at the largest scale and largest number."""
        observer = self.observer
        largest = 1.0 * observer.quant_max
        if not is_float(observer.dtype):
            largest = (observer.quant_max - observer.quant_min) / 2
        reach = range_.abs().amax(1)
        ends = _LARGEST_SCALE * max(-observer.quant_min, observer.quant_max)
        scale = (reach / (_LARGEST_SCALE * largest)).clamp(_LEAST_SCALE, _LARGEST_VALUE / ends)
        return torch.where(reach > 0, scale, torch.ones_like(scale))

    def keys_beside_observer(self) -> dict[str, Any]:
        """The arguments that other quantizers do not have, as values that JSON holds."""
        return {
            "dynamic": True,
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
            "ch_axis": self.axis,
        }

    def extra_repr(self) -> str:
        more = f", scale_dtype={self.scale_dtype}" if self.scale_dtype else ""
        return f"{super().extra_repr()}, dynamic {self.scales_text}{more}"


def _check_scheme(who: str, scheme: object) -> None:
    name = str(scheme).removeprefix("torch.")
    if name not in _PER_TENSOR:
        raise ValueError(
            f"{who}: expected qscheme to be per_tensor_symmetric or per_tensor_affine, got "
            f"{name}: scales are of group_size values, or per token"
        )


def _parse_scale_dtype(
    who: str, scale_dtype: object, group_size: int | None, keys: Mapping[str, Any]
) -> str | None:
    if scale_dtype is None:
        return None
    given = str(scale_dtype).removeprefix("torch.").removesuffix("fn")
    if given != _SCALE_DTYPE:
        raise ValueError(
            f"{who}: expected scale_dtype to be {_SCALE_DTYPE} or None, got "
            f"{bounded(scale_dtype)}; powers of two are scale_rule or power_of_two"
        )
    if group_size is None:
        raise ValueError(f"{who}: expected group_size with scale_dtype, got None")
    for key, usual in (("scale_rule", "grid"), ("power_of_two", False)):
        if keys.get(key, usual) != usual:
            raise ValueError(
                f"{who}: expected {key} to be {usual} with scale_dtype, got {keys[key]}"
            )
    return given
