"""QConfigs of the formats in blocks: those of OCP's MX, and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch_ext.ops.registry_names import Rule
from torch_ext.prepare.qconfig import Factory, QConfig, make_factory
from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import joined

BlockFormat = Literal[
    "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4"
]
BlockScaleRule = Literal["floor", "ceil", "even"]

_WHO = "get_block_qconfig"
_FLOATS = {
    "mxfp8_e4m3": "float8_e4m3",
    "mxfp8_e5m2": "float8_e5m2",
    "mxfp6_e2m3": "float6_e2m3",
    "mxfp6_e3m2": "float6_e3m2",
    "mxfp4": "float4_e2m1",
}
# Both ends are 127, as -128 has no opposite.
_INT8 = {"dtype": "int8", "quant_min": -127, "quant_max": 127}
_NVFP4 = {
    "dtype": "float4_e2m1",
    "group_size": 16,
    "scale_dtype": "float8_e4m3",
    "dynamic": True,
    "qscheme": "per_tensor_symmetric",
}
_MX_GROUP = 32


def get_block_qconfig(
    format: BlockFormat,
    scale_rule: BlockScaleRule | None = None,
    *,
    activation_observer: Rule = "min_max",
    weight_observer: Rule = "min_max",
    activation_qkwargs: Mapping[str, Any] | None = None,
    weight_qkwargs: Mapping[str, Any] | None = None,
) -> QConfig:
    """A QConfig of a format in blocks, for a model, or for modules by ``mapping``.

    ================================  ======  =================  ===================================
    format                            block   values             scale of a block
    ================================  ======  =================  ===================================
    ``mxfp8_e4m3``, ``mxfp8_e5m2``    32      8-bit floats       a power of two
    ``mxfp6_e2m3``, ``mxfp6_e3m2``    32      6-bit floats       a power of two
    ``mxfp4``                         32      4-bit floats       a power of two
    ``mxint8``                        32      -127 to 127        a power of two
    ``nvfp4``                         16      4-bit floats       float8_e4m3 times one of the tensor
    ================================  ======  =================  ===================================

    Blocks lie along what a layer sums over: the input channels of its weight, and of what it reads
    the last axis, or the channels of a convolution. Their size has to divide it: other layers, such
    as a first convolution of 3 channels or a depthwise one, raise in ``prepare_qat`` by name.

    Scales of activations are dynamic: there is nothing to calibrate but the tensor scale of nvfp4.
    Scales of weights follow the weight.

    Args:
        format: one of the table.
        scale_rule: of MX, with T the largest magnitude of a block: ``"floor"`` (None; the rule of
            OCP's MX 1.0) is ``2^(floor(log2 T) - floor(log2 largest number))``, by which numbers
            may saturate; ``"ceil"`` the least power of two by which none does; ``"even"`` floor of
            T rounded to the format's mantissa bits, for floats. None with nvfp4.
        activation_observer: the rule of nvfp4's tensor scale of activations, such as
            ``"percentile"``; rules of equal levels (``kl``, ``aciq``) refuse.
        weight_observer: the rule of weights; of nvfp4, of their tensor scale.
        activation_qkwargs, weight_qkwargs: further keys, as in :func:`get_default_qconfig`.

    Raises:
        TypeError: ``*_qkwargs`` is no mapping, or a value has a wrong type.
        ValueError: an unknown format, scale rule, observer or key, or values that do not fit
            together.
        RuntimeError: the rule does not accept its options or the grid.
    """
    if format not in get_args(BlockFormat):
        known = joined(get_args(BlockFormat))
        raise ValueError(f"{_WHO}: unknown format {bounded(format)}; known: {known}")
    sides: list[dict[str, Any]]
    refused: tuple[str, ...] = ()
    if format == "nvfp4":
        if scale_rule is not None:
            raise ValueError(
                f"{_WHO}: expected scale_rule to be None with nvfp4, got {bounded(scale_rule)}: "
                "its block scales are no powers of two"
            )
        sides = [dict(_NVFP4), dict(_NVFP4)]
    else:
        values = {"dtype": _FLOATS[format]} if format in _FLOATS else dict(_INT8)
        keys = {**values, "group_size": _MX_GROUP, **_power_of_two(format, scale_rule)}
        sides = [{**keys, "dynamic": True}, keys]
        refused = ("scale_rule", "power_of_two")  # either alone would contradict the other
    given = (activation_qkwargs, weight_qkwargs)
    rules = (activation_observer, weight_observer)
    factories: list[Factory | None] = []
    for side, own, more, rule in zip(("activation", "weight"), sides, given, rules, strict=True):
        if more is not None and not isinstance(more, Mapping):
            raise TypeError(f"{_WHO}: expected {side}_qkwargs to be a mapping, got {bounded(more)}")
        if decided := [key for key in more or {} if key in own or key in refused]:
            raise ValueError(
                f"{_WHO}: expected {side}_qkwargs without {', '.join(decided)}, which {format} "
                "decides; get_default_qconfig takes all keys"
            )
        factories.append(make_factory(_WHO, side, "fake_quant", rule, own | dict(more or {}), None))
    activation, weight = factories
    return QConfig(activation, weight)


def _power_of_two(format: str, scale_rule: object) -> dict[str, Any]:
    """The keys of a rule for scales that are powers of two."""
    rule = "floor" if scale_rule is None else scale_rule
    if rule not in get_args(BlockScaleRule):
        known = joined(get_args(BlockScaleRule))
        raise ValueError(f"{_WHO}: unknown scale_rule {bounded(rule)}; known: {known}")
    if rule == "even" and format not in _FLOATS:
        raise ValueError(
            f"{_WHO}: expected scale_rule to be floor or ceil with {format}, got even: integers "
            "have no mantissa to round to"
        )
    return {"power_of_two": True} if rule == "ceil" else {"scale_rule": rule}
