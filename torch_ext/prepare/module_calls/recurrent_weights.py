"""Lets LSTM, GRU and RNN modules read their weights through parametrizations.

These modules pass a list of their weights, ``_flat_weights``, to torch's function, and keep that
list from one forward to the next. Of parametrized weights it would hold the results: they would
keep an autograd graph alive, could not be copied, and each forward would compute every weight four
times to find out whether one has changed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def read_weights_anew(module: nn.RNNBase) -> None:
    """Makes a parametrized module read each weight once in each forward, and keep none.

    Changes the class that ``parametrize`` derived for this module alone. If that class is removed,
    the module's next forward lists its weights again.
    """
    kind: Any = type(module)
    kind._flat_weights = property(_weights, _forget)
    kind._init_flat_weights = forget_weights
    kind._update_flat_weights = _nothing
    kind.check_input = _check_input
    kind.flatten_parameters = _nothing  # it would move what parametrizations computed
    forget_weights(module)


class _Expected:
    """What torch's ``check_input`` reads of a module."""

    def __init__(self, weight: Tensor, input_size: int) -> None:
        self._flat_weights = [weight]
        self.input_size = input_size


def _check_input(module: nn.RNNBase, x: Tensor, batch_sizes: Tensor | None) -> None:
    # It looks at the first weight's dtype, for which the weight need not be computed.
    name = module._flat_weights_names[0]
    weight = module._parameters.get(name)
    if weight is None:
        chain: Any = module.get_submodule(f"parametrizations.{name}")
        weight = chain.original
    expected: Any = _Expected(weight, module.input_size)
    nn.RNNBase.check_input(expected, x, batch_sizes)


def _weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _forget(module: nn.RNNBase, weights: object) -> None:
    """Called where the module's own methods set its list of weights."""


def forget_weights(module: nn.RNNBase) -> None:
    """Empties the list of weights, which the module's own ``__getstate__`` may have filled."""
    module.__dict__["_flat_weights"] = []
    # In the place of weak references to the weights, which could not be pickled.
    module.__dict__["_flat_weight_refs"] = [_gone] * len(module._flat_weights_names)


def _gone() -> None:
    """A weak reference to a tensor that is gone."""


def _nothing(module: nn.RNNBase) -> None:
    """Replaces methods that keep the list of weights up to date."""
