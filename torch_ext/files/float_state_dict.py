"""Reads and loads a prepared model's weights and buffers under the float model's keys.

A prepared model has the weight ``conv.weight`` under ``conv.parametrizations.weight.original``, and
quantizers, which a float checkpoint lacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import (
    PreparedModel,
    check_model,
    named_quantizers,
    parametrizations,
)
from torch_ext.quantizers.folded_weight import WeightStep


def float_keys(model: nn.Module) -> dict[str, str]:
    """The float model's keys, each with its key in this model's ``state_dict``; no quantizers."""
    model = check_model("float_keys", model)
    quantizer_prefixes = tuple(f"{name}." for name in named_quantizers(model))
    renamed = {}
    for owner, parameter, chain in parametrizations(model):
        if all(isinstance(step, (FakeQuantize, WeightStep)) for step in chain):
            prefix = f"{owner}." if owner else ""
            renamed[f"{prefix}parametrizations.{parameter}.original"] = f"{prefix}{parameter}"
    keys = [key for key in model.state_dict() if not key.startswith(quantizer_prefixes)]
    return {renamed.get(key, key): key for key in keys}


def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a prepared model, without quantizers, as a float state dict.

    Returns:
        Tensors under the keys that the float model's ``state_dict()`` has; they share memory with
        the model.

    Raises:
        TypeError: ``model`` is no module.
    """
    state = check_model("float_state_dict", model).state_dict()
    return {name: state[key] for name, key in float_keys(model).items()}


def load_float_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> None:
    """Loads a float model's ``state_dict`` into a prepared model; quantizers' states stay.

    Ranges stay too, except those of weights in VALIDATION, which are solved from the loaded weights
    as :func:`set_fake_quantize` does.

    Args:
        model: the prepared model.
        state_dict: tensors under the float model's keys.
        strict: raise for missing and unexpected keys. False ignores them.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a tensor of another shape, or with ``strict`` other keys. Nothing is loaded.
    """
    who = "load_float_state_dict"
    model = check_model(who, model)
    keys = float_keys(model)
    current = model.state_dict()
    missing = [name for name in keys if name not in state_dict]
    unexpected = [name for name in state_dict if name not in keys]
    if strict and (missing or unexpected):
        raise ValueError(
            f"{who}: expected the float model's keys; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}"
        )
    chosen = {keys[name]: value for name, value in state_dict.items() if name in keys}
    for key, value in chosen.items():
        want = list(current[key].shape)
        if not isinstance(value, Tensor) or list(value.shape) != want:
            have = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{who}: expected {key} to be of shape {want}, got {have}")
    with torch.no_grad():
        model.load_state_dict(chosen, strict=False)
    if named_quantizers(model):
        PreparedModel(who, model).refresh_validating_weights()
