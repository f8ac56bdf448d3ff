"""The ops with names, types and defaults: thin functions over what the native library registers."""

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
    """Quantizes and dequantizes ``x``; differentiable in ``x``.

    ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max); (q - zero_point) * scale``,
    bit-equal to ONNX QuantizeLinear and DequantizeLinear. The gradient passes where the mask says:
    ``rounded`` (q inside the grid, borders included) or ``paper`` (strictly inside before
    rounding). ``rounding`` is ``half_even``, ``half_away`` or ``floor_half_up``.
    NaN stays NaN, infinities saturate; half types compute in float32 and round once.

    x any floating shape; scale float32 and zero_point int32, [1] or [C] with C = x.size(ch_axis).
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
    """Quantize-dequantize with a learned scale (Esser et al. 2020, arXiv 1902.08153).

    With v = x/s and z the zero point, inside is ``quant_min < v + z < quant_max``. Gradients: of x
    1 inside, 0 outside; of the scale ``round(v) - v`` inside, ``quant_min - z`` below and
    ``quant_max - z`` above, summed over a channel in float64 and times
    ``1 / sqrt(N * quant_max)``; of a learned zero point ``-s`` outside (LSQ+).

    Args:
        x: float32, float64, float16 or bfloat16, any shape and strides.
        scale: float32 [C], finite; what is used is ``max(|scale|, 2^-126)``.
        zero_point: int32 [C], or float32 [C], which is learned and used rounded.
        ch_axis: the axis of the C channels; -1: one scale for all.
        use_grad_scaling: False leaves the gradient of the scale as it is.
        batch_axis: axis that N, the elements of one scale, leaves out: 0 for activations.

    Raises:
        RuntimeError: a breach of the above, naming argument and value. On a CUDA device values are
            not looked at: a scale that is not finite gives NaN.
    """
    return NATIVE.lsq(  # type: ignore[no-any-return]
        x, scale, zero_point, quant_min, quant_max, ch_axis, use_grad_scaling, batch_axis
    )


def pact(x: Tensor, alpha: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize-dequantize with a learned clipping level (Choi et al. 2018, arXiv 1805.06085).

    x is clipped to [0, alpha] on an unsigned grid, to [-alpha, alpha] on a signed one, and the
    scale is that of the range. Gradients: of x 1 where it is not clipped; of alpha the sum of the
    upstream gradients where ``x >= alpha`` less those where ``x <= -alpha``. ``alpha`` float32 [1];
    what is used is ``max(|alpha|, 2^-110)``. There is no hidden weight decay.
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
    """A method of the registry by name, with its learned parameter: what ``lsq`` and ``pact`` call.

    A method with one parameter (``pact``) takes ``zero_point`` None and ``ch_axis`` -1.
    """
    return NATIVE.learned_fake_quant(  # type: ignore[no-any-return]
        x,
        method,
        parameter,
        zero_point,
        quant_min,
        quant_max,
        ch_axis,
        use_grad_scaling,
        batch_axis,
    )


def observe_(x: Tensor, extrema: Tensor, tally: Tensor, counts: Tensor, ch_axis: int = -1) -> None:
    """Adds the values of ``x`` to a statistic, in place.

    The result depends on the values alone: any split, order, stride or thread count gives the
    same bits. Non-finite values are counted in ``tally`` and excluded from the rest.
    Does nothing while a backward pass runs, so activation checkpointing does not count twice.
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
    """Adds another statistic of the same shapes, in place: the statistic of both data sets."""
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
    """The range [C,2] float32 that ``rule`` finds in a statistic; (0,0) where nothing was seen."""
    values = encode_options(rule, options)
    found: Tensor = NATIVE.solve(
        rule,
        extrema,
        tally,
        counts,
        quant_min,
        quant_max,
        symmetric,
        scale_rule,
        power_of_two,
        values,
    )
    return found


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
    """Solves a whole list of quantizers in one call, in parallel: ranges, scales, zero points.

    ``options`` holds, per quantizer, a mapping of names to values, or the values as numbers in the
    order of the rule's table (a choice as its index); without it every rule has its defaults.
    """
    count = len(rules)
    chosen: Sequence[Options] = [{}] * count if options is None else options
    if len(chosen) != count:
        raise ValueError(f"solve_many: expected options to be {count} entries, got {len(chosen)}")
    flat = [v for r, o in zip(rules, chosen, strict=True) for v in encode_options(r, o)]
    ranges, scales, zero_points = NATIVE.solve_many(
        list(rules),
        list(extrema),
        list(tally),
        list(counts),
        list(quant_min),
        list(quant_max),
        list(symmetric),
        ["grid"] * count if scale_rule is None else list(scale_rule),
        [False] * count if power_of_two is None else list(power_of_two),
        flat,
    )
    return list(ranges), list(scales), list(zero_points)


def qparams(
    range: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale [C] float32 and zero point [C] int32 of ranges [C,2].

    Symmetric and signed: ``scale = 2 * max(|lo|, |hi|) / (quant_max - quant_min)``, zero point 0;
    symmetric and unsigned: ``max(hi, 0) / quant_max``; affine: the range widened to hold 0, divided
    by the width of the grid. ``scale_rule="tvm"`` divides by 2^(bits-1); ``power_of_two`` rounds
    the scale up to 2^k. The range (0,0) gives scale 1. Computed in float64, rounded once.
    """
    scale, zero_point = NATIVE.qparams(
        range, quant_min, quant_max, symmetric, scale_rule, power_of_two
    )
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
    """Moves a range towards that of the batch ``x`` and refreshes scale and zero point, in place.

    ``range += averaging_constant * (range of x by the rule - range)``; the range of x itself where
    ``solved`` is still 0, which then becomes 1. Channels without a finite value keep theirs.
    ``averaging_constant=0`` on a solved range does nothing. No synchronisation with the host.
    ``options``: names and values, or numbers in the order of the rule's table (not checked again).
    """
    if options is None or isinstance(options, Mapping):
        options = encode_options(rule, options or {})
    NATIVE.follow_(
        x,
        range,
        scale,
        zero_point,
        solved,
        averaging_constant,
        rule,
        quant_min,
        quant_max,
        symmetric,
        scale_rule,
        power_of_two,
        list(options),
        ch_axis,
        mantissa_bits,
        octaves,
    )


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
    """:func:`follow_`, then :func:`fake_quant` of ``x`` with the range it left: a step of training.

    The same numbers as the two, in one pass over memory where a channel's values fit on a GPU's
    chip. Differentiable in ``x``, straight through.
    """
    if options is None or isinstance(options, Mapping):
        options = encode_options(rule, options or {})
    return NATIVE.follow_fake_quant(  # type: ignore[no-any-return]
        x,
        range,
        scale,
        zero_point,
        solved,
        averaging_constant,
        rule,
        quant_min,
        quant_max,
        symmetric,
        scale_rule,
        power_of_two,
        list(options),
        ch_axis,
        mantissa_bits,
        octaves,
        mask,
        rounding,
    )


def kl_threshold(
    counts: Tensor, bin_width: Tensor, levels: int = 128, variant: HistogramVariant = "slides"
) -> tuple[Tensor, Tensor]:
    """KL search on linear histograms, as other engines define it.

    counts [N,B] int64, bin_width [N] float64 -> (index [N] int64, the number of bins kept,
    threshold [N] float64). ``variant`` is ``slides``, ``modelopt``, ``ncnn``, ``tvm``,
    ``onnxruntime`` or ``horizon``; ``tvm`` and ``onnxruntime`` take a signed histogram centred
    on 0, where the index counts the bins on one side of the centre.
    """
    index, threshold = NATIVE.kl_threshold(counts, bin_width, levels, variant)
    return index, threshold
