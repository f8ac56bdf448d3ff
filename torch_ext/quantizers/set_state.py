"""Setting and reading the state of a model's quantizers."""

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
    """Sets the state of the model's quantizers, whatever ``train()`` and ``eval()`` say.

    Leaving CALIBRATION solves every observer, activations from their statistics in one call and
    weights from the weights, and raises when a quantizer saw no data. VALIDATION raises when a
    quantizer has no range. A change that raises changes nothing.

    Statistics go on from where they are when CALIBRATION is entered again;
    :func:`reset_statistics` forgets them.

    Args:
        state: a :class:`FakeQuantState` or its value, such as ``"qat"``.
        pattern: names of quantizers, with ``*`` and ``?``, or a list of such; None is all.
        allow_unobserved: let quantizers without data be: they pass through in VALIDATION, and in
            QAT their first batch sets the range.

    Raises:
        TypeError: ``model`` is no module, ``allow_unobserved`` no bool.
        ValueError: an unknown state, a pattern that matches no quantizer, no quantizers at all,
            learned parameters that are not finite.
        RuntimeError: quantizers without data or range, by name.
    """
    change_states(_WHO, model, state, pattern, allow_unobserved)


def change_states(
    who: str,
    model: nn.Module,
    state: FakeQuantState | StateName,
    pattern: Pattern | None = None,
    allow_unobserved: bool = False,
) -> None:
    """:func:`set_fake_quantize` on behalf of the function that errors are to name."""
    target = parse_state(who, state)
    parse_flag(who, "allow_unobserved", allow_unobserved)
    prepared = PreparedModel(who, model)
    for name, quantizer in prepared.quantizers.items():
        quantizer.label = name
    chosen = prepared.select(pattern)
    change_state(who, chosen, target, prepared.read_weight, allow_unobserved)


def fake_quantize_states(model: nn.Module) -> dict[str, FakeQuantState]:
    """The state of every quantizer, by name.

    Raises TypeError for what is no module, ValueError for a model without quantizers.
    """
    prepared = PreparedModel("fake_quantize_states", model)
    return {name: quantizer.state for name, quantizer in prepared.quantizers.items()}


def reset_statistics(model: nn.Module, pattern: Pattern | None = None) -> None:
    """Forgets what the observers saw; ranges stay.

    Args:
        pattern: of the quantizers, as in :func:`set_fake_quantize`.

    Raises TypeError for what is no module; ValueError for a model without quantizers, or a pattern
    that matches none.
    """
    for quantizer in PreparedModel("reset_statistics", model).select(pattern).values():
        quantizer.observer.reset_()
