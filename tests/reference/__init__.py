"""A slow, obvious second implementation of every number the library produces, in plain numpy.

Nothing here is imported from the library, so a test that compares the two compares two readings of
the documentation. Speed does not matter here; being easy to check by eye does.
"""

from reference.fake_quant import bits_of_mask, fake_quant, gradient_mask
from reference.grid import Grid, QParams, qparams
from reference.rules import RULES, Bounds
from reference.search import (
    candidates,
    kl_objective,
    least_threshold,
    mse_objective,
    squared_error,
    threshold_range,
)
from reference.statistic import Statistic, observe
from reference.view import View

__all__ = [
    "RULES",
    "Bounds",
    "Grid",
    "QParams",
    "Statistic",
    "View",
    "bits_of_mask",
    "candidates",
    "fake_quant",
    "gradient_mask",
    "kl_objective",
    "least_threshold",
    "mse_objective",
    "observe",
    "qparams",
    "squared_error",
    "threshold_range",
]
