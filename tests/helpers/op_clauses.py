"""One wrong call for every clause of every op's contract."""

from __future__ import annotations

from typing import Any

import torch

import torch_ext
from grid_clauses import (
    F64,
    I32,
    INF,
    NAN,
    Clause,
    data_clauses,
    grid_clauses,
    grid_text_clauses,
    tensor_scale_clauses,
)
from op_samples import SAMPLES

I64 = torch.int64


def state_clauses(prefix: str = "", written: bool = True) -> list[Clause]:
    """A statistic of 3 channels; layouts that no op accepts."""
    e, t, c = prefix + "extrema", prefix + "tally", prefix + "counts"
    clauses: list[Clause] = [
        ("extrema dtype", e, {e: torch.zeros(3, 2, dtype=F64)}),
        ("extrema rank", e, {e: torch.zeros(6)}),
        ("extrema columns", e, {e: torch.zeros(3, 3)}),
        ("extrema rows", f"{e}|{t}|{c}|x", {e: torch.zeros(2, 2)}),
        ("tally dtype", t, {t: torch.zeros(3, 5, dtype=I32)}),
        ("tally rank", t, {t: torch.zeros(15, dtype=I64)}),
        ("tally columns", t, {t: torch.zeros(3, 4, dtype=I64)}),
        ("tally rows", t, {t: torch.zeros(4, 5, dtype=I64)}),
        ("counts dtype", c, {c: torch.zeros(3, 2, 12, 128)}),
        ("counts rank", c, {c: torch.zeros(3, 2, 12 * 128, dtype=I64)}),
        ("counts rows", c, {c: torch.zeros(2, 2, 12, 128, dtype=I64)}),
        ("counts signs", c, {c: torch.zeros(3, 1, 12, 128, dtype=I64)}),
        ("too few octaves", c, {c: torch.zeros(3, 2, 3, 128, dtype=I64)}),
        ("too many octaves", c, {c: torch.zeros(3, 2, 33, 128, dtype=I64)}),
        ("too few sub-bins", c, {c: torch.zeros(3, 2, 12, 16, dtype=I64)}),
        ("too many sub-bins", c, {c: torch.zeros(3, 2, 12, 2048, dtype=I64)}),
        ("sub-bins no power of two", c, {c: torch.zeros(3, 2, 12, 100, dtype=I64)}),
        ("octaves without bins", c, {c: torch.zeros(3, 2, 12, 0, dtype=I64)}),
    ]
    if written:
        clauses += [
            ("extrema strided", e, {e: torch.zeros(2, 3).t()}),
            ("tally expanded", t, {t: torch.zeros(1, 5, dtype=I64).expand(3, 5)}),
            ("counts strided", c, {c: torch.zeros(3, 2, 128, 12, dtype=I64).transpose(2, 3)}),
        ]
    return clauses


def rule_clauses() -> list[Clause]:
    return [
        ("unknown rule", "known: min_max", {"rule": "histogram"}),
        ("empty rule", "known: min_max", {"rule": ""}),
        ("too many options", "options", {"rule": "percentile", "options": [99.0, 1.0]}),
        ("too few options", "options", {"rule": "clip", "options": [1.0]}),
        ("percentile of 0", "percentile", {"rule": "percentile", "options": [0.0]}),
        ("percentile above 100", "percentile", {"rule": "percentile", "options": [100.1]}),
        ("percentile NaN", "percentile", {"rule": "percentile", "options": [NAN]}),
        ("clip upside down", "xmin|xmax", {"rule": "clip", "options": [1.0, -1.0]}),
        ("clip infinite", "xmin|xmax", {"rule": "clip", "options": [-INF, 1.0]}),
        ("std_scale negative", "std_scale", {"rule": "clip_std", "options": [-1.0]}),
        ("fixed scale 0", "scale", {"rule": "fixed_scale", "options": [0.0, 0.0]}),
        ("fixed scale negative", "scale", {"rule": "fixed_scale", "options": [-1.0, 0.0]}),
        ("fixed scale infinite", "scale", {"rule": "fixed_scale", "options": [INF, 0.0]}),
        (
            "fixed zero point off grid",
            "zero_point",
            {"rule": "fixed_scale", "options": [1.0, 999.0]},
        ),
        ("fixed zero point broken", "zero_point", {"rule": "fixed_scale", "options": [1.0, 0.5]}),
        ("no such variant", "variant", {"rule": "kl", "options": [99.0]}),
        ("variant between two", "variant", {"rule": "kl", "options": [0.5]}),
    ]


def qparams_clauses() -> list[Clause]:
    """Scale and zero point of 3 channels on axis 1."""
    return [
        ("scale dtype", "scale", {"scale": torch.ones(3, dtype=F64)}),
        ("scale rank", "scale", {"scale": torch.ones(3, 1)}),
        ("scale numel", "scale", {"scale": torch.ones(4)}),
        ("scale empty", "scale", {"scale": torch.ones(0)}),
        ("scale zero", "scale", {"scale": torch.tensor([1.0, 0.0, 1.0])}),
        ("scale negative", "scale", {"scale": torch.tensor([1.0, 1.0, -0.5])}),
        ("scale NaN", "scale", {"scale": torch.tensor([NAN, 1.0, 1.0])}),
        ("scale infinite", "scale", {"scale": torch.tensor([1.0, INF, 1.0])}),
        ("many scales per tensor", "scale|ch_axis", {"ch_axis": -1}),
        ("zero_point dtype", "zero_point", {"zero_point": torch.zeros(3, dtype=I64)}),
        ("zero_point float", "zero_point", {"zero_point": torch.zeros(3)}),
        ("zero_point rank", "zero_point", {"zero_point": torch.zeros(3, 1, dtype=I32)}),
        ("zero_point numel", "zero_point", {"zero_point": torch.zeros(2, dtype=I32)}),
        ("zero_point off grid", "zero_point", {"zero_point": torch.tensor([0, 0, 128], dtype=I32)}),
        ("unknown mask", "known: rounded", {"mask": "soft"}),
    ]


def many(**wrong: Any) -> dict[str, Any]:
    """The sample of solve_many has two quantizers: wrong values for the second."""
    good = SAMPLES["solve_many"][0]()
    return {name: [good[name][0], value] for name, value in wrong.items()}


def follow_clauses() -> list[Clause]:
    return [
        *data_clauses(3),
        ("range dtype", "range", {"range": torch.zeros(3, 2, dtype=F64)}),
        ("range columns", "range", {"range": torch.zeros(3, 3)}),
        ("range rows", "range", {"range": torch.zeros(4, 2)}),
        ("range strided", "range", {"range": torch.zeros(2, 3).t()}),
        ("scale dtype", "scale", {"scale": torch.zeros(3, dtype=torch.half)}),
        ("scale numel", "scale", {"scale": torch.zeros(2)}),
        ("zero_point dtype", "zero_point", {"zero_point": torch.zeros(3, dtype=I64)}),
        ("zero_point numel", "zero_point", {"zero_point": torch.zeros(1, dtype=I32)}),
        ("solved dtype", "solved", {"solved": torch.zeros(1)}),
        ("solved numel", "solved", {"solved": torch.zeros(3, dtype=torch.uint8)}),
        ("constant negative", "averaging_constant", {"averaging_constant": -0.1}),
        ("constant above 1", "averaging_constant", {"averaging_constant": 1.5}),
        ("constant NaN", "averaging_constant", {"averaging_constant": NAN}),
        ("mantissa bits", "mantissa_bits", {"mantissa_bits": 4}),
        ("many mantissa bits", "mantissa_bits", {"mantissa_bits": 11}),
        ("octaves", "octaves", {"octaves": 3}),
        ("many octaves", "octaves", {"octaves": 33}),
        ("16 bits", "grid", {"grid": "[-32768,32767] symmetric"}),
        ("neither symmetric nor affine", "grid", {"grid": "[-128,127]"}),
        ("other number of channels", "x|range", {"x": torch.ones(2, 4)}),
        *grid_clauses(),
        *rule_clauses(),
    ]


def dynamic_clauses() -> list[Clause]:
    """Of x [2, 3], in groups of 3."""
    return [
        *data_clauses(3)[:3],
        ("data without an axis", "x", {"x": torch.tensor(1.0)}),
        ("no group", "group_size", {"group_size": 0}),
        ("group below -1", "group_size", {"group_size": -3}),
        ("group that does not divide", "group_size", {"group_size": 2}),
        ("group past the axis", "group_size", {"group_size": 6}),
        ("neither symmetric nor affine", "grid", {"grid": "[-128,127]"}),
        *grid_clauses(),
        *tensor_scale_clauses(),
    ]


MASK_CLAUSES: list[Clause] = [("unknown mask", "known: rounded", {"mask": "none"})]
LEARNED_GRID: list[Clause] = [
    ("quant_min above 0", "quant_min", {"grid": "[1,7]"}),
    ("quant_min far", "quant_min", {"grid": "[-40000,7]"}),
    ("quant_max 0", "quant_max", {"grid": "[-8,0]"}),
    ("quant_max far", "quant_max", {"grid": "[-8,70000]"}),
    ("rounding of another method", "rounding", {"grid": "[-8,7] rounding=half_away"}),
    *grid_text_clauses(),
]


def lsq_clauses() -> list[Clause]:
    return [
        ("integer data", "x", {"x": torch.ones(2, 3, dtype=I32)}),
        ("scale dtype", "scale", {"scale": torch.ones(3, dtype=F64)}),
        ("scale numel", "scale", {"scale": torch.ones(2)}),
        ("scale NaN", "scale", {"scale": torch.tensor([1.0, NAN, 1.0])}),
        ("scale infinite", "scale", {"scale": torch.full((3,), INF)}),
        ("zero_point dtype", "zero_point", {"zero_point": torch.zeros(3, dtype=I64)}),
        ("zero_point numel", "zero_point", {"zero_point": torch.zeros(1, dtype=I32)}),
        ("zero_point below", "zero_point", {"zero_point": torch.tensor([0, -129, 0], dtype=I32)}),
        ("zero_point above", "zero_point", {"zero_point": torch.tensor([0, 0, 128], dtype=I32)}),
        (
            "zero_point of a float format",
            "zero_point",
            {"grid": "float8_e4m3", "zero_point": torch.ones(3, dtype=I32)},
        ),
        ("learned zero_point NaN", "zero_point", {"zero_point": torch.full((3,), NAN)}),
        ("axis", "ch_axis", {"ch_axis": 2}),
        ("batch axis", "batch_axis", {"batch_axis": 2}),
        ("batch axis of the channels", "batch_axis", {"batch_axis": 1}),
        *LEARNED_GRID,
    ]


def pact_clauses() -> list[Clause]:
    return [
        ("integer data", "x", {"x": torch.ones(7, dtype=I32)}),
        ("alpha dtype", "alpha", {"alpha": torch.ones(1, dtype=F64)}),
        ("alpha numel", "alpha", {"alpha": torch.ones(2)}),
        ("alpha NaN", "alpha", {"alpha": torch.full((1,), NAN)}),
        *LEARNED_GRID,
    ]


def learned_clauses() -> list[Clause]:
    """Those of lsq, by whose name the op speaks, and of a method with one parameter."""
    renamed = {"scale": "parameter"}
    clauses = [
        (what, named, {renamed.get(key, key): value for key, value in wrong.items()})
        for what, named, wrong in lsq_clauses()
    ]
    return [
        *clauses,
        ("unknown method", "known: lsq", {"method": "fake_quant"}),
        ("pact per channel", "pact: ch_axis", {"method": "pact", "zero_point": None}),
        (
            "pact with a zero point",
            "pact: zero_point",
            {"method": "pact", "ch_axis": -1, "parameter": torch.ones(1)},
        ),
    ]


def upstream_clauses() -> list[Clause]:
    return [
        ("gradient shape", "grad", {"grad": torch.ones(11)}),
        ("gradient dtype", "x|grad", {"grad": torch.ones(2, 3, dtype=torch.bfloat16)}),
    ]


def tangent_clauses() -> list[Clause]:
    wrong: list[Clause] = [
        ("tangent shape", "x_tangent", {"x_tangent": torch.ones(3, 2)}),
        ("tangent dtype", "x|x_tangent", {"x_tangent": torch.ones(2, 3, dtype=torch.half)}),
    ]
    for name in ("parameter_tangent", "zero_point_tangent", "mixed_tangent"):
        wrong += [
            (f"{name} dtype", name, {name: torch.ones(3, dtype=F64)}),
            (f"{name} numel", name, {name: torch.ones(2)}),
        ]
    return wrong


def gptq_clauses() -> list[Clause]:
    """Of a weight [2, 3, 4]."""
    shape = (2, 3, 4)
    off = torch.ones(shape)
    off[1, 2, 3] = 0
    broken = torch.eye(4, dtype=F64).repeat(2, 1, 1)
    broken[1, 2, 2] = 0
    return [
        ("integer weight", "weight", {"weight": torch.ones(shape, dtype=I32)}),
        ("half weight", "weight", {"weight": torch.ones(shape, dtype=torch.half)}),
        ("weight rank", "weight", {"weight": torch.ones(3, 4)}),
        ("factor dtype", "factor", {"factor": torch.ones(2, 4, 4)}),
        ("factor rank", "factor", {"factor": torch.ones(4, 4, dtype=F64)}),
        ("factor groups", "factor", {"factor": torch.ones(1, 4, 4, dtype=F64)}),
        ("factor size", "factor", {"factor": torch.ones(2, 4, 5, dtype=F64)}),
        ("factor without a pivot", "factor", {"factor": broken}),
        ("factor with a NaN", "factor", {"factor": broken.log()}),
        ("scale dtype of a weight", "scale", {"scale": torch.ones(shape, dtype=F64)}),
        ("scale shape", "scale", {"scale": torch.ones(2, 3, 1)}),
        ("scale rank of a weight", "scale", {"scale": torch.ones(3)}),
        ("one scale of a weight zero", "scale", {"scale": off}),
        ("one scale of a weight NaN", "scale", {"scale": off.log().mul(NAN)}),
        ("zero point type", "zero_point", {"zero_point": torch.ones(shape)}),
        ("zero point shape", "zero_point", {"zero_point": torch.ones(2, 3, 5, dtype=I32)}),
        ("one zero point off", "zero_point", {"zero_point": off.to(I32) * 8}),
        *grid_text_clauses(),
    ]


CLAUSES: dict[str, list[Clause]] = {
    "fake_quant": [*data_clauses(3), *qparams_clauses(), *grid_clauses()],
    "_fake_quant_forward": [*data_clauses(3), *qparams_clauses(), *grid_clauses()],
    "_fake_quant_backward": [
        ("integer gradient", "grad", {"grad": torch.ones(10, dtype=I32)}),
        ("mask dtype", "mask", {"mask": torch.zeros(2, dtype=torch.bool)}),
        ("mask too short", "mask", {"mask": torch.zeros(1, dtype=torch.uint8)}),
        ("mask too long", "mask", {"mask": torch.zeros(3, dtype=torch.uint8)}),
        ("mask rank", "mask", {"mask": torch.zeros(2, 1, dtype=torch.uint8)}),
    ],
    "dynamic_fake_quant": dynamic_clauses(),
    "_dynamic_fake_quant_forward": [
        *dynamic_clauses(),
        ("order of other axes", "order", {"order": [0, 2]}),
    ],
    "observe_": [
        *data_clauses(3),
        *state_clauses(),
        ("other number of channels", "x|extrema", {"x": torch.ones(2, 4)}),
        ("many channels per tensor", "extrema|ch_axis", {"ch_axis": -1}),
    ],
    "merge_": [*state_clauses(), *state_clauses("other_", written=False)],
    "solve": [
        *state_clauses(written=False),
        *grid_clauses(),
        *rule_clauses(),
        ("no histogram", "counts", {"counts": torch.zeros(3, 2, 0, 0, dtype=I64)}),
        ("16 bits", "grid", {"grid": "[-32768,32767] symmetric"}),
        ("neither symmetric nor affine", "grid", {"grid": "[-128,127]"}),
    ],
    "solve_many": [
        ("fewer rules", "rules|extrema", {"rules": ["min_max"]}),
        ("fewer extrema", "extrema", {"extrema": []}),
        ("fewer tallies", "tally", {"tally": []}),
        ("fewer counts", "counts", {"counts": []}),
        ("fewer grids", "grids", {"grids": ["[0,255] affine"]}),
        ("too many options", "options", {"options": [99.0, 1.0, 2.0]}),
        ("too few options", "options", {"options": []}),
        ("bad option", "percentile", {"options": [101.0]}),
        ("unknown rule", "known: min_max", many(rules="histogram")),
        ("unknown scale rule", "scale_rule", many(grids="[0,255] symmetric scale_rule=max")),
        ("no grid", "grid", many(grids="")),
        ("neither symmetric nor affine", "grid", many(grids="[0,255]")),
        ("bad extrema", "extrema", many(extrema=torch.zeros(1, 3))),
        ("bad tally", "tally", many(tally=torch.zeros(1, 5))),
        ("bad counts", "counts", many(counts=torch.zeros(1, 2, 3, 4, dtype=I64))),
        ("bad grid", "quant_min|quant_max", many(grids="[10,3] symmetric")),
    ],
    "qparams": [
        ("range dtype", "range", {"range": torch.zeros(3, 2, dtype=F64)}),
        ("range rank", "range", {"range": torch.zeros(2)}),
        ("range columns", "range", {"range": torch.zeros(2, 3)}),
        ("range upside down", "range", {"range": torch.tensor([[0.0, 1.0], [1.0, 0.5]])}),
        ("range strided", "range", {"range": torch.zeros(2, 3).t()}),
        ("range NaN", "range", {"range": torch.tensor([[NAN, 1.0]])}),
        ("range infinite", "range", {"range": torch.tensor([[0.0, INF]])}),
        ("neither symmetric nor affine", "grid", {"grid": "[-128,127]"}),
        *grid_clauses(),
        *tensor_scale_clauses(),
    ],
    "lsq": lsq_clauses(),
    "pact": pact_clauses(),
    "learned_fake_quant": learned_clauses(),
    "_learned_fake_quant_backward": [*learned_clauses(), *upstream_clauses()],
    "_learned_fake_quant_tangent": [*learned_clauses(), *tangent_clauses()],
    "follow_": follow_clauses(),
    "follow_fake_quant": [*follow_clauses(), *MASK_CLAUSES],
    "_follow_fake_quant_forward": [*follow_clauses(), *MASK_CLAUSES],
    "gptq": gptq_clauses(),
    "kl_threshold": [
        ("counts dtype", "counts", {"counts": torch.ones(2, 256)}),
        ("counts rank", "counts", {"counts": torch.ones(256, dtype=I64)}),
        ("negative count", "counts", {"counts": torch.full((2, 256), -1)}),
        ("no bins", "counts", {"counts": torch.ones(2, 0, dtype=I64)}),
        ("fewer bins than levels", "counts|levels", {"levels": 512}),
        ("no levels", "levels", {"levels": 0}),
        ("levels negative", "levels", {"levels": -128}),
        ("levels huge", "levels|counts", {"levels": 2**62}),
        ("width dtype", "bin_width", {"bin_width": torch.ones(2)}),
        ("width numel", "bin_width", {"bin_width": torch.ones(3, dtype=F64)}),
        ("width zero", "bin_width", {"bin_width": torch.zeros(2, dtype=F64)}),
        ("width NaN", "bin_width", {"bin_width": torch.full((2,), NAN, dtype=F64)}),
        ("width infinite", "bin_width", {"bin_width": torch.full((2,), INF, dtype=F64)}),
        ("unknown variant", "known: slides", {"variant": "entropy"}),
    ],
}
OPTION_CLAUSES: dict[str, list[Clause]] = {
    "percentile": [
        ("0", "percentile", {"percentile": 0.0}),
        ("NaN", "percentile", {"percentile": NAN}),
    ],
    "clip": [("upside down", "xmin|xmax", {"xmin": 2.0, "xmax": 1.0})],
    "clip_std": [("negative", "std_scale", {"std_scale": -3.0})],
    "fixed_scale": [
        ("scale 0", "scale", {"scale": 0.0}),
        ("off", "zero_point", {"zero_point": 1e9}),
    ],
    "kl": [("unknown variant", "known: log_linear", {"variant": "entropy"})],
}
for _rule in torch_ext.observers():
    CLAUSES[_rule] = [*data_clauses(3), *grid_clauses(), *OPTION_CLAUSES.get(_rule, [])]
