"""Names of the registry, for type checkers.

tools/typing_stubs.py writes this file from the registry.
"""

from typing import Literal

Rule = Literal[
    "min_max",
    "fixed_scale",
    "clip",
    "percentile",
    "clip_std",
    "kl",
    "mse",
    "mix",
    "aciq",
    "mean_abs",
]
Method = Literal["fake_quant", "lsq", "pact"]
LearnedMethod = Literal["lsq", "pact"]
KlVariant = Literal["log_linear", "slides", "modelopt", "ncnn", "horizon"]
