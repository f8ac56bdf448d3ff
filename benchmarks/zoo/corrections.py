"""What `equalize`, `correct_bias` and `reconstruct` make of a model with weights of 4 bits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_ext
from zoo import compare
from zoo.table import shortened

# Scaling by powers of two would be exact; other factors round each weight once more.
_SAME = 60.0  # dB


def corrections(
    plain: nn.Module, example: Any, batch: Any, run: Callable[[nn.Module, Any], Any]
) -> dict[str, Any]:
    """The part of a record: for each correction, ``"ok"`` or what is wrong, and its figures.

    ``equalize`` has to leave the float outputs, the others have to bring the outputs on the batch
    that they read closer to the float model's: SQNR before and after, in dB.
    """
    found: dict[str, Any] = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        want = run(copy.deepcopy(plain), batch)
        found |= _equalized(copy.deepcopy(plain), example, batch, run, want)
        model = _four_bits(copy.deepcopy(plain), example, batch, run)
        before = compare.sqnr(want, run(model, batch))
        for name, correct in (
            ("correct_bias", torch_ext.correct_bias),
            ("reconstruct", torch_ext.reconstruct),
        ):
            one = copy.deepcopy(model)
            try:
                correct(one, [batch], forward=run, progress=False)  # type: ignore[operator]
            except Exception as error:
                found[name] = shortened(error, 300)
                continue
            after = compare.sqnr(want, run(one, batch))
            found[f"{name}_sqnr"] = [before, after]
            better = after is None or before is None or after >= before
            found[name] = "ok" if better else f"{before} to {after} dB"
    return found


def _equalized(
    model: nn.Module, example: Any, batch: Any, run: Callable[[nn.Module, Any], Any], want: Any
) -> dict[str, Any]:
    try:
        scaled = torch_ext.equalize(model, example, progress=False)
    except Exception as error:
        return {"equalize": shortened(error, 300)}
    same = compare.sqnr(want, run(model, batch))
    ok = same is None or same > _SAME
    return {"equalize": "ok" if ok else f"{same} dB", "equalized": len(scaled.rows)}


def _four_bits(
    model: nn.Module, example: Any, batch: Any, run: Callable[[nn.Module, Any], Any]
) -> nn.Module:
    model.qconfig = torch_ext.get_default_qconfig(  # type: ignore[assignment]
        activation_observer="mse", weight_observer="mse", weight_qkwargs={"dtype": "int4"}
    )
    model = torch_ext.prepare_qat(model, inplace=True, example_inputs=example)
    torch_ext.calibrate(model, [batch], forward=run, progress=False)
    return model
