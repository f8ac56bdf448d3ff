"""Ops that quantize, or that move the range to quantize with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from torch_ext.ops.grid_text import grid_text
from torch_ext.ops.loader import NATIVE
from torch_ext.ops.registry import Options, encode_options
from torch_ext.ops.registry_names import LearnedMethod, Rule
from torch_ext.ops.statistics import ScaleRule

Mask = Literal["rounded", "paper"]
Rounding = Literal["half_even", "half_away", "floor_half_up"]


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int | None = None,
    quant_max: int | None = None,
    ch_axis: int = -1,
    mask: Mask = "rounded",
    rounding: Rounding = "half_even",
    grid: str | None = None,
) -> Tensor:
    """Quantizes and dequantizes ``x``; differentiable in ``x`` (straight-through estimator).

    ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max); (q - zero_point) * scale``,
    bit-equal to ONNX QuantizeLinear and DequantizeLinear. NaN stays NaN, infinities saturate.
    float16 and bfloat16 are computed in float32 and rounded once.

    On a float format: ``q = the nearest number to clamp(x / scale, -largest, largest), of two the
    even one; q * scale``. Subnormal numbers and the sign of zero are kept. Bit-equal to ONNX with
    ``saturate=1``.

    Args:
        x: any floating dtype, shape and strides.
        scale: float32 [C], above 0 and finite; must not require a gradient (see :func:`lsq`).
        zero_point: int32 [C], between ``quant_min`` and ``quant_max``; 0 on a float format.
        ch_axis: the axis of the C channels; -1: C = 1.
        mask: where the gradient passes: ``"rounded"``, where the rounded value is on the grid,
            ends included; ``"paper"``, where the value before rounding is strictly between them.
        rounding: ``"half_even"``, ``"half_away"`` (from zero) or ``"floor_half_up"``.
        grid: the grid as a text, in place of ``quant_min``, ``quant_max`` and ``rounding``: a float
            format, one of ``"float8_e4m3"`` (largest 448), ``"float8_e5m2"`` (57344),
            ``"float6_e2m3"`` (7.5), ``"float6_e3m2"`` (28) and ``"float4_e2m1"`` (6); or integers
            as in ``"[-128,127]"``.

    Raises:
        TypeError: neither ``grid`` nor an end, or ``grid`` and what it stands for.
        RuntimeError: an argument is not as above.
    """
    text = grid_text(quant_min, quant_max, rounding=rounding, grid=grid)
    out: Tensor = NATIVE.fake_quant(x, scale, zero_point, text, ch_axis, mask)
    return out


def dynamic_fake_quant(
    x: Tensor,
    group_size: int | None = None,
    quant_min: int | None = None,
    quant_max: int | None = None,
    *,
    symmetric: bool | None = None,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    grid: str | None = None,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """Quantizes and dequantizes each group of ``x`` with the scale of the group's own values.

    Groups are ``group_size`` consecutive values along the last axis. Gives the numbers of
    :func:`qparams` of each group's least and greatest value, and then :func:`fake_quant`. Reads
    ``x`` once, where a group fits into a cache. Differentiable in ``x`` (straight-through, mask
    ``"rounded"``); the scales are constants.

    A group with a NaN or an infinity becomes NaN as a whole, as it has no scale.

    Args:
        x: any floating dtype and strides, of one axis or more.
        group_size: a divisor of the last axis; None: the whole axis, which is "per token".
        symmetric, scale_rule, power_of_two: as in :func:`qparams`; symmetric is True by default.
        grid: the grid as a text, in place of ``quant_min`` to ``power_of_two``:
            ``"[-128,127] symmetric"``, ``"float8_e4m3"``, ``"float4_e2m1 scale_rule=floor"``
            (MXFP4 for groups of 32), ``"float4_e2m1 scale_dtype=float8_e4m3"`` (NVFP4 for groups
            of 16).
        tensor_scale: as in :func:`qparams`.

    Raises:
        TypeError: neither ``grid`` nor an end, or ``grid`` and what it stands for.
        RuntimeError: an argument is not as above.
    """
    signs = True if grid is None and symmetric is None else symmetric
    text = grid_text(quant_min, quant_max, signs, scale_rule, power_of_two, grid=grid)
    size = -1 if group_size is None else group_size
    out: Tensor = NATIVE.dynamic_fake_quant(x, size, text, tensor_scale)
    return out


def lsq(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int | None = None,
    quant_max: int | None = None,
    ch_axis: int = -1,
    use_grad_scaling: bool = True,
    batch_axis: int = -1,
    grid: str | None = None,
) -> Tensor:
    """Quantizes and dequantizes with a learned scale (Esser et al. 2020, arXiv 1902.08153).

    Let v = x / scale and z the zero point. A value is inside if ``quant_min < v + z < quant_max``.

    - Gradient of x: 1 inside, 0 outside.
    - Gradient of the scale: ``round(v) - v`` inside, ``quant_min - z`` below, ``quant_max - z``
      above; summed over the channel in float64, then multiplied by ``1 / sqrt(N * quant_max)``,
      where N is the number of elements that share the scale.
    - Gradient of a learned zero point: 0 inside, ``-scale`` outside (LSQ+, Bhalgat et al. 2020).

    On a float format ``round(v)`` is its nearest number, ``quant_max`` its largest one, and z is 0.

    Args:
        x: float32, float64, float16 or bfloat16, any shape and strides.
        scale: float32 [C], finite. The op computes with ``max(|scale|, 2^-126)``.
        zero_point: int32 [C], which is fixed, and on the grid; or float32 [C], which is learned,
            and is rounded and clamped to the grid.
        ch_axis: the axis of the C channels; -1: C = 1.
        use_grad_scaling: False omits the factor ``1 / sqrt(N * quant_max)``.
        batch_axis: the axis whose size is left out of N; 0 for activations, -1 for none.
        grid: in place of ``quant_min`` and ``quant_max``, as in :func:`fake_quant`.

    Raises:
        RuntimeError: an argument is not as above. Values of CUDA tensors are not checked: a scale
            that is not finite, or a zero point off the grid, gives NaN.
    """
    text = grid_text(quant_min, quant_max, grid=grid)
    return NATIVE.lsq(  # type: ignore[no-any-return]
        x, scale, zero_point, text, ch_axis, use_grad_scaling, batch_axis
    )


def pact(
    x: Tensor,
    alpha: Tensor,
    quant_min: int | None = None,
    quant_max: int | None = None,
    grid: str | None = None,
) -> Tensor:
    """Quantizes and dequantizes with a learned clipping level (Choi et al. 2018, arXiv 1805.06085).

    Clips x to [0, alpha] if ``quant_min`` is 0, else to [-alpha, alpha], and quantizes it with the
    scale of that range. The gradient of x is 1 where x is not clipped, else 0. The gradient of
    alpha is the sum of the upstream gradients where ``x >= alpha``, minus, on a signed grid, those
    where ``x <= -alpha``. The paper's L2 penalty on alpha is not included: use weight decay.

    Args:
        x: float32, float64, float16 or bfloat16, any shape and strides.
        alpha: float32 [1], finite. The op computes with ``max(|alpha|, 2^-110)``.
        grid: in place of ``quant_min`` and ``quant_max``, as in :func:`fake_quant`. A float format
            is signed.

    Raises:
        RuntimeError: an argument is not as above.
    """
    text = grid_text(quant_min, quant_max, grid=grid)
    return NATIVE.pact(x, alpha, text)  # type: ignore[no-any-return]


def learned_fake_quant(
    x: Tensor,
    method: LearnedMethod,
    parameter: Tensor,
    zero_point: Tensor | None,
    quant_min: int | None = None,
    quant_max: int | None = None,
    ch_axis: int = -1,
    use_grad_scaling: bool = True,
    batch_axis: int = -1,
    grid: str | None = None,
) -> Tensor:
    """Calls the learned method of a name: :func:`lsq` or :func:`pact`.

    Args:
        method: ``"lsq"`` or ``"pact"``.
        parameter: what the method learns: ``scale`` [C] of lsq, ``alpha`` [1] of pact.
        zero_point: as in :func:`lsq`; None for pact.
        ch_axis, use_grad_scaling, batch_axis: as in :func:`lsq`; the defaults for pact.
        quant_min, quant_max, grid: as in :func:`lsq`.

    Raises:
        RuntimeError: an unknown method, or an argument that it does not take.
    """
    text = grid_text(quant_min, quant_max, grid=grid)
    return NATIVE.learned_fake_quant(  # type: ignore[no-any-return]
        x, method, parameter, zero_point, text, ch_axis, use_grad_scaling, batch_axis
    )


def follow_(
    x: Tensor,
    range: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    solved: Tensor,
    averaging_constant: float,
    rule: Rule,
    quant_min: int | None = None,
    quant_max: int | None = None,
    symmetric: bool | None = None,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    options: Options | None = None,
    ch_axis: int = -1,
    mantissa_bits: int = 10,
    octaves: int = 16,
    grid: str | None = None,
) -> None:
    """Moves a range towards that of the batch ``x`` and updates scale and zero point, in place.

    ``range += averaging_constant * (range of x by the rule - range)``. If ``solved`` is 0, the
    range becomes that of x, and ``solved`` 1. Channels without a finite value keep their range.

    With ``averaging_constant`` 0 a range is set once: if ``solved`` is 0, channels whose range is
    (0, 0) take that of x, and ``solved`` becomes 1 if any range then differs from (0, 0), which is
    that of zeros; if ``solved`` is not 0, nothing changes.

    Does not synchronize with the host. Does nothing while a backward pass runs.

    Args:
        x: any floating dtype, shape and strides.
        range, scale, zero_point: float32 [C,2], float32 [C] and int32 [C], written to.
        solved: uint8 [1], whether there is a range yet; written to.
        averaging_constant: 0 to 1.
        rule: a rule of the registry.
        options: of the rule, by name; or as numbers in the order of the rule's table, which only
            the op checks.
        mantissa_bits, octaves: layout of the batch's histogram, 5..10 and 4..32.
        grid: in place of ``quant_min`` to ``power_of_two``, as in :func:`qparams`.

    Raises:
        ValueError, TypeError: an unknown rule or option, or an option out of bounds.
        RuntimeError: an argument is not as above.
    """
    values = _option_values(rule, options)
    buffers = (range, scale, zero_point, solved)
    text = grid_text(quant_min, quant_max, symmetric, scale_rule, power_of_two, grid=grid)
    layout = (ch_axis, mantissa_bits, octaves)
    NATIVE.follow_(x, *buffers, averaging_constant, rule, text, values, *layout)


def follow_fake_quant(
    x: Tensor,
    range: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    solved: Tensor,
    averaging_constant: float,
    rule: Rule,
    quant_min: int | None = None,
    quant_max: int | None = None,
    symmetric: bool | None = None,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    options: Options | None = None,
    ch_axis: int = -1,
    mantissa_bits: int = 10,
    octaves: int = 16,
    mask: Mask = "rounded",
    rounding: Rounding = "half_even",
    grid: str | None = None,
) -> Tensor:
    """Runs :func:`follow_`, then :func:`fake_quant` of ``x`` with the updated scale.

    Gives the same numbers as the two calls. It reads ``x`` only once if each channel's values lie
    together and fit into a core's cache or a GPU's on-chip memory, and the rule reads only extrema.
    Differentiable in ``x`` (straight-through).

    Arguments, result and errors are those of the two functions.
    """
    values = _option_values(rule, options)
    buffers = (range, scale, zero_point, solved)
    text = grid_text(quant_min, quant_max, symmetric, scale_rule, power_of_two, rounding, grid)
    layout = (ch_axis, mantissa_bits, octaves)
    return NATIVE.follow_fake_quant(  # type: ignore[no-any-return]
        x, *buffers, averaging_constant, rule, text, values, *layout, mask
    )


def gptq(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int | None = None,
    quant_max: int | None = None,
    grid: str | None = None,
) -> Tensor:
    """Rounds the rows of a weight to a grid, one input after the other (GPTQ).

    The error of each value is fed to the inputs after it, so that they make up for it: with
    ``inverse = factor.mT @ factor`` the inverse Hessian of a group (Frantar et al. 2022, arXiv
    2210.17323), after value j of a row the values k behind it lose
    ``(value - rounded) / factor[j, j] * factor[j, k]``. With the identity each value becomes the
    nearest of its grid, as by :func:`fake_quant`. Computed in float64; a row's result does not
    depend on other rows nor on the number of threads. On CUDA tensors it is computed on the CPU,
    and waits for the device.

    Args:
        weight: float32 or float64 [groups, rows, inputs].
        factor: float64 [groups, inputs, inputs], upper triangular, above 0 on the diagonal; what
            is below the diagonal is not read.
        scale: float32 of the weight's shape, any strides, above 0 and finite.
        zero_point: int32 of the weight's shape, between ``quant_min`` and ``quant_max``; 0 on a
            float format.
        grid: in place of ``quant_min`` and ``quant_max``, as in :func:`fake_quant`.

    Returns:
        The values of the grid, in the shape and dtype of the weight.

    Raises:
        RuntimeError: an argument is not as above.
    """
    text = grid_text(quant_min, quant_max, grid=grid)
    return NATIVE.gptq(weight, factor, scale, zero_point, text)  # type: ignore[no-any-return]


def _option_values(rule: str, options: Options | None) -> list[float]:
    """Encodes names and values; numbers are passed on, since this runs at every training step."""
    if options is None or isinstance(options, Mapping):
        return encode_options(rule, options or {})
    return list(options)
