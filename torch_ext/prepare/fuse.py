"""Folds batch norms into the convolution or linear layer before them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from torch_ext.quantizers.find import check_model, named_quantizers
from torch_ext.utils.arguments import bounded, split_arguments
from torch_ext.utils.modes import eval_mode, forked_rng

_WHO = "fuse"
M = TypeVar("M", bound=nn.Module)
Pair = tuple[str, str]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


def fuse(
    model: M,
    pairs: Iterable[Sequence[str]] | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
) -> M:
    """Folds batch norms into the convolution or linear layer before them; run before prepare_qat.

    A folded batch norm is replaced by an ``Identity``, so names and indices stay. The result
    computes what the model computes in eval mode, up to rounding.

    Without ``pairs``, the pairs are found in a symbolic trace of the forward (``torch.fx``), or, if
    it cannot be traced, in one run of ``example_inputs``. With ``example_inputs``, a pair that was
    found is folded only if the outputs for them stay the same. A batch norm that follows a layer
    but cannot be folded safely is left as it is, with a warning.

    Args:
        model: a float model.
        pairs: names of a layer and its batch norm, such as ``[("conv1", "bn1")]``.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        inplace: change ``model``; by default, a copy is changed and returned.

    Returns:
        The model with folded batch norms.

    Raises:
        TypeError: ``model`` is no module, or a pair is not two names.
        ValueError: the model is prepared already; a given pair cannot be folded, names no module
            or a module of another pair; or the model cannot be traced and neither ``pairs`` nor
            ``example_inputs`` are given.

    Warns:
        UserWarning: batch norms were left as they are; with names and reasons.
    """
    check_model(_WHO, model)
    if quantizers := named_quantizers(model):
        raise ValueError(
            f"{_WHO}: expected a float model, got one that is prepared already "
            f'("{next(iter(quantizers))}"); fuse before prepare_qat'
        )
    chosen = _find_pairs(model, example_inputs) if pairs is None else _check_pairs(model, pairs)
    fused = model if inplace else copy.deepcopy(model)
    for layer_name, norm_name in chosen:
        _fold(fused, layer_name, norm_name)
    return fused


def _check_pairs(model: nn.Module, pairs: Iterable[Sequence[str]]) -> list[Pair]:
    """The given pairs; raises TypeError or ValueError if one of them cannot be folded."""
    modules = dict(model.named_modules())
    chosen: list[Pair] = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(n, str) for n in pair):
            raise TypeError(f"{_WHO}: expected pairs of two names, got {bounded(pair)}")
        for name in pair:
            if name not in modules:
                raise ValueError(f'{_WHO}: no module is named "{name}"')
        if problem := _problem(model, modules, pair[0], pair[1]):
            raise ValueError(f"{_WHO}: cannot fold {pair[1]} into {pair[0]}: {problem}")
        chosen.append((pair[0], pair[1]))
    for side in zip(*chosen, strict=True):
        if len(set(side)) != len(side):
            twice = next(name for name in side if side.count(name) > 1)
            raise ValueError(f"{_WHO}: {twice} is in two pairs")
    return chosen


def _problem(
    model: nn.Module, modules: Mapping[str, nn.Module], layer_name: str, norm_name: str
) -> str:
    """Why the modules of a pair cannot be folded, whatever the forward does; empty if they can."""
    layer, norm = modules[layer_name], modules[norm_name]
    if not isinstance(layer, _FOLDED):
        return f"{layer_name} is a {type(layer).__name__}"
    if not isinstance(norm, _BatchNorm):
        return f"{norm_name} is a {type(norm).__name__}"
    if norm.running_mean is None or norm.running_var is None:
        return f"{norm_name} has no running statistics"
    if isinstance(layer, _TRANSPOSED) and layer.groups > 1:
        return f"{layer_name} is transposed and has {layer.groups} groups"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != norm.num_features:
        return f"{layer_name} has {channels} outputs and {norm_name} {norm.num_features} features"
    tensors = {"weight": layer.weight, "bias": layer.bias}
    if any(value is not None and key not in layer._parameters for key, value in tensors.items()):
        return f"a parametrization writes the weight of {layer_name}"
    for name, other in model.named_modules():
        if other is not layer and any(
            p is q for p in other._parameters.values() if p is not None for q in tensors.values()
        ):
            return f"{name} shares parameters with {layer_name}"
    return ""


def _find_pairs(model: nn.Module, example_inputs: Any) -> list[Pair]:
    """The pairs of a model that can be folded; warns about batch norms that cannot."""
    modules = dict(model.named_modules())
    if not any(isinstance(module, _BatchNorm) for module in modules.values()):
        return []
    skipped: dict[str, str] = {}
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        if example_inputs is None:
            raise ValueError(
                f"{_WHO}: the model cannot be traced ({type(error).__name__}: {error}); "
                "pass pairs=[(layer, batch_norm), ...] or example_inputs"
            ) from error
        candidates = _pairs_by_hooks(model, example_inputs)
    else:
        candidates, skipped = _pairs_by_graph(graph, modules)
    chosen = []
    for pair in candidates:
        if problem := _problem(model, modules, *pair):
            skipped[pair[1]] = problem
        else:
            chosen.append(pair)
    if example_inputs is not None:
        chosen = _verified(model, chosen, example_inputs, skipped)
    if skipped:
        text = "; ".join(f"{name} ({why})" for name, why in skipped.items())
        warnings.warn(f"{_WHO}: batch norms left as they are: {text}", stacklevel=3)
    return chosen


def _pairs_by_graph(
    graph: fx.Graph, modules: Mapping[str, nn.Module]
) -> tuple[list[Pair], dict[str, str]]:
    """Pairs of a layer and the batch norm that alone reads its output, each called once.

    Returns also the reason for every other batch norm that follows a layer, by its name.
    """
    calls: dict[nn.Module, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
    pairs: list[Pair] = []
    skipped: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], _BatchNorm):
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer = modules[str(before.target)]
        if not isinstance(layer, _FOLDED):
            continue
        if calls[layer] > 1 or calls[modules[node.target]] > 1:
            skipped[node.target] = f"it or {before.target} is called more than once"
        elif len(before.users) > 1:
            skipped[node.target] = f"something else reads the output of {before.target}"
        else:
            pairs.append((str(before.target), node.target))
    return pairs, skipped


def foldable_norms(model: nn.Module, graph: fx.Graph) -> dict[str, _BatchNorm]:
    """The batch norms of a recorded run that can be folded, by the name of their layer."""
    modules = dict(model.named_modules())
    pairs, _ = _pairs_by_graph(graph, modules)
    norms = {}
    for layer, norm in pairs:
        if not _problem(model, modules, layer, norm):
            norms[layer] = model.get_submodule(norm)
    return norms  # type: ignore[return-value]


def _pairs_by_hooks(model: nn.Module, example_inputs: Any) -> list[Pair]:
    """Pairs where the batch norm's input is the layer's output tensor, each called once."""
    outputs: dict[int, str] = {}
    kept: list[Any] = []  # keeps the tensors alive, so that their ids stay unique
    pairs: list[Pair] = []
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, (*_FOLDED, _BatchNorm)):
            continue

        def record(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1
            kept.extend([*args, output])
            if isinstance(module, _BatchNorm):
                if args and id(args[0]) in outputs:
                    pairs.append((outputs[id(args[0])], name))
            else:
                outputs[id(output)] = name

        handles.append(module.register_forward_hook(record))
    try:
        _run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _verified(
    model: nn.Module, pairs: list[Pair], example_inputs: Any, skipped: dict[str, str]
) -> list[Pair]:
    """The pairs that can be folded without changing the outputs for the example.

    Adds the batch norms of the others to ``skipped``, with the reason.
    """
    want = _run(model, example_inputs)

    def keep_outputs(trial_pairs: list[Pair]) -> bool:
        trial = copy.deepcopy(model)
        for pair in trial_pairs:
            _fold(trial, *pair)
        return _close(_run(trial, example_inputs), want)

    if keep_outputs(pairs):
        return pairs
    verified: list[Pair] = []
    for pair in pairs:
        if keep_outputs([*verified, pair]):
            verified.append(pair)
        else:
            skipped[pair[1]] = f"folded into {pair[0]}, the model gives other outputs"
    return verified


def _run(model: nn.Module, example_inputs: Any) -> Any:
    args, kwargs = split_arguments(_WHO, example_inputs)
    with torch.no_grad(), eval_mode(model), forked_rng(model):
        return model(*args, **kwargs)


def _close(have: Any, want: Any) -> bool:
    """Whether outputs are equal up to rounding; compares tensors in tuples, lists and mappings."""
    if isinstance(want, Tensor):
        if not isinstance(have, Tensor) or have.shape != want.shape:
            return False
        if not want.is_floating_point():
            return torch.equal(have, want)
        # Folding rounds differently in each layer, by an amount that grows with the values' size.
        finite = want[want.isfinite()].abs()
        size = float(finite.max()) if finite.numel() else 0.0
        tolerance = 1e3 * torch.finfo(want.dtype).eps * max(size, torch.finfo(want.dtype).tiny)
        return torch.allclose(have, want, rtol=0.0, atol=tolerance, equal_nan=True)
    if isinstance(want, Mapping):
        return all(_close(have[key], value) for key, value in want.items())
    if isinstance(want, (tuple, list)):
        return all(map(_close, have, want))
    return True


@torch.no_grad()
def _fold(model: nn.Module, layer_name: str, norm_name: str) -> None:
    """Folds a batch norm into a layer, in place, and puts an Identity in its stead."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    assert isinstance(layer, _FOLDED)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance, eps = norm.running_mean, norm.running_var, norm.eps
    had_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        ones = torch.ones_like(mean)
        gain = ones if norm.weight is None else norm.weight
        offset = torch.zeros_like(mean) if norm.bias is None else norm.bias
        layer.weight, layer.bias = fuse_linear_bn_weights(
            layer.weight, layer.bias, mean, variance, eps, gain, offset
        )
    else:
        transposed = isinstance(layer, _TRANSPOSED)
        layer.weight, layer.bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, mean, variance, eps, norm.weight, norm.bias, transposed
        )
    if not had_bias:
        layer.bias.requires_grad_(layer.weight.requires_grad)  # it replaces the norm's
    identity = nn.Identity().train(norm.training)
    # The Identity takes over the batch norm's hooks and qconfig.
    kept = {key: value for key, value in vars(norm).items() if "hook" in key or key == "qconfig"}
    vars(identity).update(kept)
    parent = model.get_submodule(norm_name.rpartition(".")[0])
    setattr(parent, norm_name.rpartition(".")[2], identity)
