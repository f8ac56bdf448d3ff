"""Ops that accumulate a statistic, and that make ranges and qparams of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from torch_ext.ops.grid_text import grid_text
from torch_ext.ops.loader import NATIVE
from torch_ext.ops.registry import Options, OptionValue, encode_options
from torch_ext.ops.registry_names import Rule

ScaleRule = Literal["grid", "tvm", "floor", "even"]
HistogramVariant = Literal["slides", "modelopt", "ncnn", "tvm", "onnxruntime", "horizon"]


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
    quant_min: int | None = None,
    quant_max: int | None = None,
    symmetric: bool | None = None,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    grid: str | None = None,
    **options: OptionValue,
) -> Tensor:
    """Computes the range of a statistic by a rule.

    Args:
        rule: a rule of the registry, one of ``torch_ext.observers()``.
        extrema, tally, counts: the statistic. Rules that read a histogram need ``counts``.
        grid: in place of ``quant_min`` to ``power_of_two``, as in :func:`qparams`.
        options: options of the rule by name; the others have their defaults.

    Returns:
        The range [C,2] float32: lower and upper end; (0,0) for channels without a finite value.

    Raises:
        ValueError, TypeError: an unknown rule or option, or an option out of bounds.
        RuntimeError: a missing histogram, a grid that the rule does not support, or a statistic
            whose tensors contradict each other (on a CUDA device: NaN).
    """
    values = encode_options(rule, options)
    text = grid_text(quant_min, quant_max, symmetric, scale_rule, power_of_two, grid=grid)
    range_: Tensor = NATIVE.solve(rule, extrema, tally, counts, text, values)
    return range_


def solve_many(
    rules: Sequence[str],
    extrema: Sequence[Tensor],
    tally: Sequence[Tensor],
    counts: Sequence[Tensor],
    quant_min: Sequence[int] | None = None,
    quant_max: Sequence[int] | None = None,
    symmetric: Sequence[bool] | None = None,
    scale_rule: Sequence[str] | None = None,
    power_of_two: Sequence[bool] | None = None,
    options: Sequence[Options] | None = None,
    grids: Sequence[str] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Computes ranges, scales and zero points of N statistics in one call, in parallel.

    Every argument is a list of N entries, one per statistic, with the meaning that it has in
    :func:`solve`. All tensors are on one device.

    Args:
        scale_rule: by default ``"grid"`` for all.
        power_of_two: by default False for all.
        options: for each statistic a mapping of option names to values, or the values as numbers
            in the order of the rule's table (a choice as its index); None: defaults for all.
        grids: in place of ``quant_min`` to ``power_of_two``, as ``grid`` of :func:`qparams`.

    Returns:
        Three lists of N tensors: ranges [C,2] float32, scales [C] float32, zero points [C] int32.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`solve`; or lists of different lengths.
    """
    count = len(rules)
    if options is None:
        options = [{}] * count
    parts: dict[str, Sequence[Any] | None] = {
        "quant_min": quant_min,
        "quant_max": quant_max,
        "symmetric": symmetric,
        "scale_rule": scale_rule,
        "power_of_two": power_of_two,
        "grid": grids,
    }
    given = {name: entries for name, entries in parts.items() if entries is not None}
    for name, entries in {"options": options, **given}.items():
        if len(entries) != count:
            name = "grids" if name == "grid" else name
            raise ValueError(
                f"solve_many: expected {name} to be {count} entries, got {len(entries)}"
            )
    values = [
        value
        for rule, rule_options in zip(rules, options, strict=True)
        for value in encode_options(rule, rule_options)
    ]
    texts = [grid_text(**{name: part[i] for name, part in given.items()}) for i in range(count)]
    lists = map(list, (rules, extrema, tally, counts))
    ranges, scales, zero_points = NATIVE.solve_many(*lists, texts, values)
    return list(ranges), list(scales), list(zero_points)


def qparams(
    range: Tensor,
    quant_min: int | None = None,
    quant_max: int | None = None,
    symmetric: bool | None = None,
    scale_rule: ScaleRule = "grid",
    power_of_two: bool = False,
    grid: str | None = None,
    tensor_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes scales and zero points of ranges. In float64, rounded once.

    - Symmetric, signed: ``scale = 2 * max(|lo|, |hi|) / (quant_max - quant_min)``, zero point 0.
    - Symmetric, unsigned: ``scale = max(hi, 0) / quant_max``, zero point 0.
    - Affine: the range is widened to include 0; ``scale = (hi - lo) / (quant_max - quant_min)``.
    - A float format: ``scale = max(|lo|, |hi|) / largest``, zero point 0.

    The range (0,0) gives scale 1.

    With the word ``scale_dtype=float8_e4m3`` in ``grid`` (NVFP4, with ``float4_e2m1`` and groups of
    16): ``scale = float8_e4m3(clamp(T / largest / tensor_scale, 2^-6, 448)) * tensor_scale``, T
    being ``max(|lo|, |hi|)``, for the range (0,0) too. Such a ``tensor_scale`` is
    ``amax / (448 * 6)``.

    Args:
        range: float32 [C,2], finite, lower end first.
        scale_rule: ``"grid"``, as above; ``"tvm"`` (symmetric grids only) divides
            ``max(|lo|, |hi|)`` by 2^(bits-1), on an unsigned grid by 2^bits. ``"floor"`` and
            ``"even"`` (symmetric grids only) give powers of two: with T the bound above,
            ``2^(floor(log2 T) - floor(log2 largest))``, the rule of OCP's MX formats, by which
            values beyond the largest one saturate; ``"even"`` (float formats only) after rounding
            T to the format's mantissa bits, half up.
        power_of_two: rounds the scale up to a power of two, by which nothing saturates; not with
            ``"floor"`` or ``"even"``.
        grid: the grid as a text, in place of all of these: ``"float8_e4m3"``,
            ``"float8_e5m2 power_of_two"``, ``"[0,255] affine"``.
        tensor_scale: float32 [1], above 0, of a grid with ``scale_dtype``, and a constant, as the
            scales are; else None.

    Returns:
        Scale [C] float32 and zero point [C] int32.

    Raises:
        RuntimeError: an argument is not as above.
    """
    text = grid_text(quant_min, quant_max, symmetric, scale_rule, power_of_two, grid=grid)
    scale, zero_point = NATIVE.qparams(range, text, tensor_scale)
    return scale, zero_point


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
