"""The native ops with types and defaults. The package docstring describes shared arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from torch_ext.ops.loader import NATIVE
from torch_ext.ops.registry import Options, OptionValue, encode_options
from torch_ext.ops.registry_names import LearnedMethod, Rule

Mask = Literal["rounded", "paper"]
Rounding = Literal["half_even", "half_away", "floor_half_up"]
ScaleRule = Literal["grid", "tvm"]
HistogramVariant = Literal["slides", "modelopt", "ncnn", "tvm", "onnxruntime", "horizon"]


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int = -1,
    mask: Mask = "rounded",
    rounding: Rounding = "half_even",
) -> Tensor:
    """Quantizes and dequantizes ``x``; differentiable in ``x`` (straight-through estimator).

    ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max); (q - zero_point) * scale``,
    bit-equal to ONNX QuantizeLinear and DequantizeLinear. NaN stays NaN, infinities saturate.
    float16 and bfloat16 are computed in float32 and rounded once.

    Args:
        x: any floating dtype, shape and strides.
        scale: float32 [C], above 0 and finite.
        zero_point: int32 [C], between ``quant_min`` and ``quant_max``.
        ch_axis: the axis of the C channels; -1: C = 1.
        mask: where the gradient passes: ``"rounded"``, where the rounded value is on the grid,
            ends included; ``"paper"``, where the value before rounding is strictly between them.
        rounding: ``"half_even"``, ``"half_away"`` (from zero) or ``"floor_half_up"``.

    Raises:
        RuntimeError: an argument is not as above.
    """
    out: Tensor = NATIVE.fake_quant(
        x, scale, zero_point, quant_min, quant_max, ch_axis, mask, rounding
    )
    return out


def lsq(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int = -1,
    use_grad_scaling: bool = True,
    batch_axis: int = -1,
) -> Tensor:
    """Quantizes and dequantizes with a learned scale (Esser et al. 2020, arXiv 1902.08153).

    Let v = x / scale and z the zero point. A value is inside if ``quant_min < v + z < quant_max``.

    - Gradient of x: 1 inside, 0 outside.
    - Gradient of the scale: ``round(v) - v`` inside, ``quant_min - z`` below, ``quant_max - z``
      above; summed over the channel in float64, then multiplied by ``1 / sqrt(N * quant_max)``,
      where N is the number of elements that share the scale.
    - Gradient of a learned zero point: 0 inside, ``-scale`` outside (LSQ+, Bhalgat et al. 2020).

    Args:
        x: float32, float64, float16 or bfloat16, any shape and strides.
        scale: float32 [C], finite. The op computes with ``max(|scale|, 2^-126)``.
        zero_point: int32 [C], which is fixed; or float32 [C], which is learned, and is rounded and
            clamped to the grid.
        ch_axis: the axis of the C channels; -1: C = 1.
        use_grad_scaling: False omits the factor ``1 / sqrt(N * quant_max)``.
        batch_axis: the axis whose size is left out of N; 0 for activations, -1 for none.

    Raises:
        RuntimeError: an argument is not as above. Values of CUDA tensors are not checked: a scale
            that is not finite gives NaN.
    """
    return NATIVE.lsq(  # type: ignore[no-any-return]
        x, scale, zero_point, quant_min, quant_max, ch_axis, use_grad_scaling, batch_axis
    )


def pact(x: Tensor, alpha: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantizes and dequantizes with a learned clipping level (Choi et al. 2018, arXiv 1805.06085).

    Clips x to [0, alpha] if ``quant_min`` is 0, else to [-alpha, alpha], and quantizes it with the
    scale of that range. The gradient of x is 1 where x is not clipped, else 0. The gradient of
    alpha is the sum of the upstream gradients where ``x >= alpha``, minus, on a signed grid, those
    where ``x <= -alpha``. The paper's L2 penalty on alpha is not included: use weight decay.

    Args:
        x: float32, float64, float16 or bfloat16, any shape and strides.
        alpha: float32 [1], finite. The op computes with ``max(|alpha|, 2^-110)``.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return NATIVE.pact(x, alpha, quant_min, quant_max)  # type: ignore[no-any-return]


def learned_fake_quant(
    x: Tensor,
    method: LearnedMethod,
    parameter: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    ch_axis: int = -1,
    use_grad_scaling: bool = True,
    batch_axis: int = -1,
) -> Tensor:
    """Calls the learned method of a name: :func:`lsq` or :func:`pact`.

    Args:
        method: ``"lsq"`` or ``"pact"``.
        parameter: what the method learns: ``scale`` [C] of lsq, ``alpha`` [1] of pact.
        zero_point: as in :func:`lsq`; None for pact.
        ch_axis, use_grad_scaling, batch_axis: as in :func:`lsq`; the defaults for pact.

    Raises:
        RuntimeError: an unknown method, or an argument that it does not take.
    """
    grid = (quant_min, quant_max)
    return NATIVE.learned_fake_quant(  # type: ignore[no-any-return]
        x, method, parameter, zero_point, *grid, ch_axis, use_grad_scaling, batch_axis
    )


def observe_(x: Tensor, extrema: Tensor, tally: Tensor, counts: Tensor, ch_axis: int = -1) -> None:
    """Adds the values of ``x`` to a statistic, in place.

    The result depends on the values alone: any split into batches, order, strides and number of
    threads give the same bits. Non-finite values are counted in ``tally`` and nowhere else. Does
    nothing while a backward pass runs, because activation checkpointing repeats the forward there.

    Args:
        x: any floating dtype, shape and strides.
        extrema, tally, counts: the statistic, of C = ``x.size(ch_axis)`` channels.
        ch_axis: the axis of the C channels; -1: C = 1.

    Raises:
        RuntimeError: an argument of another dtype, shape or device.
    """
    NATIVE.observe_(x, extrema, tally, counts, ch_axis)


def merge_(
    extrema: Tensor,
    tally: Tensor,
    counts: Tensor,
    other_extrema: Tensor,
    other_tally: Tensor,
    other_counts: Tensor,
) -> None:
    """Adds the statistic ``other_*`` to the first one, in place.

    The result is the statistic of both data sets together. All shapes must be equal.

    Raises:
        RuntimeError: shapes, dtypes or devices differ.
    """
    NATIVE.merge_(extrema, tally, counts, other_extrema, other_tally, other_counts)


def solve(
    rule: Rule,
    extrema: Tensor,
    tally: Tensor,
    counts: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    **options: OptionValue,
) -> Tensor:
    """Computes the range of a statistic by a rule.

    Args:
        rule: a rule of the registry, one of ``torch_ext.observers()``.
        extrema, tally, counts: the statistic. Rules that read a histogram need ``counts``.
        options: options of the rule by name; the others have their defaults.

    Returns:
        The range [C,2] float32: lower and upper end; (0,0) for channels without a finite value.

    Raises:
        ValueError, TypeError: an unknown rule or option, or an option out of bounds.
        RuntimeError: a missing histogram, a grid that the rule does not support, or a statistic
            whose tensors contradict each other (on a CUDA device: NaN).
    """
    values = encode_options(rule, options)
    grid = (quant_min, quant_max, symmetric, scale_rule, power_of_two)
    range_: Tensor = NATIVE.solve(rule, extrema, tally, counts, *grid, values)
    return range_


def solve_many(
    rules: Sequence[str],
    extrema: Sequence[Tensor],
    tally: Sequence[Tensor],
    counts: Sequence[Tensor],
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    symmetric: Sequence[bool],
    scale_rule: Sequence[str] | None = None,
    power_of_two: Sequence[bool] | None = None,
    options: Sequence[Options] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Computes ranges, scales and zero points of N statistics in one call, in parallel.

    Every argument is a list of N entries, one per statistic, with the meaning that it has in
    :func:`solve`. All tensors are on one device.

    Args:
        scale_rule: by default ``"grid"`` for all.
        power_of_two: by default False for all.
        options: for each statistic a mapping of option names to values, or the values as numbers
            in the order of the rule's table (a choice as its index); None: defaults for all.

    Returns:
        Three lists of N tensors: ranges [C,2] float32, scales [C] float32, zero points [C] int32.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`solve`; or lists of different lengths.
    """
    count = len(rules)
    if options is None:
        options = [{}] * count
    if len(options) != count:
        raise ValueError(f"solve_many: expected options to be {count} entries, got {len(options)}")
    values = [
        value
        for rule, rule_options in zip(rules, options, strict=True)
        for value in encode_options(rule, rule_options)
    ]
    scale_rule = ["grid"] * count if scale_rule is None else scale_rule
    power_of_two = [False] * count if power_of_two is None else power_of_two
    statistics = (extrema, tally, counts)
    grids = (quant_min, quant_max, symmetric, scale_rule, power_of_two)
    lists = map(list, (rules, *statistics, *grids))
    ranges, scales, zero_points = NATIVE.solve_many(*lists, values)
    return list(ranges), list(scales), list(zero_points)


def qparams(
    range: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes scales and zero points of ranges. In float64, rounded once.

    - Symmetric, signed: ``scale = 2 * max(|lo|, |hi|) / (quant_max - quant_min)``, zero point 0.
    - Symmetric, unsigned: ``scale = max(hi, 0) / quant_max``, zero point 0.
    - Affine: the range is widened to include 0; ``scale = (hi - lo) / (quant_max - quant_min)``.

    The range (0,0) gives scale 1.

    Args:
        range: float32 [C,2], finite, lower end first.
        scale_rule: ``"grid"``, as above; ``"tvm"`` (symmetric grids only) divides
            ``max(|lo|, |hi|)`` by 2^(bits-1), on an unsigned grid by 2^bits.
        power_of_two: rounds the scale up to a power of two.

    Returns:
        Scale [C] float32 and zero point [C] int32.

    Raises:
        RuntimeError: an argument is not as above.
    """
    grid = (quant_min, quant_max, symmetric, scale_rule, power_of_two)
    scale, zero_point = NATIVE.qparams(range, *grid)
    return scale, zero_point


def follow_(
    x: Tensor,
    range: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    solved: Tensor,
    averaging_constant: float,
    rule: Rule,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    options: Options | None = None,
    ch_axis: int = -1,
    mantissa_bits: int = 10,
    octaves: int = 16,
) -> None:
    """Moves a range towards that of the batch ``x`` and updates scale and zero point, in place.

    ``range += averaging_constant * (range of x by the rule - range)``. If ``solved`` is 0, the
    range becomes that of x, and ``solved`` 1. Channels without a finite value keep their range.
    Does not synchronize with the host. Does nothing while a backward pass runs.

    Args:
        x: any floating dtype, shape and strides.
        range, scale, zero_point: float32 [C,2], float32 [C] and int32 [C], written to.
        solved: uint8 [1], whether there is a range yet; written to.
        averaging_constant: 0 to 1; 0 leaves a solved range as it is.
        rule: a rule of the registry.
        options: of the rule, by name; or as numbers in the order of the rule's table, which only
            the op checks.
        mantissa_bits, octaves: layout of the batch's histogram, 5..10 and 4..32.

    Raises:
        ValueError, TypeError: an unknown rule or option, or an option out of bounds.
        RuntimeError: an argument is not as above.
    """
    values = _option_values(rule, options)
    buffers = (range, scale, zero_point, solved)
    grid = (quant_min, quant_max, symmetric, scale_rule, power_of_two)
    layout = (ch_axis, mantissa_bits, octaves)
    NATIVE.follow_(x, *buffers, averaging_constant, rule, *grid, values, *layout)


def follow_fake_quant(
    x: Tensor,
    range: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    solved: Tensor,
    averaging_constant: float,
    rule: Rule,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    options: Options | None = None,
    ch_axis: int = -1,
    mantissa_bits: int = 10,
    octaves: int = 16,
    mask: Mask = "rounded",
    rounding: Rounding = "half_even",
) -> Tensor:
    """Runs :func:`follow_`, then :func:`fake_quant` of ``x`` with the updated scale.

    Gives the same numbers as the two calls. On a GPU it reads ``x`` only once if a channel's values
    fit into on-chip memory. Differentiable in ``x`` (straight-through).

    Arguments, result and errors are those of the two functions.
    """
    values = _option_values(rule, options)
    buffers = (range, scale, zero_point, solved)
    grid = (quant_min, quant_max, symmetric, scale_rule, power_of_two)
    layout = (ch_axis, mantissa_bits, octaves)
    return NATIVE.follow_fake_quant(  # type: ignore[no-any-return]
        x, *buffers, averaging_constant, rule, *grid, values, *layout, mask, rounding
    )


def _option_values(rule: str, options: Options | None) -> list[float]:
    """Encodes names and values; numbers are passed on, since this runs at every training step."""
    if options is None or isinstance(options, Mapping):
        return encode_options(rule, options or {})
    return list(options)


def kl_threshold(
    counts: Tensor, bin_width: Tensor, levels: int = 128, variant: HistogramVariant = "slides"
) -> tuple[Tensor, Tensor]:
    """Searches the clipping threshold of N linear histograms by KL divergence.

    Args:
        counts: int64 [N,B], the histograms; each sums to at most 2^53. Bins start at 0, except for
            the variants ``"tvm"`` and ``"onnxruntime"``, whose histograms are centred on 0.
        bin_width: float64 [N], above 0.
        levels: quantization levels, 2 to 65536 and at most B.
        variant: the engine whose search is computed: ``"slides"`` (TensorRT's published search),
            ``"modelopt"``, ``"ncnn"``, ``"tvm"``, ``"onnxruntime"`` or ``"horizon"``.

    Returns:
        ``index`` [N] int64, the number of bins that are kept (of a centred histogram, on one side
        of the centre), and ``threshold`` [N] float64.

    Raises:
        RuntimeError: an argument is not as above. On a CUDA device values are not checked: a bad
            row gives index -1 and threshold NaN.
    """
    index, threshold = NATIVE.kl_threshold(counts, bin_width, levels, variant)
    return index, threshold
