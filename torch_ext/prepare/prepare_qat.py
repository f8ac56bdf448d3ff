"""Prepares a float model: attaches quantizers to its weights, outputs and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from torch_ext.prepare.attach import attached
from torch_ext.prepare.attachments import Attachments
from torch_ext.prepare.batch_norms.fuse import warn_of_left
from torch_ext.prepare.blocks.refusal import refuse_groups
from torch_ext.prepare.describe import describe
from torch_ext.prepare.module_classes import copied
from torch_ext.prepare.qconfig import Factory, Mapped, QConfig, QConfigMapping
from torch_ext.quantizers.find import check_model
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.text import label_of

_WHO = "prepare_qat"
M = TypeVar("M", bound=nn.Module)


class _FromModel:
    """The type of the default of ``input_qconfig``: the model's own QConfig."""


_FROM_MODEL = _FromModel()


def prepare_qat(
    model: M,
    inplace: bool = False,
    *,
    mapping: Mapping[Mapped, QConfig | None] | None = None,
    input_qconfig: QConfig | _FromModel | None = _FROM_MODEL,
    output_qconfig: QConfig | None = None,
    verbose: bool = False,
    example_inputs: Any = None,
    fold_batch_norms: bool = False,
) -> M:
    """Attaches quantizers to a float model. They start in FLOAT, so its outputs do not change yet.

    With ``example_inputs``, quantizers go to the values that INT8 engines quantize: what layers,
    products, sums and concatenations read, be they modules or functions such as ``x + y``; the
    table is in ``prepare/insertion/operations.py``. A copy of the model runs on the example, once
    in eval and once in train mode, to find them. The model's own forward keeps running. A value has
    one quantizer, however many operations read it; the first that reads it quantized decides its
    QConfig. A function has the QConfig of the module whose forward calls it. A later call in which
    a function that has quantizers does not come by, or a layer is called at another place, raises
    RuntimeError with the line.

    Without it, quantizers go to what modules read: convolutions, transposed convolutions and linear
    layers their input, attention its query, key and value and the input of its ``out_proj``, the
    modules of ``torch_ext.modules`` their operands. Functions are not looked at. Each reader has
    quantizers of its own, so a tensor that two layers read has two.

    In both ways the weights of layers, attention, embeddings and recurrent modules are quantized,
    and nothing is between a convolution, its norm and its activation. The exception: if the QConfig
    is for an engine that computes a layer in integers only with a quantized result (onnxruntime,
    XNNPACK), results that something else reads in float have a quantizer. Without an example a
    symbolic trace tells what reads them, where the forward can be traced.

    Quantizers are named ``<module>.parametrizations.<weight>.0``. With ``example_inputs``, those of
    values are ``<module>.activation_quantizer`` for the result of a module,
    ``<module>.add_quantizer`` for that of a function, ``<module>.<parameter>_quantizer`` for a
    parameter, ``<module>.cat_quantizer`` for operands that share a scale and
    ``input_quantizers.<argument>`` for an argument of the model (within the first layer, if the
    model is a Sequential). The second ``add`` in a forward is ``add_quantizer_1``, whether or not
    the first is quantized. Without, they are ``<module>.input_quantizers.<argument>``.

    A module's QConfig is the first of: its attribute ``qconfig``; its name in ``mapping`` (exact
    names before patterns); its type in ``mapping``; its parent's. None leaves it float. The model
    itself has the name ``""``. If the mapping has the exact name or the type of a module that is
    neither listed above nor an activation (a norm; without an example also a custom layer), its
    output is quantized too, as that of a ``QuantStub`` always is:
    ``<module>.activation_quantizer``.

    Args:
        model: a float model, not wrapped.
        inplace: change ``model``; by default, a copy is changed and returned.
        mapping: QConfig or None by module name, pattern (``"layer1.*"``) or module type.
        input_qconfig: the QConfig of the model's inputs, whose ``activation`` is used. With
            ``example_inputs``, by default that of their readers; None leaves them float. Without,
            the model's arguments get quantizers only if a QConfig is given, beside those of the
            layers that read them.
        output_qconfig: the QConfig of the floating tensors that the model returns, in whatever
            structure, whose ``activation`` is used; tensors without dimensions, such as losses,
            stay float. They are ``output_quantizers.<key or index>`` (within the last layer, if the
            model is a Sequential). None leaves them float. Without ``example_inputs`` the model has
            to return one such tensor; otherwise its call raises RuntimeError.
        verbose: print :func:`describe` of the result.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a list
            of such tuples or mappings, for a forward that goes several ways.
        fold_batch_norms: with ``example_inputs``, quantize the weight of a layer that a batch norm
            follows as if the norm were folded into it. Both stay and train; the quantizer is
            ``parametrizations.weight.1``. The pairs are those of :func:`fuse`, which folds for
            good; a warning names the batch norms that are in none. By default the unfolded weight
            is quantized. Per output channel this equals folding, up to the factor in the scale.

    Returns:
        The prepared model.

    Raises:
        TypeError: ``model`` is no module, or holds what cannot be copied; or an argument or a
            QConfig has a wrong type.
        ValueError: the model is prepared already, wrapped, has no QConfig or nothing to quantize; a
            name in ``mapping`` matches no module; a weight cannot be parametrized; ``group_size``
            does not divide weights or what is read, which the message names; or the model does not
            run on the example, in which case the message has the line.

    If it raises, the model is unchanged.
    """
    for name, flag in (("verbose", verbose), ("fold_batch_norms", fold_batch_norms)):
        parse_flag(_WHO, name, flag)
    if isinstance(inplace, Mapping):
        raise TypeError(
            f"{_WHO}: expected inplace to be True or False, got {bounded(inplace)}; "
            "pass mapping=... by name"
        )
    parse_flag(_WHO, "inplace", inplace)
    if check_model(_WHO, model) is not model:
        raise ValueError(
            f"{_WHO}: expected a plain model, got a {type(model).__name__}; prepare before wrapping"
        )
    _check_float(model)
    configs = QConfigMapping(_WHO, model, mapping, by_forward=example_inputs is not None)
    prepared = model if inplace else copied(_WHO, model)
    plan = Attachments(prepared, configs)
    outputs = _activation_of("output_qconfig", output_qconfig)
    by_default = isinstance(input_qconfig, _FromModel)
    inputs = None if by_default else _activation_of("input_qconfig", input_qconfig)
    if example_inputs is not None:
        plan.add_inserted(by_default or inputs, outputs, example_inputs, fold_batch_norms)
    elif fold_batch_norms:
        raise ValueError(
            f"{_WHO}: expected example_inputs with fold_batch_norms=True, got None; pass a batch, "
            "or fold the norms for good with fuse"
        )
    else:
        plan.add_modules(inputs, outputs)
    if not plan.built:
        raise ValueError(
            f"{_WHO}: expected model to have modules to quantize, found none with a QConfig that "
            "has a factory; functions are found with example_inputs"
        )
    refuse_groups(_WHO, prepared, plan.dynamic, plan.weight_axes)
    warn_of_left(_WHO, plan.norms.left, has_example=True)
    plan.carry_out()
    if verbose:
        print(describe(prepared))
    return prepared


def _check_float(model: nn.Module) -> None:
    """Raises for a model that is prepared already, and for a ScriptModule in it."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{_WHO}: expected a Python model, got a ScriptModule at {label_of(name)}; prepare "
                "the model from which it was scripted"
            )
        if quantizer := attached(module):
            where = f"{name}.{quantizer}".strip(".")
            raise ValueError(
                f'{_WHO}: expected a float model, got one that is prepared already ("{where}"); '
                "remove_quantizers(model) makes it float"
            )


def _activation_of(argument: str, given: object) -> Factory | None:
    """The factory for activations in an argument; raises TypeError if that is no QConfig."""
    if given is not None and not isinstance(given, QConfig):
        raise TypeError(
            f"{_WHO}: expected {argument} to be a QConfig or None, got {bounded(given)}"
        )
    return None if given is None else given.activation
