"""Sets and reads the states of a model's quantizers."""

from __future__ import annotations

from torch import nn

from torch_ext.quantizers.find import Pattern, PreparedModel
from torch_ext.quantizers.state_table import FakeQuantState, StateName, parse_state
from torch_ext.quantizers.transition import change_state
from torch_ext.utils.arguments import parse_flag

_WHO = "set_fake_quantize"


def set_fake_quantize(
    model: nn.Module,
    state: FakeQuantState | StateName,
    pattern: Pattern | None = None,
    allow_unobserved: bool = False,
) -> None:
    """Sets the state of the model's quantizers; ``train()`` and ``eval()`` do not change it.

    Quantizers that leave CALIBRATION are solved: activations from their statistics, weights from
    the weights themselves. For VALIDATION every weight is solved, from the weight that is there
    now, except where the range is learned (lsq, pact), given (``fixed_scale``) or frozen
    (``averaging_constant=0``). If a weight changes later, in VALIDATION, call this again; exports
    and :func:`save_observer_params` solve weights again themselves. If the call raises, no
    quantizer has changed.

    In CALIBRATION several threads may run the model at the same time; the statistic is bit for bit
    that of a single thread. In QAT the range then depends on the order of their batches.

    Entering CALIBRATION again adds to the statistics; :func:`reset_statistics` empties them.

    Args:
        model: a prepared model, wrapped or not.
        state: a :class:`FakeQuantState` or its value, such as ``"qat"``.
        pattern: names of quantizers, which may contain ``*`` and ``?``, or a list of them; None
            sets all quantizers.
        allow_unobserved: do not raise for quantizers without data or range. In VALIDATION they pass
            values through; in QAT their first batch sets the range.

    Raises:
        TypeError: ``model`` is no module, ``allow_unobserved`` no bool or ``pattern`` no text.
        ValueError: an unknown state, a pattern that matches no quantizer, a model without
            quantizers, or learned parameters that are not finite.
        RuntimeError: quantizers that leave CALIBRATION saw no data, or in VALIDATION have no range;
            the message names them.

    Warns:
        QuantizationWarning: non-finite values, values with which masks are filled, channels that
            are all zero, negative values that clip to 0, or optional quantizers that saw no
            floating tensor, such as those of an input that was left out; the message names the
            quantizers.
    """
    change_states(_WHO, model, state, pattern, allow_unobserved)


def change_states(
    who: str,
    model: nn.Module,
    state: FakeQuantState | StateName,
    pattern: Pattern | None = None,
    allow_unobserved: bool = False,
) -> None:
    """:func:`set_fake_quantize` with errors that name the function ``who``."""
    target = parse_state(who, state)
    parse_flag(who, "allow_unobserved", allow_unobserved)
    prepared = PreparedModel(who, model)
    for name, quantizer in prepared.quantizers.items():
        quantizer.label = name
    chosen = prepared.select(pattern)
    change_state(who, chosen, target, prepared.read_weight, allow_unobserved)


def fake_quantize_states(model: nn.Module) -> dict[str, FakeQuantState]:
    """The state of every quantizer, by name.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no quantizers.
    """
    prepared = PreparedModel("fake_quantize_states", model)
    return {name: quantizer.state for name, quantizer in prepared.quantizers.items()}


def reset_statistics(model: nn.Module, pattern: Pattern | None = None) -> None:
    """Empties the observers' statistics; ranges stay.

    Args:
        model: a prepared model, wrapped or not.
        pattern: names of quantizers, as in :func:`set_fake_quantize`.

    Raises:
        TypeError: ``model`` is no module, or ``pattern`` no text.
        ValueError: the model has no quantizers, or the pattern matches none.
    """
    for quantizer in PreparedModel("reset_statistics", model).select(pattern).values():
        quantizer.observer.reset_()
