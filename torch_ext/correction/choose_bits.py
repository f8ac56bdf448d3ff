"""Chooses how many bits each quantizer gets, within a budget of size or of operations."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from torch_ext.calibration.change_bits import bits_of, check_bits, parse_bits, width_of
from torch_ext.calibration.change_grid import on_backend_grid
from torch_ext.calibration.restore import one_call_at_a_time, restored
from torch_ext.calibration.switched_model import Metric, SwitchedModel, name_of
from torch_ext.correction.widths.bit_choice import BUDGETS, BitChoice, BitChoiceRow, Bits, Budget
from torch_ext.correction.widths.bit_search import BitSearch
from torch_ext.correction.widths.bit_units import BitPlan, BitUnit
from torch_ext.correction.widths.products import count_products
from torch_ext.files.measurements import Results, fingerprint
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import Pattern, PreparedModel, role_of
from torch_ext.quantizers.grid import dtype_bits, parse_dtype
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import bounded, check_callable, parse_flag
from torch_ext.utils.backends import BACKENDS, Backend, backend_grids
from torch_ext.utils.batches import (
    Forward,
    check_batches,
    default_forward,
    model_device,
    sample_count,
)
from torch_ext.utils.modes import eval_mode
from torch_ext.utils.progress import progress_bar
from torch_ext.utils.text import joined, shown

_WHO = "choose_bits"
_FLOAT: Literal["float"] = "float"
_BITS: tuple[Bits, ...] = (4, 8, 16)
_REFERENCE = 8  # bits of the cost that a budget is a share of


def choose_bits(
    model: nn.Module,
    data: Any,
    budget: float,
    metric: Metric | None = None,
    *,
    of: Budget = "size",
    absolute: bool = False,
    bits: Bits | Sequence[Bits] | None = None,
    backend: Backend | None = None,
    pairs: bool | None = None,
    pattern: Pattern | None = None,
    higher_is_better: bool = True,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    checkpoint: PathLike | None = None,
) -> BitChoice:
    """Chooses the number of bits of each quantizer, so that little is lost within a budget.

    Each quantizer is measured alone at each width, as by ``sensitivity(bits=...)``: its range is
    solved without data from what it has seen, by its own rule, or by ``min_max`` where that does
    not take so many bits. The losses of quantizers about add up. From the most bits down, the step
    that costs the least loss for what it saves is taken until the budget is met; then widths are
    exchanged, one or two at a time, as long as the sum of losses falls. The model stays as it was;
    :meth:`BitChoice.apply` gives it the widths chosen::

        chosen = choose_bits(model, batches, 0.75)   # 6 bits a weight on average
        print(chosen)
        chosen.apply(model)

    With n quantizers (or pairs) and k widths, the data is run over n k + 3 times. The widths of
    quantizers change no float values, weights or biases.

    Args:
        model: calibrated.
        data, metric, higher_is_better: as in :func:`sensitivity`. For operations and pairs, the
            first batch of ``data`` is also run to see what is multiplied by what.
        budget: a share of what the model costs if each quantizer chosen for has 8 bits.
        of: what the budget is of: ``"size"``, the bytes of the quantized weights (activations then
            keep their widths); or ``"operations"``, the bit operations of one sample:
            multiplications times the bits of both factors, 32 for one that is float.
        absolute: whether ``budget`` is in bytes, or in bit operations, instead.
        bits: the widths on offer, 2 to 16, and ``"float"``, for a quantizer that is off; by
            default, 4, 8 and 16.
        backend: offer only what this engine computes with in integers: 8 bits on its grids, and
            ``"float"``; by default, any.
        pairs: whether quantizers whose values are multiplied with each other, such as a layer's
            input and weight, have the same width; by default, with a backend, which needs both for
            a layer in integers.
        pattern: the quantizers to choose for, as in :func:`set_fake_quantize`; by default, all that
            the budget is about. The others keep their widths, and count.
        forward, device: as in :func:`calibrate`.
        progress: whether to show a progress bar; by default, if standard error is a terminal.
        checkpoint: a file that keeps the numbers measured so far, as in :func:`sweep`.

    Returns:
        A width for each quantizer, and the curve of cost against loss.

    Raises:
        TypeError: an argument of another type than expected, the metric returns no number, or data
            cannot be run over again.
        ValueError: a budget that the fewest bits on offer do not meet; an unknown width, budget,
            backend or pattern; widths that the backend does not take, and by name quantizers that
            are not on its grids; by name, quantizers that cannot change their bits, as in
            :func:`sensitivity`; float outputs that are not finite or all zero; no data; a
            checkpoint of another run.
        RuntimeError: a quantizer has no range, or another call with this model still runs.
    """
    prepared = PreparedModel(_WHO, model)
    if of not in BUDGETS:
        raise ValueError(f"{_WHO}: unknown budget of {of!r}; known: {', '.join(BUDGETS)}")
    offered = _parse_offer(bits, backend)
    paired = parse_flag(_WHO, "pairs", backend is not None if pairs is None else pairs)
    for flag, value in (("absolute", absolute), ("higher_is_better", higher_is_better)):
        parse_flag(_WHO, flag, value)
    _check_budget(budget)
    for name, function in (("metric", metric), ("forward", forward)):
        check_callable(_WHO, name, function)
    if metric is None or paired or of == "operations":
        check_batches(_WHO, "data", data)
    where = model_device(_WHO, model, device)
    run_batch = forward or default_forward(_WHO)
    chosen = prepared.select(pattern)
    sign = 1.0 if metric is None or not higher_is_better else -1.0
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_call_at_a_time(_WHO, prepared.root))
        stack.enter_context(restored(prepared.quantizers))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        results = Results(_WHO, checkpoint, fingerprint(prepared))
        change_states(_WHO, model, FakeQuantState.VALIDATION)
        products, samples = [], 1
        if paired or of == "operations":
            batch = _first(data)
            samples = sample_count(batch)
            products = count_products(model, prepared.quantizers, batch, run_batch, where)
        active = {name: q for name, q in chosen.items() if not q.passes_through}
        plan = BitPlan(prepared, active, of, offered, products, samples, paired)
        _check_units(prepared, plan.units, of, offered, backend)
        eight, least = plan.at(_REFERENCE), plan.least()
        limit = float(budget) if absolute else budget * eight
        if limit < least:
            raise ValueError(
                f"{_WHO}: expected budget to be at least {least if absolute else least / eight:g}, "
                f"which is the cost of the fewest bits on offer, got {budget:g}"
            )
        switched = SwitchedModel(prepared, model, data, metric, run_batch, where, results)
        before = switched.measure("the quantized model", switched.active)
        losses = _measure(switched, plan.units, sign, progress)
        found = BitSearch(plan.costs, [unit.widths for unit in plan.units], losses).within(limit)
        given = {
            name: unit.offered[option]
            for unit, option in zip(plan.units, found.options, strict=True)
            for name in unit.names
        }
        after = switched.measure(
            f"with the widths {json.dumps(list(given.values()))}",
            [name for name in switched.active if given.get(name) != "float"],
            {name: width for name, width in given.items() if width != "float"},
        )
    results.finish()
    rows = [
        _row(plan, prepared.quantizers[name], name, unit, of_unit, given)
        for unit, of_unit in zip(plan.units, losses, strict=True)
        for name in unit.names
    ]
    return BitChoice(
        rows=tuple(rows),
        of=of,
        budget=limit,
        cost=plan.of_options(found.options),
        eight=eight,
        predicted=math.fsum(row[option] for row, option in zip(losses, found.options, strict=True)),
        floating=switched.floating,
        as_it_was=before,
        chosen=after,
        metric="relative squared error of the outputs" if metric is None else name_of(metric),
        curve=tuple(found.curve),
    )


def _parse_offer(bits: Bits | Sequence[Bits] | None, backend: Backend | None) -> tuple[Bits, ...]:
    """The widths on offer in ascending order, ``"float"`` last; checked against the backend's."""
    taken: tuple[Bits, ...] = ()
    if backend is not None:
        grids = backend_grids(_WHO, backend)
        taken = (*sorted({dtype_bits(parse_dtype(_WHO, g.dtype)[0]) for g in grids}), _FLOAT)
    if bits is None:
        return taken or _BITS
    given = [bits] if isinstance(bits, (int, str)) else bits
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise TypeError(f'{_WHO}: expected bits to be integers or "float", got {bounded(bits)}')
    given = list(given)
    numbers = [width for width in given if width != _FLOAT]
    offered: tuple[Bits, ...] = parse_bits(_WHO, numbers) if numbers or not given else ()
    if len(numbers) < len(given):
        offered = (*offered, _FLOAT)
    if unknown := [width for width in offered if taken and width not in taken]:
        raise ValueError(
            f'{_WHO}: expected bits to be of {joined(map(str, taken))} with backend="{backend}", '
            f"which computes with no others in integers, got {joined(map(str, unknown))}"
        )
    return offered


def _check_budget(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{_WHO}: expected budget to be a number, got {bounded(budget)}")
    if not 0 < budget < math.inf:
        raise ValueError(f"{_WHO}: expected budget to be finite and above 0, got {budget}")


def _first(data: Any) -> Any:
    """The first batch of data that can be run over again."""
    if isinstance(data, Iterator):
        raise TypeError(
            f"{_WHO}: expected data to be batches that can be run over again, such as a list, got "
            f"{type(data).__name__}"
        )
    for batch in data:
        return batch
    raise ValueError(f"{_WHO}: expected data to give batches, got none")


def _check_units(
    prepared: PreparedModel,
    units: Sequence[BitUnit],
    of: Budget,
    offered: Sequence[Bits],
    backend: Backend | None,
) -> None:
    """Raises ValueError if there are none, or some that cannot have the widths on offer."""
    if not units:
        want = "weights" if of == "size" else "quantizers whose values are multiplied"
        raise ValueError(f"{_WHO}: expected pattern to choose {want}, got none")
    chosen = {name: prepared.quantizers[name] for unit in units for name in unit.names}
    if backend is not None:
        short = BACKENDS[backend].short_sums
        grids = [backend_grids(_WHO, backend, reduce) for reduce in ((False, True)[: 1 + short])]
        others = [
            name
            for name, quantizer in chosen.items()
            if not any(on_backend_grid(_WHO, quantizer, pair) for pair in grids)
        ]
        if others:
            raise ValueError(
                f'{_WHO}: expected every quantizer to be on a grid of "{backend}", got others for '
                f'{shown(others)}; resolve(model, backend="{backend}") changes them'
            )
    check_bits(_WHO, chosen, [width for width in offered if width != _FLOAT])


def _measure(
    switched: SwitchedModel, units: Sequence[BitUnit], sign: float, progress: bool | None
) -> list[list[float]]:
    """The loss of each unit, alone in the float model, at each width on offer."""
    steps = [(unit, width) for unit in units for width in unit.offered if width != _FLOAT]
    measured = {
        (unit.names, width): switched.measure(
            f"{width} bits {' '.join(unit.names)}", unit.names, dict.fromkeys(unit.names, width)
        )
        for unit, width in progress_bar(steps, len(steps), _WHO, progress)
    }
    return [
        [
            0.0 if width == _FLOAT else sign * (measured[unit.names, width] - switched.floating)
            for width in unit.offered
        ]
        for unit in units
    ]


def _row(
    plan: BitPlan,
    quantizer: FakeQuantize,
    name: str,
    unit: BitUnit,
    losses: Sequence[float],
    given: Mapping[str, Bits],
) -> BitChoiceRow:
    by_width = dict(zip(unit.offered, losses, strict=True))
    bits = given[name]
    width = width_of(quantizer, bits_of(quantizer) if bits == _FLOAT else bits)
    return BitChoiceRow(
        name=name,
        of=role_of(name, quantizer),
        bits=bits,
        loss=by_width[bits],
        losses=by_width,
        together=unit.names,
        size=plan.size(name, given),
        operations=plan.operations(name, given),
        rule=width.rule,
        options=width.options,
    )
