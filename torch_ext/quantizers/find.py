"""Finds a model's quantizers and their weights, under names that wrappers do not change."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.folded_weight import WeightStep
from torch_ext.quantizers.solve import refresh_weights
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.quantizers.transition import INPUTS
from torch_ext.utils.arguments import bounded
from torch_ext.utils.modes import eval_mode
from torch_ext.utils.sharded import whole
from torch_ext.utils.text import shown

_COMPILED = "_orig_mod."
Pattern = str | Sequence[str]
M = TypeVar("M", bound=nn.Module)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_model(who: str, model: object, argument: str = "model") -> nn.Module:
    """The unwrapped model; raises TypeError, naming ``argument``, if it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected {argument} to be a torch.nn.Module, got {bounded(model)}")
    return unwrap(model)


def clean_name(name: str) -> str:
    """A module's name without the ``_orig_mod.`` that torch.compile adds for a submodule."""
    return f"{name}.".replace(_COMPILED, "")[:-1]


def named_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The model's quantizers by name, such as ``conv1.activation_quantizer``.

    DataParallel, DistributedDataParallel and torch.compile do not change the names. A quantizer
    that several modules share is listed once. If the model itself is a quantizer, its name is "".

    Returns:
        A new dict at each call; empty for a float model.

    Raises:
        TypeError: ``model`` is no module.
    """
    return {
        clean_name(name): module
        for name, module in check_model("named_quantizers", model).named_modules()
        if isinstance(module, FakeQuantize)
    }


class PreparedModel:
    """The unwrapped model (``root``), its ``quantizers`` by name and their weights.

    Made at the start of a call of the package, so that the model is searched only once.
    """

    def __init__(self, who: str, model: object, argument: str = "model") -> None:
        """Raises TypeError if ``model`` is no module, ValueError if it has no quantizers.

        Errors name the function ``who`` and its ``argument``.
        """
        self.who = who
        self.root = check_model(who, model, argument)
        self.quantizers = named_quantizers(self.root)
        if not self.quantizers:
            raise ValueError(
                f"{who}: expected {argument} to have quantizers, got none; call prepare_qat first"
            )

    @functools.cached_property
    def weights(self) -> dict[FakeQuantize, AnyWeightSource]:
        """Where each weight quantizer reads its weight."""
        found: dict[FakeQuantize, AnyWeightSource] = {
            module: WeightSource(owner, parameter, chain, i)
            for owner, parameter, chain in parametrizations(self.root)
            for i, module in enumerate(chain)
            if isinstance(module, FakeQuantize)
        }
        for name, module in self.root.named_modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, WeightHook):
                    source = HookedWeight(clean_name(name), hook.parameter, module, hook)
                    found[hook.quantizer(module)] = source
        return found

    def read_weight(self, quantizer: FakeQuantize) -> Tensor | None:
        """The present input of a weight quantizer; None if its weight is not known."""
        source = self.weights.get(quantizer)
        return None if source is None else source.read()

    def refresh_weights(self, chosen: Mapping[str, FakeQuantize] | None = None) -> dict[str, str]:
        """Solves the ranges of ``chosen`` (None: all) weights again; see :func:`refresh_weights`.

        Returns the names of those without a finite value, with the reason.
        """
        return refresh_weights(self.quantizers if chosen is None else chosen, self.read_weight)

    def refresh_validating_weights(self) -> dict[str, str]:
        """:meth:`refresh_weights` for the quantizers in VALIDATION, whose forward does not."""
        return self.refresh_weights(
            {
                name: quantizer
                for name, quantizer in self.quantizers.items()
                if quantizer.state is FakeQuantState.VALIDATION
            }
        )

    def select(self, pattern: Pattern | None) -> dict[str, FakeQuantize]:
        """The quantizers that match a pattern; see :func:`select`."""
        return select(self.who, self.quantizers, pattern)


def select(
    who: str, quantizers: Mapping[str, M], pattern: Pattern | None, kind: str = "quantizer"
) -> dict[str, M]:
    """The quantizers whose names match a pattern (``fnmatch``) or one of several; None: all.

    Or modules of another kind, as errors name it.

    Raises:
        TypeError: a pattern is not text.
        ValueError: a pattern matches no quantizer, or the list of patterns is empty.
    """
    matching = set(matching_names(who, list(quantizers), pattern, kind))
    return {name: quantizer for name, quantizer in quantizers.items() if name in matching}


def matching_names(who: str, known: list[str], pattern: Pattern | None, kind: str) -> list[str]:
    """Those of the known names that :func:`select` takes; errors name their ``kind``."""
    if pattern is None:
        return known
    if not isinstance(pattern, Iterable):
        raise TypeError(
            f"{who}: expected pattern to be text or a list of texts, got {bounded(pattern)}"
        )
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    for text in patterns:
        if not isinstance(text, str):
            raise TypeError(f"{who}: expected pattern to be text, got {bounded(text)}")
        if not any(fnmatch.fnmatchcase(name, text) for name in known):
            raise ValueError(f'{who}: no {kind} matches pattern "{text}"; known: {shown(known)}')
    if not patterns:
        plural = " or ".join(f"{word}s" for word in kind.split(" or "))
        raise ValueError(f"{who}: expected pattern to name {plural}, got an empty list")
    return [name for name in known if any(fnmatch.fnmatchcase(name, text) for text in patterns)]


class WeightSource(NamedTuple):
    """Where a weight quantizer's input comes from."""

    owner: str  # name of the module that has the weight
    parameter: str  # name of the weight in it
    chain: parametrize.ParametrizationList
    position: int  # of the quantizer in the chain

    @torch.no_grad()
    def read(self) -> Tensor:
        """The quantizer's input: the original weight after the parametrizations before it."""
        chain = self.chain
        if chain.is_tensor:
            values = [chain.original]
        else:
            values = [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
        # With FSDP2 each rank holds a shard (a DTensor); the forward uses the whole weight.
        values = [whole(value) for value in values]
        with eval_mode(chain):  # in train mode spectral_norm would update its buffers
            for i, earlier in enumerate(chain):
                if i == self.position:
                    break
                # Its forward does nothing while the quantizer does not quantize.
                step = earlier.applied if isinstance(earlier, WeightStep) else earlier
                values = [step(*values)]
        value: Tensor = values[0]
        return value.detach()


class WeightHook:
    """A forward pre-hook that quantizes a weight which pre-hooks before it compute.

    Those are of ``torch.nn.utils``: ``weight_norm``, ``spectral_norm`` and ``prune``. They compute
    the weight, a plain attribute, from parameters of other names at each call of the module. The
    quantizer is a child of the module.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self.child = f"{parameter}_quantizer"

    def quantizer(self, module: nn.Module) -> FakeQuantize:
        found = module._modules[self.child]
        assert isinstance(found, FakeQuantize)
        return found

    def __call__(self, module: nn.Module, args: object) -> None:
        if self.parameter in module._parameters:
            raise RuntimeError(
                f"{type(module).__name__}: expected its {self.parameter} to be computed by a hook, "
                "as when prepare_qat quantized it, got a parameter; make it one (prune.remove, "
                "remove_weight_norm, remove_spectral_norm) before prepare_qat, or after "
                "remove_quantizers"
            )
        quantized = self.quantizer(module)(getattr(module, self.parameter))
        setattr(module, self.parameter, quantized)


def computes_weight(hook: object, parameter: str) -> bool:
    """Whether a forward pre-hook is one of torch's that compute the parameter of that name."""
    if isinstance(hook, BasePruningMethod):
        return bool(hook._tensor_name == parameter)
    return isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == parameter


class HookedWeight(NamedTuple):
    """Where the quantizer of a :class:`WeightHook` gets its input from."""

    owner: str  # name of the module that has the weight
    parameter: str  # name of the weight in it
    module: nn.Module
    hook: WeightHook

    @torch.no_grad()
    def read(self) -> Tensor:
        """The weight that torch's hooks compute from the present parameters."""
        kept = getattr(self.module, self.parameter)
        with eval_mode(self.module):  # in train mode spectral_norm would update its buffers
            try:
                for hook in self.module._forward_pre_hooks.values():
                    compute: Any = hook
                    if computes_weight(hook, self.parameter):
                        compute(self.module, ())
                value: Tensor = getattr(self.module, self.parameter)
            finally:
                setattr(self.module, self.parameter, kept)
        return value.detach()


AnyWeightSource = WeightSource | HookedWeight


def parametrizations(
    root: nn.Module,
) -> Iterator[tuple[str, str, parametrize.ParametrizationList]]:
    """For every parametrized tensor: its module's name, its own name and its parametrizations."""
    for name, module in root.named_modules():
        if parametrize.is_parametrized(module):
            chains = module.parametrizations
            assert isinstance(chains, nn.ModuleDict)
            for parameter, chain in chains.items():
                assert isinstance(chain, parametrize.ParametrizationList)
                yield clean_name(name), parameter, chain


def role_of(name: str, quantizer: FakeQuantize) -> str:
    """What a quantizer quantizes: a module's ``"input"``, ``"output"`` or ``"weight"``."""
    if quantizer.transient:
        return "weight"
    return "input" if INPUTS in name.split(".") else "output"
